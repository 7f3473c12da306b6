"""Checks of the first rows of a dataset, before a run begins."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from atlas_jax.data import sources
from atlas_jax.options.data import DataConfig

_NUM_LOOKED_AT = 1000
"""Rows of a file that `check` looks at; a few unusable ones may stand first."""


def check(config: DataConfig, path: str, use: Callable[[sources.Row], object]) -> None:
    """Checks that the files of `path` can be read and that one of their first rows can be used.

    What the hub has is not looked up.

    Args:
        config: gives the format.
        path: as `read_rows` takes it.
        use: raises a ValueError for a row that cannot be used; it gets no sessions.

    Raises:
        ValueError: for a file that is missing, unreadable or of an unknown kind, or that begins
            with rows of which none can be used.
    """
    for part in sources.parts_of(path):
        records: Iterable[tuple[str, Any]]
        if config.format == "session":
            from atlas_jax.data import session_rows  # the client of a database

            records = session_rows.exported(part)
        elif sources.is_local(part):
            records = sources.records(part, config)
        else:
            continue
        check_records(records, use)


def check_function(source: str, use: Callable[[sources.Row], object]) -> None:
    """Checks that a function gives rows of which one of the first can be used, in each split.

    Raises:
        ValueError: as `row_functions.read`, and as `check`.
    """
    from atlas_jax.data import row_functions

    check_records(row_functions.read(source, row_functions.TRAIN), use)
    if row_functions.takes_split(source):
        check_records(row_functions.read(source, row_functions.EVAL), use)


def check_records(records: Iterable[tuple[str, Any]], use: Callable[[sources.Row], object]) -> None:
    """Checks that one of the first records, each with its name, can be used; see `check`."""
    first = ""
    for name, value in itertools.islice(records, _NUM_LOOKED_AT):
        problem = _problem(name, value, use)
        if not problem:
            return
        first = first or f"{name}: {problem}"
    if first:
        raise ValueError(first)


def _problem(name: str, value: Any, use: Callable[[sources.Row], object]) -> str:
    """Returns why a record cannot be used; "" if it can."""
    if isinstance(value, dict):
        try:
            use(sources.Row(name, value))
        except ValueError as error:
            return str(error)
    return value if isinstance(value, str) else ""
