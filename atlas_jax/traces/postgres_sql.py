"""The statements that read sessions; values are always bound, never part of the text."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from atlas_jax.traces.query import LARGEST_SCORE, NUMBER, Query

TABLES = ("sessions", "plans", "step_results", "step_attempts", "guidance_notes",
          "trajectory_events")  # fmt: skip
_COLUMNS = ("task", "status", "final_answer", "student_learning", "teacher_learning",
            "review_status", "review_notes", "completed_at", "metadata", "reward", "reward_stats",
            "reward_audit")  # fmt: skip
_ORDER = "ORDER BY s.created_at DESC, s.id DESC"

COLUMNS = """
SELECT attname FROM pg_attribute
WHERE attrelid = 'sessions'::regclass AND attnum > 0 AND NOT attisdropped"""
STEPS = """
SELECT session_id, step_id, trace, output, evaluation, attempts, metadata
FROM step_results WHERE session_id = ANY(%(ids)s) ORDER BY session_id, step_id"""
ATTEMPTS = """
SELECT session_id, step_id, attempt, evaluation
FROM step_attempts WHERE session_id = ANY(%(ids)s) ORDER BY session_id, step_id, attempt"""
GUIDANCE = """
SELECT session_id, step_id, note
FROM guidance_notes WHERE session_id = ANY(%(ids)s) ORDER BY session_id, step_id, sequence"""
# The runtime's schema has no index by session, but ids of events lie close together for sessions of
# one time, so that a range of ids spares reading the whole table.
EVENTS = """
SELECT session_id, id, created_at, event FROM trajectory_events
WHERE id BETWEEN %(first)s AND %(last)s AND session_id = ANY(%(ids)s)"""
# Numbering costs the server a sort of all events, so it is asked only where some session has more.
NEWEST_EVENTS = f"""
SELECT session_id, id, created_at, event FROM (
  SELECT *, row_number() OVER (PARTITION BY session_id ORDER BY id DESC) AS newest
  FROM ({EVENTS}) AS e
) AS numbered WHERE newest <= %(limit)s"""


class Schema(NamedTuple):
    """Columns of a database, in which versions of the runtime differ."""

    session_columns: frozenset[str]
    server_version: int


class Page(NamedTuple):
    """Which of the sessions that a query matches come next; ordered newest first."""

    limit: int | None
    offset: int = 0
    after: tuple[Any, int] | None = None
    """`(created_at, id)` of the session that came last."""
    last_id: int | None = None
    """Sessions with a higher id arrived after the read began."""


def sessions(query: Query, schema: Schema, page: Page) -> tuple[str, dict[str, Any]]:
    """Returns the statement for a page of sessions with their plans, and its values."""
    condition, values = where(query, schema, page)
    columns = [f"s.{c}" if c in schema.session_columns else f"NULL AS {c}" for c in _COLUMNS]
    return (
        f"SELECT s.id, s.created_at, {', '.join(columns)}, p.plan FROM sessions s "
        f"LEFT JOIN plans p ON p.session_id = s.id WHERE {condition} {_ORDER} "
        "LIMIT %(limit)s OFFSET %(offset)s",
        values,
    )


def count(query: Query, schema: Schema) -> tuple[str, dict[str, Any]]:
    """Returns the statement that counts the sessions of a query, and its values."""
    condition, values = where(query, schema, Page(None))
    return f"SELECT count(*) FROM sessions s WHERE {condition}", values


def event_ranges(query: Query, schema: Schema, page: Page, size: int) -> tuple[str, dict[str, Any]]:
    """Returns the statement for where the events of each page of `size` sessions lie.

    Its rows have the `number` of the page, the `first` and `last` id of its events, and in `most`
    how many the session with the most of them has.
    """
    condition, values = where(query, schema, page)
    chosen = (
        f"SELECT s.id, row_number() OVER ({_ORDER}) - 1 - %(offset)s AS place FROM sessions s "
        f"WHERE {condition} {_ORDER} LIMIT %(limit)s OFFSET %(offset)s"
    )
    return (
        "SELECT place / %(size)s AS number, min(first) AS first, max(last) AS last, "
        "max(total) AS most FROM (SELECT place, min(e.id) AS first, max(e.id) AS last, "
        f"count(*) AS total FROM ({chosen}) AS c JOIN trajectory_events e ON e.session_id = c.id "
        "GROUP BY place) AS of_sessions GROUP BY 1",
        values | {"size": size},
    )


def where(query: Query, schema: Schema, page: Page) -> tuple[str, dict[str, Any]]:
    """Returns the condition that `Query.matches` states, and its values."""
    score = f"({_decoded('s.reward_stats', schema)} ->> 'score')"
    number = f"CASE WHEN {score} ~ %(number)s THEN {score}::numeric END"
    key = f"{_decoded('s.metadata', schema)} ->> 'learning_key'"
    conditions = {
        "min_reward": f"{number} >= %(min_reward)s::numeric "
        f"AND abs({number}) < %(largest)s::numeric",
        "created_after": "s.created_at >= %(created_after)s",
        "created_before": "s.created_at < %(created_before)s",
        "learning_key": f"{key} = %(learning_key)s",
        "status_filters": "s.status = ANY(%(status_filters)s)",
        "review_status_filters": "s.review_status = ANY(%(review_status_filters)s)",
        "after": "(s.created_at, s.id) < (%(after_time)s, %(after_id)s)",
        "last_id": "s.id <= %(last_id)s",
        "session_id": "s.id = %(session_id)s",
    }
    values: dict[str, Any] = {
        "min_reward": repr(float(query.min_reward)) if query.min_reward else None,
        "created_after": query.created_after,
        "created_before": query.created_before,
        "learning_key": query.learning_key,
        "status_filters": list(query.status_filters) or None,
        "review_status_filters": list(query.review_status_filters) or None,
        "after": page.after,
        "last_id": page.last_id,
        "session_id": query.session_id,
    }
    used = [conditions[name] for name, value in values.items() if value is not None]
    after_time, after_id = page.after or (None, None)
    return " AND ".join(used) or "TRUE", values | {
        "number": f"^{NUMBER.pattern}$",
        "largest": LARGEST_SCORE,
        "after_time": after_time,
        "after_id": after_id,
        "limit": page.limit,
        "offset": page.offset,
    }


def missing_columns(query: Query, columns: Collection[str]) -> list[str]:
    """Returns the columns that a query filters by and an old database does not have."""
    needed = {
        "reward_stats": bool(query.min_reward),
        "review_status": bool(query.review_status_filters),
        "metadata": query.learning_key is not None,
        "status": bool(query.status_filters),
    }
    return [name for name, used in needed.items() if used and name not in columns]


def _decoded(column: str, schema: Schema) -> str:
    """Returns the expression for a JSON column whose value may be JSON encoded as a text."""
    if schema.server_version < 160000:
        return column
    text = f"({column} #>> '{{}}')"
    return (
        f"(CASE WHEN jsonb_typeof({column}) = 'string' AND pg_input_is_valid({text}, 'jsonb') "
        f"THEN {text}::jsonb ELSE {column} END)"
    )
