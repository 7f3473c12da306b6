"""References to a user's own code, written `package.module:function`. Imports no JAX."""

from __future__ import annotations

import importlib
import operator
import os
import sys
from collections.abc import Callable
from typing import Any

_IMPORT_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


def is_reference(name: str) -> bool:
    """Returns true for `module:function`, false for the name of something built in."""
    return ":" in name


def resolve(name: str, option: str) -> Callable[..., Any]:
    """Returns the function or class that `module:function` refers to.

    The module is imported; besides installed ones, modules of the working directory are found.

    Args:
        name: the reference; a class attribute is `module:Class.method`.
        option: the option that holds it, for the message of an error.

    Raises:
        ValueError: the reference is malformed, its import fails, or it refers to no callable.
    """
    found = resolve_object(name, option)
    if not callable(found):
        attribute = name.partition(":")[2]
        raise ValueError(
            f"{option}={name}: {attribute} is a {type(found).__name__}; it must be callable"
        )
    return found


def resolve_object(name: str, option: str) -> Any:
    """Returns the object of any type that `module:NAME` refers to; raises as `resolve` does."""
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise ValueError(f"{option}={name}: write package.module:function")
    try:
        module = _imported(module_name)
    except _IMPORT_ERRORS as error:
        raise ValueError(f"{option}={name}: {_told(error, module_name)}") from error
    try:
        found = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise ValueError(f"{option}={name}: {module_name} has no {attribute}") from error
    return found


def _imported(name: str) -> Any:
    """Returns a module, which may lie in the working directory."""
    added = [] if os.getcwd() in sys.path or "" in sys.path else [os.getcwd()]
    sys.path.extend(added)
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _told(error: BaseException, module: str) -> str:
    """Returns the failure of an import in one line."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and f"{module}.".startswith(f"{missing}."):
        return (
            f"no module {missing}; install its package, or put its directory into PYTHONPATH "
            f"(the working directory is {os.getcwd()})"
        )
    said = " ".join(str(error).split())
    return f"importing {module} fails with {type(error).__name__}: {said}"
