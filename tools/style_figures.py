"""Figures of the code's shape and of its English, one a line, read from the sources alone.

`python tools/style_figures.py [--hits NAME] [--root DIR]`. With `--hits`, the places that a figure
counts are listed too, as `path:line: text`. `--root` is the checkout to be read.
"""

import argparse
import ast
import collections
import io
import pathlib
import re
import statistics
import tokenize
from collections.abc import Callable, Iterator
from typing import NamedTuple

OPENINGS = ("What", "Whether", "How", "Of", "For", "That", "Behind", "Those", "From")
IDIOMS = ("behind", "lacks", "there is not", "there is no")
ENTRIES = ("apply", "get_config")
VAGUE = ("found", "known", "kept", "most", "own", "rest", "one")
_DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef
_BLOCKS = (
    ast.If | ast.For | ast.AsyncFor | ast.While | ast.With | ast.AsyncWith | ast.Try | ast.Match
)


class Source(NamedTuple):
    """One module of the package: its dotted name, path, text, syntax tree and comments."""

    name: str
    path: pathlib.Path
    text: str
    tree: ast.Module
    comments: list[tuple[int, str, bool]]  # line, text, whether the line holds nothing else

    @property
    def num_lines(self) -> int:
        """Lines of the file, of every kind."""
        return len(self.text.splitlines())


class Hit(NamedTuple):
    """A place that a figure counts."""

    path: pathlib.Path
    line: int
    text: str
    num_lines: int = 1


def main() -> None:
    """Prints the figures of a checkout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path())
    parser.add_argument("--hits", default="", help="name of a figure whose places are listed")
    options = parser.parse_args()
    figures = measure(options.root)
    if options.hits:
        for hit in figures[options.hits]:
            print(f"{hit.path}:{hit.line}: {hit.text}")
        return
    for name, value in figures.items():
        print(f"{name:36s} {len(value) if isinstance(value, list) else value}")


def measure(root: pathlib.Path) -> dict[str, str | list[Hit]]:
    """Returns the figures by name: a text, or the list of places whose number is the figure."""
    sources = read(root / "atlas_jax", root)
    return {**sizes(sources), **shapes(sources), **habits(sources), **words(root, sources),
            **graph(sources)}  # fmt: skip


def read(package: pathlib.Path, root: pathlib.Path) -> list[Source]:
    """Returns the modules under a package's directory, sorted by path."""
    sources = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        comments = [
            (token.start[0], token.string, token.line.lstrip().startswith("#"))
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT
        ]
        sources.append(Source(name, path, text, ast.parse(text), comments))
    return sources


def code_lines(source: Source) -> int:
    """Returns the number of lines that are neither blank, nor comments, nor docstrings."""
    prose = {line for line, _, whole in source.comments if whole}
    for hit in docstrings(source):
        prose |= set(range(hit.line, hit.line + hit.num_lines))
    lines = enumerate(source.text.splitlines(), 1)
    return sum(1 for number, line in lines if line.strip() and number not in prose)


def sizes(sources: list[Source]) -> dict[str, str | list[Hit]]:
    """Returns the figures of files: their number, lines and code lines."""
    code = [code_lines(source) for source in sources]
    full = [(n, source) for n, source in zip(code, sources, strict=True) if n]
    largest, where = max(full, key=lambda pair: pair[0])
    return {
        "files": str(len(sources)),
        "files with code": str(len(full)),
        "lines": str(sum(source.num_lines for source in sources)),
        "code lines": str(sum(code)),
        "code lines a file, median p90 max": _spread([n for n, _ in full]),
        "largest file": f"{where.path} {largest}",
        "files above 400 code lines": [
            Hit(s.path, 1, f"{n} code lines") for n, s in full if n > 400
        ],
    }


def shapes(sources: list[Source]) -> dict[str, str | list[Hit]]:
    """Returns the figures of functions: lengths, nesting, parameters, documentation, types."""
    functions = [
        (source, node)
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, _DEFINITIONS)
    ]
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for _, node in functions]
    depths = [nesting(node) for _, node in functions]
    public = [hit for source in sources for hit in _public(source)]
    typed = [_is_annotated(node) for _, node in functions]

    def places(numbers: list[int], limit: int) -> list[Hit]:
        return [
            Hit(source.path, node.lineno, f"{node.name}: {n}")
            for n, (source, node) in zip(numbers, functions, strict=True) if n > limit
        ]  # fmt: skip

    return {
        "lines a function, median p90 max": _spread(lengths),
        "functions above 60 lines": places(lengths, 60),
        "nesting, max": str(max(depths)),
        "nesting above 3": places(depths, 3),
        "more than 8 parameters": places([len(_parameters(node)) for _, node in functions], 8),
        "documented": f"{100 * sum(has for has, _ in public) / len(public):.0f} %",
        "undocumented": [hit for has, hit in public if not has],
        "annotated": f"{100 * sum(typed) / len(typed):.0f} %",
    }


def nesting(node: ast.AST) -> int:
    """Returns the depth of a function's blocks; `elif` and inner functions add none."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINITIONS | ast.ClassDef | ast.Lambda):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        step = int(isinstance(child, _BLOCKS) and not is_elif)
        deepest = max(deepest, step + nesting(child))
    return deepest


def habits(sources: list[Source]) -> dict[str, str | list[Hit]]:
    """Returns the figures of statements: exceptions, comments, assignments, records, names."""
    classes = {name for source in sources for name in records(source)}
    comments = [
        Hit(source.path, line, text)
        for source in sources for line, text, whole in source.comments
        if whole and not re.match(r"#\s*(fmt|noqa|type):", text)
    ]  # fmt: skip
    pairs = _where(sources, is_paired)
    lines = sum(source.num_lines for source in sources)
    asks = [hit for hit in _where(sources, _asks_config) if "recipes" not in hit.path.parts]
    return {
        "broad except": _where(sources, _is_broad),
        "whole-line comments": comments,
        "whole-line comments a 1,000 lines": f"{1000 * len(comments) / lines:.1f}",
        "paired assignments": pairs,
        "paired assignments a 1,000 lines": f"{1000 * len(pairs) / lines:.1f}",
        "records of 4+ fields by position": _where(sources, lambda n: by_position(n, classes)),
        "isinstance(config) outside recipes": asks,
        "vague names that live long": [hit for s in sources for hit in _vague(s)],
        "fmt: skip": [
            Hit(s.path, line, text) for s in sources for line, text, _ in s.comments
            if "fmt: skip" in text
        ],
        "class names that stand twice": _doubled(sources),
    }  # fmt: skip


def words(root: pathlib.Path, sources: list[Source]) -> dict[str, str | list[Hit]]:
    """Returns the figures of prose: openings of docstrings, idioms of package and documents."""
    opening = re.compile(rf"({'|'.join(OPENINGS)})\b")
    texts = [hit for source in sources for hit in prose(source)]
    documents = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    lines = [
        Hit(path, i, line)
        for path in documents if path.exists()
        for i, line in enumerate(path.read_text().splitlines(), 1)
    ]  # fmt: skip
    figures: dict[str, str | list[Hit]] = {
        "docstrings with a clause for a noun": [
            hit for source in sources for hit in docstrings(source) if opening.match(hit.text)
        ]
    }
    for idiom in IDIOMS:
        word = re.compile(rf"\b{idiom}\b", re.IGNORECASE)
        figures[f"'{idiom}' in the package"] = [hit for hit in texts if word.search(hit.text)]
        figures[f"'{idiom}' in the documents"] = [hit for hit in lines if word.search(hit.text)]
    return figures


def docstrings(source: Source) -> list[Hit]:
    """Returns the docstrings of a module, those of attributes included."""
    return [
        Hit(
            path=source.path,
            line=node.lineno,
            text=node.value.value.strip(),
            num_lines=(node.end_lineno or node.lineno) - node.lineno + 1,
        )
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]  # fmt: skip


def graph(sources: list[Source]) -> dict[str, str | list[Hit]]:
    """Returns the figures of imports: reach of the recipes, fan-out, floors."""
    by_name = {source.name: source for source in sources}
    top = {source.name: _imports(source, by_name, everywhere=False) for source in sources}
    anywhere = {source.name: _imports(source, by_name, everywhere=True) for source in sources}
    figures: dict[str, str | list[Hit]] = {}
    for recipe in ("atlas_jax.recipes.sft", "atlas_jax.recipes.grpo"):
        modules = [by_name[name] for name in reach(recipe, top)]
        coded = [source for source in modules if code_lines(source)]
        figures[f"modules reached by {recipe[10:]}"] = [
            Hit(source.path, 1, f"{code_lines(source)} code lines") for source in coded
        ]
        figures[f"code lines reached by {recipe[10:]}"] = str(sum(map(code_lines, coded)))
    for name in ("atlas_jax.run", "atlas_jax.recipes.grpo"):
        if name in by_name:
            figures[f"fan-out of {name[10:]}"] = str(len(anywhere[name]))
    figures["floors of rooms"] = str(floors(anywhere))
    return figures


def reach(start: str, imports: dict[str, set[str]]) -> list[str]:
    """Returns the modules that importing `start` brings in, itself included, sorted."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += imports[name]
    return sorted(seen)


def floors(imports: dict[str, set[str]]) -> int:
    """Returns the length of the longest chain of rooms (wings and modules of the root)."""
    rooms: dict[str, set[str]] = collections.defaultdict(set)
    for name, targets in imports.items():
        rooms[_room(name)] |= {_room(target) for target in targets} - {_room(name)}
    heights: dict[str, int] = {}

    def height(room: str, above: tuple[str, ...]) -> int:
        if room not in heights and room not in above:
            below = [height(other, (*above, room)) for other in rooms[room]]
            heights[room] = 1 + max(below, default=0)
        return heights.get(room, 0)

    return max(height(room, ()) for room in list(rooms) if room)


def _room(module: str) -> str:
    return module.removeprefix("atlas_jax").lstrip(".").split(".")[0]


def _imports(source: Source, known: dict[str, Source], *, everywhere: bool) -> set[str]:
    """Returns the modules of the package that a module imports, at its top or everywhere."""
    targets: set[str] = set()
    for node in ast.walk(source.tree) if everywhere else _top_level(source.tree):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            targets |= {node.module, *members}
    packages = {
        ".".join(name.split(".")[:i]) for name in targets for i in range(1, name.count(".") + 1)
    }
    reached = (targets if everywhere else targets | packages) & known.keys()
    coded = {name for name in reached if not everywhere or code_lines(known[name])}
    return coded - {source.name}


def _top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yields the statements that run when a module is imported."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if not isinstance(node, _DEFINITIONS):
            waiting += [
                child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)
            ]


def _spread(numbers: list[int]) -> str:
    ordered = sorted(numbers)
    return f"{statistics.median(ordered):.0f} {ordered[int(0.9 * len(ordered))]} {ordered[-1]}"


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    spec = node.args
    extra = [arg for arg in (spec.vararg, spec.kwarg) if arg]
    every = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *extra]
    return [arg for arg in every if arg.arg not in ("self", "cls")]


def _is_annotated(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return node.returns is not None and all(arg.annotation for arg in _parameters(node))


def _public(source: Source) -> Iterator[tuple[bool, Hit]]:
    """Yields each public module, class, function and method with whether it is documented.

    Signatures of one function's overloads count as that function. A config file is one function,
    which the docstring of its module describes.
    """
    waiting: list[ast.Module | ast.ClassDef] = [source.tree]
    yield ast.get_docstring(source.tree) is not None, Hit(source.path, 1, "module")
    while waiting:
        for node in waiting.pop().body:
            if isinstance(node, _DEFINITIONS | ast.ClassDef) and not node.name.startswith("_"):
                if _is_overload(node) or ("configs" in source.path.parts and node.name in ENTRIES):
                    continue
                yield ast.get_docstring(node) is not None, Hit(source.path, node.lineno, node.name)
                waiting += [node] if isinstance(node, ast.ClassDef) else []


def _is_overload(node: ast.AST) -> bool:
    marks = getattr(node, "decorator_list", [])
    return any(ast.unparse(mark).split(".")[-1] == "overload" for mark in marks)


def _where(sources: list[Source], counts: Callable[[ast.AST], bool]) -> list[Hit]:
    return [
        Hit(source.path, node.lineno, ast.unparse(node).splitlines()[0])
        for source in sources for node in ast.walk(source.tree)
        if isinstance(node, ast.stmt | ast.expr | ast.ExceptHandler) and counts(node)
    ]  # fmt: skip


def _is_broad(node: ast.AST) -> bool:
    if not isinstance(node, ast.ExceptHandler):
        return False
    return node.type is None or bool(re.search(r"\b(Base)?Exception\b", ast.unparse(node.type)))


def is_paired(node: ast.AST) -> bool:
    """Tells `a, b = x, y` from unpacking and from a swap (a value reads a name that is set)."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    targets = node.targets[0]
    if not isinstance(targets, ast.Tuple) or len(targets.elts) != len(node.value.elts):
        return False
    names = {ast.unparse(target) for target in targets.elts}
    reads = {ast.unparse(n) for n in ast.walk(node.value) if isinstance(n, ast.expr)}
    return not names & reads


def _asks_config(node: ast.AST) -> bool:
    """Tells a question for a config's class; that of a draft (`ConfigDict`) is no recipe's."""
    text = ast.unparse(node) if isinstance(node, ast.Call) else ""
    return text.startswith("isinstance(config,") and "ConfigDict" not in text


def records(source: Source) -> Iterator[str]:
    """Yields the names of the named tuples and dataclasses of a module."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef):
            marks = " ".join(map(ast.unparse, [*node.bases, *node.decorator_list]))
            if re.search(r"NamedTuple|dataclass", marks):
                yield node.name


def by_position(node: ast.AST, records: set[str]) -> bool:
    """Tells the construction of a record from more than three values without their names."""
    if not isinstance(node, ast.Call):
        return False
    plain = [arg for arg in node.args if not isinstance(arg, ast.Starred)]
    return ast.unparse(node.func).split(".")[-1] in records and len(plain) > 3


def _vague(source: Source) -> Iterator[Hit]:
    """Yields the local variables of vague names that are read more than three lines later."""
    for function in ast.walk(source.tree):
        if not isinstance(function, _DEFINITIONS):
            continue
        uses: dict[str, list[int]] = collections.defaultdict(list)
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and node.id in VAGUE:
                uses[node.id].append(node.lineno)
            if isinstance(node, ast.arg) and node.arg in VAGUE:
                uses[node.arg].append(node.lineno)
        for name, lines in uses.items():
            if max(lines) - min(lines) > 3:
                yield Hit(source.path, min(lines), f"{name} in {function.name}")


def _doubled(sources: list[Source]) -> list[Hit]:
    classes: dict[str, list[Hit]] = collections.defaultdict(list)
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                hit = Hit(source.path, node.lineno, node.name)
                classes[node.name.lstrip("_").lower()].append(hit)
    return [hit for _, hits in sorted(classes.items()) if len(hits) > 1 for hit in hits]


def prose(source: Source) -> Iterator[Hit]:
    """Yields the lines of docstrings and comments."""
    for hit in docstrings(source):
        for i, line in enumerate(hit.text.splitlines()):
            yield Hit(hit.path, hit.line + i, line.strip())
    for number, text, _ in source.comments:
        yield Hit(source.path, number, text)


if __name__ == "__main__":
    main()
