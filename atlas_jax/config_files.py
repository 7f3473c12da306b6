"""Runs the Python files that users write: configs of runs and options of judges. Imports no JAX.

An error in such a file is told with its place, `FILE:LINE`, in one sentence; the traceback is the
cause of the exception.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import sys
import sysconfig
import traceback
from typing import Any

from ml_collections import ConfigDict

_MISTAKES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
_PACKAGE = str(pathlib.Path(__file__).parent)
_FOREIGN = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")})
_UNKNOWN_KEY = re.compile(r"\W*Key \W*(\w+)\W+ does not exist|\W*(\w+)\W*(?:\\n.*)?")
_SUGGESTION = re.compile(r"Did you mean \W*(\w+)\W+ instead")


class ConfigFileError(ValueError):
    """A file that cannot be used; the text says where and why."""


def load(argument: str) -> ConfigDict:
    """Returns what a config file describes.

    Args:
        argument: `FILE.py`, or `FILE.py:ARGUMENT` to pass a text to its `get_config`.

    Raises:
        ValueError: for a file that is missing, fails, or returns something else than a config.
    """
    path, *given = argument.split(":", 1)
    config = run(path, "get_config", *given, example="configs/run/teacher_sft.py")
    if not isinstance(config, ConfigDict):
        raise ConfigFileError(
            f"{path}: get_config returns a {type(config).__name__}; it must return the config that "
            "config.defaults(…) gave it"
        )
    return config


def run(path: str, function: str, *arguments: Any, example: str) -> Any:
    """Returns what a function of a Python file returns.

    Args:
        path: the file.
        function: name of the function.
        *arguments: what it is called with.
        example: a file of this kind that can be looked at.

    Raises:
        ValueError: for a file that is missing, or fails.
    """
    _check_path(path, example)
    spec = importlib.util.spec_from_file_location(f"_{pathlib.Path(path).stem}_of_the_user", path)
    assert spec is not None and spec.loader is not None, "the name ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise ConfigFileError(f"{path} has no function {function}; see {example}")
        return getattr(module, function)(*arguments)
    except ConfigFileError:
        raise
    except _MISTAKES as error:
        raise ConfigFileError(_told(error, path)) from error


def _check_path(path: str, example: str) -> None:
    stem, suffix = os.path.splitext(path)
    if suffix == ".py" and os.path.isfile(path):
        return
    ours = [f"{stem}.py", f"configs/run/{os.path.basename(stem)}.py"]
    hint = next((f"; there is {other}" for other in ours if os.path.isfile(other)), "")
    if suffix != ".py":
        raise ConfigFileError(f"{path}: a config is a Python file such as {example}{hint}")
    raise ConfigFileError(
        f"{path} does not exist; name a file like {example}"
        f"{hint or f'; relative paths start at {os.getcwd()}'}"
    )


def _told(error: BaseException, path: str) -> str:
    """Returns the error with its place in the user's file."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ValueError) and frames[-1].filename.startswith(_PACKAGE):
        return str(error)  # a sentence of ours about what the file or its argument says
    own = [f for f in frames if not f.filename.startswith((_PACKAGE, "<", *_FOREIGN))]
    place = f"{own[-1].filename}:{own[-1].lineno}" if own else path
    if isinstance(error, AttributeError | KeyError) and "ml_collections" in frames[-1].filename:
        return f"{place}: {_unknown_option(str(error))}"
    lines = str(error).splitlines() or [""]
    hint = ""
    if isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] == "configs":
        hint = "; run from the repository root, or have it in PYTHONPATH"
    return f"{place}: {type(error).__name__}: {lines[0]}{hint}"


def _unknown_option(text: str) -> str:
    """Returns what `ml_collections` says of a key, without the whole config behind it."""
    key, suggestion = _UNKNOWN_KEY.match(text), _SUGGESTION.search(text)
    name = (key[1] or key[2]) if key else text[:40]
    return f"unknown option {name}" + (f"; did you mean {suggestion[1]!r}?" if suggestion else "")
