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

SOURCES = sorted(pathlib.Path("atlas_jax").rglob("*.py"))


def test_files_and_functions_stay_small():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert code_lines(path.read_text(), tree) <= 400, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 80, (path, node.name)


def code_lines(text, tree):
    """Lines without blank ones, comments and docstrings, so that explanations cost nothing."""
    texts = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }  # fmt: skip
    lines = enumerate(text.splitlines(), 1)
    return sum(
        1 for i, line in lines if line.strip() and not line.strip().startswith("#")
        and i not in texts
    )  # fmt: skip


LEFT = (
    "checkpoints/sft/config.json", "outputs/quickstart/evaluation.json", "evaluation.json",
    "agreement.json", "traces/runtime.jsonl", "traces.jsonl.gz", "build/lib/a.py",
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
    "data/row_files.py": "datasets",
    "data/sources.py": "datasets",
    "endpoints.py": "judges",
    "reporting.py": "report",
    "llm_client.py": "judges",
    "rewards/symbolic_server.py": "math",
    "rewards/transport.py": "judges",
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
    area = "(?:loss|optim|perf|eval|policy|rollout|reward|sync|teaching)/[a-z_]+"
    sources = (path.read_text() for path in SOURCES if path.name != "metric_docs.py")
    written = {name for text in sources for name in re.findall(f'"({area})"', text)}
    assert written == set(METRICS) - {"reward/NAME", "rim_rewards/NAME"}


@pytest.mark.parametrize("docs", [option_docs, metric_docs])
def test_generated_documents_are_those_of_the_code(docs):
    name = docs.__name__.split(".")[-1].removesuffix("_docs")
    committed = pathlib.Path(f"docs/{name}s.md").read_text()
    assert committed == docs.markdown(), "run python tools/make_docs.py"
