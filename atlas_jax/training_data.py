"""Sessions of the Atlas runtime, straight from its database; the interface is the Atlas SDK's.

    from atlas_jax.training_data import get_training_sessions

    sessions = get_training_sessions(
        db_url="postgresql://atlas:…@localhost:5433/atlas",
        min_reward=0.8, status_filters=["succeeded"], review_status_filters=["approved"],
    )

Every function takes the filters of `Query` by name. Sessions come newest first. Those that cannot
be read are left out and named in the log. The functions may run inside an event loop; the `async`
forms leave it free.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import datetime
from typing import Any, TypedDict, Unpack

from absl import logging

from atlas_jax.traces import parser, postgres
from atlas_jax.traces.query import Query
from atlas_jax.traces.schema import (
    AtlasJudgeBreakdown,
    AtlasJudgeSample,
    AtlasRewardBreakdown,
    AtlasSessionTrace,
    AtlasStepTrace,
)

__all__ = [
    "AtlasJudgeBreakdown",
    "AtlasJudgeSample",
    "AtlasRewardBreakdown",
    "AtlasSessionTrace",
    "AtlasStepTrace",
    "StorageConfig",
    "count_training_sessions",
    "count_training_sessions_async",
    "get_session_by_id",
    "get_session_by_id_async",
    "get_training_sessions",
    "get_training_sessions_async",
    "iter_training_sessions",
    "iter_training_sessions_async",
]

_ASYNC_BATCH = 100


@dataclasses.dataclass(frozen=True)
class StorageConfig:
    """Manner of reading the database; an object of the SDK with the same field does as well."""

    statement_timeout_seconds: float = 30.0


class Filters(TypedDict, total=False):
    """Which sessions; see `Query` for their meaning and defaults."""

    min_reward: float
    created_after: datetime | None
    created_before: datetime | None
    learning_key: str | None
    status_filters: Sequence[str] | None
    review_status_filters: Sequence[str] | None


class Selection(Filters, total=False):
    """Which sessions, and how much of each."""

    include_trajectory_events: bool
    include_learning_data: bool


def get_training_sessions(
    db_url: str,
    *,
    limit: int = 1000,
    offset: int = 0,
    config: StorageConfig | None = None,
    **selection: Unpack[Selection],
) -> list[AtlasSessionTrace]:
    """Returns the newest `limit` sessions that pass the filters, after the first `offset`.

    Raises:
        ValueError: for a filter of the wrong type, and a database that cannot answer it.
        ConnectionError: if the database cannot be reached.
        TimeoutError: if a statement takes too long.
    """
    sessions = iter_training_sessions(
        db_url, limit=limit, offset=offset, config=config, **selection
    )
    with _collector_paused():
        return list(sessions)


def iter_training_sessions(
    db_url: str,
    *,
    limit: int | None = None,
    offset: int = 0,
    config: StorageConfig | None = None,
    **selection: Unpack[Selection],
) -> Iterator[AtlasSessionTrace]:
    """Yields sessions as they arrive, in bounded memory; otherwise as `get_training_sessions`.

    All of them are of one moment: what arrives while they are read is left out.
    """
    query = _query(selection)
    database = postgres.open_database(db_url, query, _access(config))
    return _parsed(postgres.read(database, query, limit, offset), query)


def count_training_sessions(
    db_url: str, *, config: StorageConfig | None = None, **filters: Unpack[Filters]
) -> int:
    """Returns how many sessions pass the filters; raises as `get_training_sessions`."""
    query = _query(filters)
    return postgres.count(postgres.open_database(db_url, query, _access(config)), query)


def get_session_by_id(
    db_url: str,
    session_id: int,
    *,
    include_trajectory_events: bool = True,
    include_learning_data: bool = True,
    config: StorageConfig | None = None,
) -> AtlasSessionTrace | None:
    """Returns one session, None if there is none; raises as `get_training_sessions`."""
    query = Query(
        session_id=session_id,
        include_trajectory_events=include_trajectory_events,
        include_learning_data=include_learning_data,
    )
    database = postgres.open_database(db_url, query, _access(config))
    return next(_parsed(postgres.read(database, query, limit=1), query), None)


async def get_training_sessions_async(
    db_url: str,
    *,
    limit: int = 1000,
    offset: int = 0,
    config: StorageConfig | None = None,
    **selection: Unpack[Selection],
) -> list[AtlasSessionTrace]:
    """Does as `get_training_sessions`."""
    return await asyncio.to_thread(
        get_training_sessions, db_url, limit=limit, offset=offset, config=config, **selection
    )


async def iter_training_sessions_async(
    db_url: str,
    *,
    limit: int | None = None,
    offset: int = 0,
    config: StorageConfig | None = None,
    **selection: Unpack[Selection],
) -> AsyncIterator[AtlasSessionTrace]:
    """Does as `iter_training_sessions`."""
    sessions = await asyncio.to_thread(
        iter_training_sessions, db_url, limit=limit, offset=offset, config=config, **selection
    )
    while batch := await asyncio.to_thread(lambda: list(itertools.islice(sessions, _ASYNC_BATCH))):
        for session in batch:
            yield session


async def count_training_sessions_async(
    db_url: str, *, config: StorageConfig | None = None, **filters: Unpack[Filters]
) -> int:
    """Does as `count_training_sessions`."""
    return await asyncio.to_thread(count_training_sessions, db_url, config=config, **filters)


async def get_session_by_id_async(
    db_url: str,
    session_id: int,
    *,
    include_trajectory_events: bool = True,
    include_learning_data: bool = True,
    config: StorageConfig | None = None,
) -> AtlasSessionTrace | None:
    """Does as `get_session_by_id`."""
    return await asyncio.to_thread(
        get_session_by_id,
        db_url,
        session_id,
        include_trajectory_events=include_trajectory_events,
        include_learning_data=include_learning_data,
        config=config,
    )


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Keeps Python from looking for cycles, which sessions have none of.

    It would walk again and again over all sessions that are kept.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _query(selection: Any) -> Query:
    return Query(**{name: value for name, value in selection.items() if value is not None})


def _access(config: StorageConfig | None) -> postgres.Access:
    config = config or StorageConfig()
    return postgres.Access(statement_timeout_secs=config.statement_timeout_seconds)


def _parsed(records: Iterator[dict[str, Any]], query: Query) -> Iterator[AtlasSessionTrace]:
    for record in records:
        try:
            yield parser.parse_session(record, query.include_learning_data)
        except ValueError as error:
            number = record["session_metadata"]["session_id"]
            logging.warning("session %s is left out: it %s", number, error)
