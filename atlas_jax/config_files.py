"""Config files: runs, and options of judges, written in Python. Imports no JAX.

A reference to one is a path that ends in `.py`, the name of a file that the package ships, or the
dotted name of an importable module. An error in such a file is told with its place, `FILE:LINE`, in
one sentence; the traceback is the cause of the exception.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import pathlib
import pkgutil
import re
import sys
import sysconfig
import traceback
import types
from typing import Any

from ml_collections import ConfigDict

_MISTAKES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
_PACKAGE = str(pathlib.Path(__file__).parent)
_SHIPPED = "atlas_jax.configs"
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_FOREIGN = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")})
_UNKNOWN_KEY = re.compile(r"\W*Key \W*(\w+)\W+ does not exist|\W*(\w+)\W*(?:\\n.*)?")
_SUGGESTION = re.compile(r"Did you mean \W*(\w+)\W+ instead")


class ConfigFileError(ValueError):
    """A file that cannot be used; the text says where and why."""


def load(argument: str) -> ConfigDict:
    """Returns what a config file describes.

    Args:
        argument: `FILE.py`, the name of a shipped recipe, or `PACKAGE.MODULE`; a text that follows
            after a colon is passed to its `get_config`.

    Raises:
        ValueError: for a file that is missing, fails, or returns something else than a config.
    """
    reference, *given = argument.split(":", 1)
    config = run(reference, "get_config", *given, folder="run")
    if not isinstance(config, ConfigDict):
        raise ConfigFileError(
            f"{reference}: get_config returns a {type(config).__name__}; it must return the config "
            "that config.defaults(…) gave it"
        )
    return config


def run(reference: str, function: str, *arguments: Any, folder: str) -> Any:
    """Returns what a function of a config file returns.

    Args:
        reference: path, shipped name or dotted name of the file.
        function: name of the function.
        *arguments: arguments of the call.
        folder: directory of the shipped files of this kind in `atlas_jax/configs`; "" is that one.

    Raises:
        ValueError: for a file that is missing, or fails.
    """
    try:
        module = _import(reference, folder)
        if not hasattr(module, function):
            example = f"{_path(folder)}/{shipped(folder)[-1]}.py"
            raise ConfigFileError(f"{reference} has no function {function}; see {example}")
        return getattr(module, function)(*arguments)
    except ConfigFileError:
        raise
    except _MISTAKES as error:
        raise ConfigFileError(_told(error, reference)) from error


def shipped(folder: str) -> list[str]:
    """Returns the names of the files that the package ships in a directory of `configs/`."""
    entries = pkgutil.iter_modules([os.path.join(_PACKAGE, "configs", folder)])
    return sorted(entry.name for entry in entries if not entry.ispkg)


def _import(reference: str, folder: str) -> types.ModuleType:
    if reference.endswith(".py"):
        return _import_path(reference, folder)
    if reference in shipped(folder):
        prefix = f"{_SHIPPED}.{folder}" if folder else _SHIPPED
        return importlib.import_module(f"{prefix}.{reference}")
    if "." in reference and _MODULE.fullmatch(reference):
        try:
            return importlib.import_module(reference)
        except ModuleNotFoundError as error:
            # Another name is one that the module imports: a mistake inside it.
            if f"{reference}.".startswith(f"{error.name}."):
                raise ConfigFileError(_missing(reference, folder)) from None
            raise
    raise ConfigFileError(_missing(reference, folder))


def _import_path(path: str, folder: str) -> types.ModuleType:
    if not os.path.isfile(path):
        raise ConfigFileError(_missing(path, folder))
    spec = importlib.util.spec_from_file_location(f"_{pathlib.Path(path).stem}_of_the_user", path)
    assert spec is not None and spec.loader is not None, "the name ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


def _missing(reference: str, folder: str) -> str:
    """Returns the sentence about a reference that leads nowhere."""
    names = shipped(folder)
    nearest = difflib.get_close_matches(os.path.basename(reference).partition(".")[0], names, 1)
    file = f"{os.path.splitext(reference)[0]}.py"
    if file != reference and os.path.isfile(file):
        hint = f"there is {file}"
    elif nearest:
        hint = f"did you mean the shipped {nearest[0]!r}?"
    elif reference.endswith(".py"):
        hint = f"relative paths start at {os.getcwd()}"
    else:
        hint = f"shipped are {', '.join(names)}"
    fault = "is no Python file" if os.path.exists(reference) else "does not exist"
    return (
        f"{reference} {fault}; give FILE.py, PACKAGE.MODULE, or the name of a shipped file in "
        f"{_path(folder)}/; {hint}"
    )


def _path(folder: str) -> str:
    return f"configs/{folder}" if folder else "configs"


def _told(error: BaseException, reference: str) -> str:
    """Returns the error with its place in the user's file."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ValueError) and frames[-1].filename.startswith(_PACKAGE):
        return str(error)  # a sentence of ours about what the file or its argument says
    own = [f for f in frames if not f.filename.startswith((_PACKAGE, "<", *_FOREIGN))]
    own = own or [f for f in frames if f.filename.startswith(os.path.join(_PACKAGE, "configs"))]
    place = f"{own[-1].filename}:{own[-1].lineno}" if own else reference
    if isinstance(error, AttributeError | KeyError) and "ml_collections" in frames[-1].filename:
        return f"{place}: {_unknown_option(str(error))}"
    lines = str(error).splitlines() or [""]
    hint = ""
    if isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] == "configs":
        hint = "; the shipped files are imported from atlas_jax.configs"
    return f"{place}: {type(error).__name__}: {lines[0]}{hint}"


def _unknown_option(text: str) -> str:
    """Returns what `ml_collections` says of a key, without the whole config after it."""
    key = _UNKNOWN_KEY.match(text)
    suggestion = _SUGGESTION.search(text)
    name = (key[1] or key[2]) if key else text[:40]
    return f"unknown option {name}" + (f"; did you mean {suggestion[1]!r}?" if suggestion else "")
