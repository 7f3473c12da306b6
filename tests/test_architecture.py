"""The house rules that a program can check."""

import ast
import pathlib
import re

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


def test_the_readme_explains_every_metric():
    area = "(?:loss|optim|perf|eval|policy|rollout|reward|sync|teaching)/[a-z_]+"
    written = {m for path in SOURCES for m in re.findall(f'"({area})"', path.read_text())}
    explained = set(re.findall(f"`({area})`", _readme()))
    assert written == explained


def test_the_readme_explains_every_option():
    from atlas_jax.config import GRPOConfig, flat

    missing = {k for k in flat(GRPOConfig()) if f"`{k}`" not in _readme()} - {"algorithm"}
    assert not missing


def _readme():
    return pathlib.Path("README.md").read_text()
