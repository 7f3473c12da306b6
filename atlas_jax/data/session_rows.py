"""Rows of the sessions of the Atlas runtime: of a database, of its snapshot, or of exports.

It is what imports the wing of the runtime, where a config asks for sessions. A run on files of
rows needs neither the parser of sessions nor the client of their database.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from absl import logging

from atlas_jax import extras
from atlas_jax.data import sources
from atlas_jax.options.data import DataConfig
from atlas_jax.traces import files, sessions
from atlas_jax.traces.query import Query
from atlas_jax.types import SessionRows


def check_sessions(config: DataConfig, output_dir: str) -> None:
    """Checks the filters of sessions, and that their database or its snapshot has some that pass.

    Raises:
        ValueError: as `traces.snapshot.check`, and if the client is not installed.
        ConnectionError: if the database cannot be reached.
    """
    if config.db_url:
        extras.need("postgres", "data.db_url")
        from atlas_jax.traces import snapshot

        snapshot.check(config, output_dir)
    elif config.format == "session":
        Query.from_config(config)


def take_snapshot(config: DataConfig, output_dir: str) -> None:
    """Reads the database of sessions into the run's snapshot, where the config names a database.

    Raises:
        ValueError: as `check_sessions`.
        OSError: if the database is lost on the way.
    """
    if config.db_url:
        extras.need("postgres", "data.db_url")
        from atlas_jax.traces import snapshot

        snapshot.take(config, output_dir)


def records(
    config: DataConfig, parts: list[str], output_dir: str
) -> Iterator[tuple[str, SessionRows | str]]:
    """Yields the sessions of exports, or of the run's snapshot where there are none."""
    if parts:
        return sessions.to_records(
            itertools.chain.from_iterable(exported(part) for part in parts), config
        )
    from atlas_jax.traces import snapshot

    return sessions.to_records(snapshot.read(output_dir), config)


def exported(path: str) -> Iterator[tuple[str, Any]]:
    """Yields the sessions of an export, each with its name."""
    return files.read(path)


def unfold(rows: sources.Rows, part: str, needed: str = "") -> sources.Rows:
    """Returns the lessons or the questions of sessions as rows; rows of other kinds stay.

    Args:
        rows: of a dataset.
        part: `sources.LESSONS` or `sources.QUESTIONS`.
        needed: a field that must not be empty in them.

    Raises:
        ValueError: if the sessions hold none at all.
    """
    unfolded = []
    num_sessions = 0
    num_parts = 0
    for row in rows.rows:
        if row.session is None:
            unfolded.append(row)
            continue
        found = [f for f in getattr(row.session, part) if not needed or f[needed]]
        unfolded += [
            sources.Row(f"{row.name} {part}[{i}]", fields) for i, fields in enumerate(found)
        ]
        num_sessions = num_sessions + 1
        num_parts = num_parts + len(found)
    if num_sessions:
        logging.info("%d sessions hold %d %s", num_sessions, num_parts, part)
    if num_sessions and not unfolded:
        lack = f" with a {needed}" if needed else ""
        raise ValueError(
            f"{num_sessions} sessions hold no {part}{lack}; take others (data.min_reward, "
            "data.status_filters, data.review_status_filters), or see docs/data.md on sessions"
        )
    return rows._replace(rows=unfolded)
