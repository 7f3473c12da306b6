"""Rows of a user's function, `data.source=package.module:function`, each with a name for errors.

def rows():            # or rows(split), which is called with "train" and with "eval"
    yield {"question": "2+2?", "answer": "4"}
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from atlas_jax import sockets
from atlas_jax.data.row_files import Records

TRAIN = "train"
EVAL = "eval"

_OPTION = "data.source"
_END = object()


def takes_split(reference: str) -> bool:
    """Returns whether a function has held-out rows too, under the parameter `split`.

    Raises:
        ValueError: if the function cannot be imported, or takes other parameters.
    """
    return _find(reference)[1]


def read(reference: str, split: str) -> Records:
    """Yields the rows of a function.

    Args:
        reference: `package.module:function`.
        split: TRAIN or EVAL; what the function is called with if it has that parameter.

    Raises:
        ValueError: says in one line why the function gives no rows, or why it fails.
    """
    function, has_splits = _find(reference)
    name = f"{reference}({split})" if has_splits else reference
    rows, error = sockets.attempt(function, **({"split": split} if has_splits else {}))
    if error:
        raise ValueError(f"{_OPTION}={name} fails with {error}")
    if rows is None and split == EVAL:
        return
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise ValueError(
            f"{_OPTION}={name} returns a {type(rows).__name__}; return an iterable of dicts"
        )
    iterator = iter(rows)
    for number in itertools.count(1):
        row, error = sockets.attempt(next, iterator, _END)
        if error:
            raise ValueError(f"{_OPTION}={name}: its row {number} fails with {error}")
        if row is _END:
            return
        yield f"{name}[{number}]", _checked(row)


def _checked(row: Any) -> dict[str, Any] | str:
    if not isinstance(row, Mapping):
        return f"is a {type(row).__name__}; yield a dict"
    odd = next((key for key in row if not isinstance(key, str)), None)
    return dict(row) if odd is None else f"has the key {odd!r}; use texts as keys"


def _find(reference: str) -> tuple[Callable[..., Any], bool]:
    """Returns the function, and whether it takes a split."""
    function = sockets.resolve(reference, _OPTION)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a function in C
        return function, False
    needed = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    is_async = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
    if set(needed) - {"split"} or is_async:
        kind = "is async" if is_async else f"takes ({', '.join(parameters)})"
        raise ValueError(
            f"{_OPTION}={reference} {kind}; write a plain function without parameters, or with "
            "split alone"
        )
    return function, "split" in parameters
