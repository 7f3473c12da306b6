"""References to a user's own code, written `package.module:function`, and calls of it.

Imports no JAX.
"""

from __future__ import annotations

import importlib
import operator
import os
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

_IMPORT_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
_MAX_CHARS = 300  # of what an error says


def resolve(name: str, option: str) -> Callable[..., Any]:
    """Returns the function or class that `module:function` refers to.

    The module is imported; besides installed ones, modules of the working directory are found.

    Args:
        name: the reference; a class attribute is `module:Class.method`.
        option: the option that holds it, for the message of an error.

    Raises:
        ValueError: the reference is malformed, its import fails, or it refers to no callable.
    """
    target = resolve_object(name, option)
    if not callable(target):
        attribute = name.partition(":")[2]
        raise ValueError(
            f"{option}={name}: {attribute} is a {type(target).__name__}; it must be callable"
        )
    return target


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


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, str]:
    """Calls a user's function.

    Returns:
        Its result and "", or None and its failure in one line.
    """
    try:
        return function(*args, **kwargs), ""
    except (Exception, SystemExit) as error:  # noqa: BLE001  users' code may raise anything
        return None, describe(error)


async def attempt_async(work: Awaitable[Any]) -> tuple[Any, str]:
    """Awaits a user's async function; returns what `attempt` does."""
    try:
        return await work, ""
    except (Exception, SystemExit) as error:  # noqa: BLE001  users' code may raise anything
        return None, describe(error)


def describe(error: BaseException) -> str:
    """Returns an error of a user's code, and where it was raised, in one line."""
    said = " ".join(str(error).split())
    said = said if len(said) <= _MAX_CHARS else f"{said[:_MAX_CHARS]}…"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {said}{where}" if said else f"{type(error).__name__}{where}"


def _imported(name: str) -> Any:
    """Returns a module, which may lie in the working directory."""
    added = [] if os.getcwd() in sys.path or "" in sys.path else [os.getcwd()]
    # At the end of the path, where a file of the user's hides no installed module.
    sys.path.extend(added)
    # The file may be newer than the last listing of its directory.
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
