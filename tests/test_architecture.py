"""The house rules that a program can check."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from atlas_jax import metric_docs, option_docs
from atlas_jax.metric_docs import METRICS
from tools import style_figures

SOURCES = sorted(pathlib.Path("atlas_jax").rglob("*.py"))
STYLED = ("*", "*/*", "*/*/*")
"""Modules whose prose and records are checked, as patterns."""
UNSTYLED: tuple[str, ...] = ()
TABLES = ("plan/targets",)
"""Modules with a table of records, one a line, whose columns a comment names."""


def test_files_and_functions_stay_small():
    for source in style_figures.read(pathlib.Path("atlas_jax"), pathlib.Path()):
        assert style_figures.code_lines(source) <= 400, source.path
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 80, (source.path, node.name)


def test_blocks_nest_three_deep_and_functions_take_eight_parameters_at_most():
    figures = style_figures.measure(pathlib.Path())
    assert figures["nesting above 3"] == []
    assert figures["more than 8 parameters"] == []


def test_the_class_of_a_config_is_asked_by_recipes_alone():
    assert style_figures.measure(pathlib.Path())["isinstance(config) outside recipes"] == []


def test_comments_and_docstrings_are_no_code_lines(tmp_path):
    text = '"""A module."""\n\n# A comment.\nx = """kept\n# kept"""\n\n\n'
    text += 'class A:\n    """A class.\n\n    More.\n    """\n'
    (tmp_path / "a.py").write_text(text)
    [source] = style_figures.read(tmp_path, tmp_path)
    assert style_figures.code_lines(source) == 3


def test_docstrings_name_their_subject():
    opening = re.compile(rf"({'|'.join(style_figures.OPENINGS)})\b")
    for source in styled():
        for hit in style_figures.docstrings(source):
            assert not opening.match(hit.text), f"{hit.path}:{hit.line}: {hit.text[:60]}"


def test_prose_has_no_idiom_of_another_language():
    idiom = re.compile(r"\b(behind|lacks|there is not)\b", re.IGNORECASE)
    for source in styled():
        for hit in style_figures.prose(source):
            assert not idiom.search(hit.text), f"{hit.path}:{hit.line}: {hit.text}"


def test_records_of_many_fields_are_built_by_keyword():
    sources = style_figures.read(pathlib.Path("atlas_jax"), pathlib.Path())
    records = {name for source in sources for name in style_figures.records(source)}
    assert "TrainState" in records and "Decoder" in records
    for source in styled():
        if _matches(source, TABLES):
            continue
        for node in ast.walk(source.tree):
            assert not style_figures.by_position(node, records), (source.path, ast.unparse(node))


def test_each_constant_is_assigned_on_a_line_of_its_own():
    for source in styled():
        for node in ast.walk(source.tree):
            if style_figures.is_paired(node):
                constants = [v for v in node.value.elts if isinstance(v, ast.Constant | ast.List)]
                assert len(constants) < len(node.value.elts), (source.path, ast.unparse(node))


def test_class_names_are_unique():
    places = {}
    for source in styled():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                name = node.name.lstrip("_")
                assert name not in places, (name, source.path, places[name])
                places[name] = source.path


def styled():
    """The modules that are checked for style."""
    sources = style_figures.read(pathlib.Path("atlas_jax"), pathlib.Path())
    return [s for s in sources if _matches(s, STYLED) and not _matches(s, UNSTYLED)]


def _matches(source, patterns):
    return any(source.path.match(f"atlas_jax/{pattern}.py") for pattern in patterns)


LEFT = (
    "checkpoints/sft/config.json", "outputs/quickstart/evaluation.json", "evaluation.json",
    "agreement.json", "report.html", "traces/runtime.jsonl", "traces.jsonl.gz", "build/lib/a.py",
    "atlas_jax.egg-info/PKG-INFO", ".cache/models/a.gguf",
)  # fmt: skip


@pytest.mark.skipif(not pathlib.Path(".git").exists(), reason="not a checkout")
def test_what_the_documented_commands_leave_is_not_offered_for_a_commit():
    found = subprocess.run(["git", "check-ignore", *LEFT], capture_output=True, text=True)
    assert set(found.stdout.split()) == set(LEFT)
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    ignored = ["git", "check-ignore", "--no-index", "--stdin"]
    hidden = subprocess.run(ignored, input=tracked.stdout, capture_output=True, text=True).stdout
    assert hidden == ""


EXTRAS = {
    "checkpoint/gguf.py": "gguf",
    "data/hub_rows.py": "datasets",
    "data/row_files.py": "datasets",
    "data/tables.py": "datasets",
    "endpoints.py": "judges",
    "reporting.py": "report",
    "llm_client.py": "judges",
    "rewards/symbolic_server.py": "math",
    "rewards/transport.py": "judges",
    "rollout/server_metrics.py": "vllm",
    "traces/files.py": "datasets",
    "traces/postgres.py": "postgres",
    "traces/snapshot.py": "postgres",
}
"""Modules that import what an extra installs."""


def test_every_package_that_is_imported_is_declared():
    project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
    distributions = importlib.metadata.packages_distributions()
    for path in SOURCES:
        if path.parent.name == "vllm_plugin":  # runs where vLLM is installed
            continue
        name = EXTRAS.get(str(path.relative_to("atlas_jax")))
        extra = project["optional-dependencies"].get(name, [])
        needs = [*project["dependencies"], *extra]
        declared = {re.match(r"[\w-]+", need)[0].lower().replace("_", "-") for need in needs}
        for name in imported(ast.parse(path.read_text())) - sys.stdlib_module_names - {"atlas_jax"}:
            origins = {d.lower().replace("_", "-") for d in distributions.get(name, [name])}
            assert origins & declared, f"{path} imports {name}, of {origins}"


def imported(tree):
    """The names of top-level packages that a module imports, somewhere."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_every_metric_that_is_written_is_explained():
    area = "(?:loss|optim|perf|eval|policy|rollout|reward|sync|teaching|distillation)/[a-z_]+"
    sources = (path.read_text() for path in SOURCES if path.name != "metric_docs.py")
    written = {name for text in sources for name in re.findall(f'"({area})"', text)}
    assert written == set(METRICS) - {"reward/NAME", "rim_rewards/NAME"}


@pytest.mark.parametrize("docs", [option_docs, metric_docs])
def test_generated_documents_are_those_of_the_code(docs):
    name = docs.__name__.split(".")[-1].removesuffix("_docs")
    committed = pathlib.Path(f"docs/{name}s.md").read_text()
    assert committed == docs.markdown(), "run python tools/make_docs.py"
