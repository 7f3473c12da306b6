"""The house rules that a program can check."""

import ast
import pathlib
import re

SOURCES = sorted(pathlib.Path("atlas_jax").rglob("*.py"))


def test_files_and_functions_stay_small():
    for path in SOURCES:
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, (path, node.name)


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
