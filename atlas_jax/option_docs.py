"""Options of runs for a reader: `docs/options.md`, and what `--options` prints. Imports no JAX.

Everything comes from the fields of `options`: a meaning is the string after its field.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from atlas_jax import config as config_lib
from atlas_jax.options import descriptions, fields


class Entry(NamedTuple):
    """One option of the documentation."""

    name: str
    allowed: str
    """The allowed values in words."""
    default: str
    meaning: str
    former: str
    """Former name of the option, which is accepted too; empty if it has none."""
    recipes: str = ""
    """Names of the recipes that have the option; empty if all have it."""

    @property
    def group(self) -> str:
        """Name of the group that the option is in; empty at the top."""
        return self.name.rpartition(".")[0]


def entries(pattern: str = "") -> list[Entry]:
    """Returns the options of all recipes, those at the top first.

    Each stands there once; where a name means something else in another recipe, once for each.

    Args:
        pattern: a regular expression that the name must contain; empty takes all options.

    Raises:
        ValueError: for a pattern that is no regular expression, or that no option has.
    """
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise ValueError(f"--options {pattern}: {error}; write a regular expression") from None
    schemas = {name: config_lib.schema(name) for name in config_lib.ALGORITHMS}
    owners: dict[Entry, list[str]] = {}
    for algorithm, schema in schemas.items():
        for entry in _entries(schema(), "", _former(schema)):
            owners.setdefault(entry, []).append(algorithm)
    result = [
        entry._replace(recipes="" if names == list(schemas) else ", ".join(names))
        for entry, names in owners.items()
        if (search(entry.name) or search(entry.former)) and entry.name != "algorithm"
    ]
    if not result:
        names = [entry.name for entry in owners]
        known = [name.rpartition(".")[2] for name in names]
        nearest = descriptions.nearest(pattern, [*names, *known])
        raise ValueError(f"--options {pattern}: no option has this name{nearest}")
    groups = list(dict.fromkeys(("", *(entry.group for entry in result))))
    return sorted(result, key=lambda entry: groups.index(entry.group))


def _former(schema: type[Any]) -> dict[str, str]:
    return {present: former for former, present in fields.moved(schema).items()}


def _entries(group: Any, prefix: str, former: dict[str, str]) -> Iterator[Entry]:
    texts = meanings(type(group))
    for name, hint in fields.hints(type(group)).items():
        value = getattr(group, name)
        full = prefix + name
        if dataclasses.is_dataclass(value):
            yield from _entries(value, f"{full}.", former)
        elif not fields.moved_to(hint):
            meaning = texts.get(name, "")
            if full in former:
                meaning += f" Also accepted as `{former[full]}`."
            yield Entry(
                name=full,
                allowed=descriptions.allowed(hint),
                default=_shown(value),
                meaning=meaning,
                former=former.get(full, ""),
            )


def meanings(schema: type[Any]) -> dict[str, str]:
    """Returns the string after each field of a dataclass, those of its bases included."""
    texts: dict[str, str] = {}
    for cls in reversed(schema.__mro__[:-1]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for field, after in zip(tree.body, tree.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                texts[field.target.id] = " ".join(str(after.value.value).split())
    return texts


def _shown(value: Any) -> str:
    """Returns a default as a user writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float | tuple) else value


_HEAD = """\
# Options

Made by `tools/make_docs.py`; do not edit. `python -m atlas_jax.train --options [PATTERN]` prints
the same.

A config file sets an option as `c.learning_rate = 1e-5`, a command line as
`--config.learning_rate=1e-5`, and `launch/launch.sh` as `learning_rate=1e-5`. `none` and `null`
make a text empty. A value that is not allowed is refused in one line, before the run starts.
"""
_TABLE = "| option | allowed | default | meaning |\n|---|---|---|---|\n"


def markdown() -> str:
    """Returns `docs/options.md`."""
    parts = [_HEAD]
    group = None
    for entry in entries():
        if entry.group != group:
            group = entry.group
            parts.append(f"\n## {f'`{group}`' if group else 'At the top'}\n\n{_TABLE}")
        only = f" ({entry.recipes} only)" if entry.recipes else ""
        default = f"`{_cell(entry.default)}`" if entry.default else "empty"
        parts.append(
            f"| `{entry.name}`{only} | {_cell(entry.allowed)} | {default} | "
            f"{_cell(entry.meaning)} |\n"
        )
    return "".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "\\n")


def plain(pattern: str = "") -> str:
    """Returns the options for a terminal; raises as `entries` does."""
    blocks = []
    for entry in entries(pattern):
        only = f" ({entry.recipes} only)" if entry.recipes else ""
        text = textwrap.fill(entry.meaning, 92, initial_indent="    ", subsequent_indent="    ")
        blocks.append(f"{entry.name}={entry.default}{only}\n    {entry.allowed}\n{text}\n")
    return "\n".join(blocks)
