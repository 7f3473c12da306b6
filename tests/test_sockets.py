"""References to a user's own code."""

import json
import math
import os
import subprocess
import sys

import pytest

from atlas_jax import sockets
from atlas_jax.options import fields


def test_only_a_name_with_a_colon_is_a_reference():
    assert fields.is_reference("my_package.losses:huber")
    assert not fields.is_reference("dr_grpo")


def test_a_reference_is_what_python_imports():
    assert sockets.resolve("math:sqrt", "loss_type") is math.sqrt
    assert sockets.resolve("json.decoder:JSONDecoder.decode", "x") is json.JSONDecoder.decode


MODULES = {"fails": "1 / 0\n", "needs": "import no_such_dependency\n", "odd": "def broken(:\n"}

MISTAKES = {
    "math:": "loss_type=math:: write package.module:function",
    ":sqrt": "write package.module:function",
    "losses/own.py:f": "write package.module:function",
    "no_such_module:f": "no module no_such_module; install its package, or put its directory",
    "json.no_such:f": "no module json.no_such",
    "math:sqroot": "math has no sqroot",
    "math:pi": "pi is a float; it must be callable",
    "fails:f": "importing fails fails with ZeroDivisionError: division by zero",
    "needs:f": "importing needs fails with ModuleNotFoundError: No module named",
    "odd:f": "importing odd fails with SyntaxError",
}


@pytest.mark.parametrize(("name", "message"), MISTAKES.items())
def test_a_mistake_in_a_reference_is_one_line_with_its_cause(name, message, tmp_path, monkeypatch):
    for module, text in MODULES.items():
        (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError) as error:
        sockets.resolve(name, "loss_type")
    assert message in str(error.value)
    assert str(error.value).startswith(f"loss_type={name}: ")
    assert "\n" not in str(error.value)


def test_a_module_of_the_working_directory_is_found_by_an_installed_command(tmp_path):
    (tmp_path / "mine.py").write_text("def f(x):\n    return x + 1\n")
    code = "from atlas_jax import sockets; print(sockets.resolve('mine:f', 'x')(1))"
    command = [sys.executable, "-P", "-c", code]  # -P: as a console script, without the directory
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    found = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "2"
