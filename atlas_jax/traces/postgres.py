"""Sessions from the runtime's PostgreSQL database, newest first.

A read is one read-only transaction on one snapshot, in pages by `(created_at, id)`; what belongs
to the sessions of a page comes in one statement a table. When the connection breaks, the read goes
on after the last session, without those that arrived since it began. Nothing is written, and no
right but SELECT is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

from absl import logging

from atlas_jax import extras, masking
from atlas_jax.traces import postgres_sql
from atlas_jax.traces.postgres_sql import Page, Schema
from atlas_jax.traces.query import Query
from atlas_jax.traces.records import Event, session_record

with extras.importing("postgres", "a database of sessions"):
    import psycopg
    from psycopg.conninfo import conninfo_to_dict
    from psycopg.rows import dict_row, tuple_row
    from psycopg.types.string import ByteaBinaryLoader, TextBinaryLoader

_LOST = ("08", "57P", "53300", "25P03", "40001")  # sqlstates after which a new connection may help
_RETRY_PAUSE_SECS = 0.5
_CONNECTING = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10,
               "keepalives_count": 3, "application_name": "atlas_jax"}  # fmt: skip

_OTHER_TYPES = 0  # those that psycopg does not know, such as enumerations


@dataclasses.dataclass(frozen=True)
class Access:
    """Manner of reading a database."""

    statement_timeout_secs: float = 30.0
    page_size: int = 150
    """Sessions that are held at one time."""
    events_per_session: int = 200
    """Events kept of a session, the newest."""
    retry_secs: float = 60.0
    """Seconds for which a broken connection is made again."""


class Database(NamedTuple):
    """A database that was found to be readable."""

    url: str
    schema: Schema
    last_id: int
    """The newest session when it was opened."""
    access: Access


class _EventRange(NamedTuple):
    """Where the events of a page lie."""

    first: int
    last: int
    most: int
    """Events of the session that has the most."""


class _Fetched(NamedTuple):
    """Sessions of a page, and by session id what belongs to them."""

    rows: Sequence[dict[str, Any]]
    steps: Mapping[int, Sequence[dict[str, Any]]]
    events: Mapping[int, list[Event]]
    is_last: bool

    def behind(self, page: Page, count: int) -> Page:
        """Returns the page that begins after the first `count` of these sessions."""
        last = self.rows[count - 1]
        left = None if page.limit is None else page.limit - count
        return page._replace(limit=left, offset=0, after=(last["created_at"], last["id"]))


def open_database(url: str, query: Query, access: Access | None = None) -> Database:
    """Checks that a database can answer a query, and returns it.

    Args:
        url: such as `postgresql://user:password@host:5432/database`.
        query: what will be read.
        access: sizes and times.

    Raises:
        ValueError: for a database that is not the runtime's, that is too old for the query, or
            whose tables this role may not read.
        ConnectionError: if it cannot be reached, or refuses the user.
    """
    access = access or Access()
    parsed(url)
    try:
        with _snapshot(url, access) as connection:
            # Reads no row, but fails if a table is missing or may not be read.
            for table in postgres_sql.TABLES:
                connection.execute(f"SELECT FROM {table} LIMIT 0")
            columns = {row["attname"] for row in connection.execute(postgres_sql.COLUMNS)}
            newest = connection.execute("SELECT coalesce(max(id), 0) AS id FROM sessions")
            last_id = next(iter(newest))["id"]
            version = connection.info.server_version
    except psycopg.Error as error:
        raise explained(error, url) from None
    if missing := postgres_sql.missing_columns(query, columns):
        raise ValueError(
            f"the sessions of {shown(url)} are older than the column {', '.join(missing)}, which "
            "filters ask for; connect the Atlas SDK once, which adds it, or leave the filter out "
            "(--config.data.review_status_filters='()')"
        )
    return Database(
        url=url, schema=Schema(frozenset(columns), version), last_id=last_id, access=access
    )


def read(
    database: Database, query: Query, limit: int | None = None, offset: int = 0
) -> Iterator[dict[str, Any]]:
    """Yields the record of each session that the query matches, newest first.

    Args:
        database: as `open_database` returned it; sessions that arrived since are left out.
        query: which sessions, and whether with events.
        limit: sessions at most; None takes all.
        offset: sessions passed over before.

    Raises:
        ConnectionError: if a broken connection cannot be made again in time.
        TimeoutError: if a statement takes too long even for a single session.
        ValueError: for what else the server refuses.
    """
    for name, value in (("limit", limit), ("offset", offset)):
        if value is not None and (type(value) is not int or value < 0):
            raise ValueError(f"{name}={value!r} must be 0 or more")
    page = Page(limit, offset, last_id=database.last_id)
    give_up = None
    while page.limit != 0:
        try:
            for record, behind in _pages(database, query, page):
                yield record
                # After each record, so that a new connection continues with the next one.
                page = behind
                give_up = None
            return
        except psycopg.errors.QueryCanceled as error:
            if database.access.page_size == 1:
                raise explained(error, database.url) from None
            database = database._replace(access=_smaller(database.access))
        except psycopg.Error as error:
            give_up = give_up or time.monotonic() + database.access.retry_secs
            if not _is_lost(error) or time.monotonic() > give_up:
                raise explained(error, database.url) from None
            logging.warning("lost the connection to %s; connecting again", shown(database.url))
            time.sleep(_RETRY_PAUSE_SECS)


def count(database: Database, query: Query) -> int:
    """Returns how many sessions the query matches."""
    try:
        with _snapshot(database.url, database.access) as connection:
            found = connection.execute(*postgres_sql.count(query, database.schema))
            return next(iter(found))["count"]
    except psycopg.Error as error:
        raise explained(error, database.url) from None


def parsed(url: str) -> dict[str, Any]:
    """Returns the parts of a connection URL.

    Raises:
        ValueError: if it is none; shows nothing of it, because a password may stand anywhere.
    """
    try:
        parts = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        parts = {}
    host = str(parts.get("host", ""))
    port = str(parts.get("port", ""))
    # A password that was not encoded ends up in part as the host or as the port.
    if not parts or "@" in host[1:] or not re.fullmatch(r"[\d,]*", port):
        raise ValueError(
            "the database URL cannot be read; write postgresql://USER:PASSWORD@HOST:5432/DATABASE, "
            "with %40 for @, %2F for / and %3A for : in the password"
        )
    return parts


def shown(url: str) -> str:
    """Returns what may be shown of a connection URL."""
    parts = parsed(url)
    user = parts.get("user", "")
    name = parts.get("dbname", "")
    # libpq takes a whole URL as the name of the database, too.
    return masking.hide(f"{user}@{parts.get('host', 'localhost')}:{parts.get('port', 5432)}/{name}")


def explained(error: psycopg.Error, url: str) -> Exception:
    """Returns the error that a user is shown in place of the driver's."""
    text = str(error).strip()
    state = error.sqlstate or ""
    where = shown(url)
    if password := parsed(url).get("password"):
        text = text.replace(password, masking.HIDDEN)
    first = text.partition("\n")[0]
    text = " ".join(masking.hide(text).split())
    if state == "42P01":
        return ValueError(
            f"{where} is not a database of the Atlas SDK ({masking.hide(first)}); check the name "
            "of the database in data.db_url"
        )
    if state == "42501":
        return ValueError(
            f"the role of {where} may not read it ({masking.hide(first)}); let its owner run "
            "GRANT SELECT ON ALL TABLES IN SCHEMA public TO …"
        )
    if state == "57014":
        return TimeoutError(
            f"{where} takes too long ({text}); raise data.statement_timeout_secs, or have an index "
            "made on trajectory_events (session_id)"
        )
    if _is_lost(error):
        return ConnectionError(
            f"{where} cannot be read: {text}; check that the server runs, and the host, user and "
            "password of data.db_url"
        )
    return ValueError(f"{where} refuses the query: {text}; check the filters and the database")


def _is_lost(error: psycopg.Error) -> bool:
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return error.sqlstate.startswith(_LOST)


def _smaller(access: Access) -> Access:
    smaller = dataclasses.replace(access, page_size=max(access.page_size // 8, 1))
    logging.warning("a statement took too long; trying pages of %d sessions", smaller.page_size)
    return smaller


@contextlib.contextmanager
def _snapshot(url: str, access: Access) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """Opens a read-only transaction whose statements all see one state of the database."""
    options: dict[str, Any] = {k: v for k, v in _CONNECTING.items() if k not in parsed(url)}
    # Without prepared statements it works through a pooler, too.
    with psycopg.connect(
        url, row_factory=dict_row, prepare_threshold=None, client_encoding="utf8", **options
    ) as connection:
        # Of the binary format. JSON is decoded later, so that a page that waits is small; `jsonb`
        # stays bytes, by which `values` tells it from a text.
        connection.adapters.register_loader("jsonb", ByteaBinaryLoader)
        connection.adapters.register_loader("json", TextBinaryLoader)
        connection.adapters.register_loader(_OTHER_TYPES, TextBinaryLoader)
        connection.read_only = True
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        milliseconds = str(round(access.statement_timeout_secs * 1000))
        for name, value in (("statement_timeout", milliseconds), ("timezone", "UTC")):
            connection.execute("SELECT set_config(%s, %s, true)", (name, value))
        yield connection


def _pages(database: Database, query: Query, page: Page) -> Iterator[tuple[dict[str, Any], Page]]:
    """Yields each record, and the page that comes after it; one page is fetched ahead."""
    with (
        _snapshot(database.url, database.access) as connection,
        futures.ThreadPoolExecutor(1) as background,
    ):
        ranges = _event_ranges(connection, database, query, page)
        fetch = functools.partial(_fetch, connection, database, query, ranges)
        ahead = background.submit(fetch, page, 0)
        for number in itertools.count(1):
            fetched = ahead.result()
            if not fetched.is_last:
                ahead = background.submit(fetch, fetched.behind(page, len(fetched.rows)), number)
            for i, row in enumerate(fetched.rows, start=1):
                steps = fetched.steps.get(row["id"], ())
                events = fetched.events.get(row["id"])
                yield session_record(row, steps, events), fetched.behind(page, i)
            if fetched.is_last:
                return
            page = fetched.behind(page, len(fetched.rows))


def _fetch(
    connection: psycopg.Connection[dict[str, Any]],
    database: Database,
    query: Query,
    ranges: Mapping[int, _EventRange],
    page: Page,
    number: int,
) -> _Fetched:
    """Returns the sessions of a page, and what belongs to them."""
    size = database.access.page_size
    wanted = size if page.limit is None else min(size, page.limit)
    statement = postgres_sql.sessions(query, database.schema, page._replace(limit=wanted))
    rows = connection.execute(*statement, binary=True).fetchall()
    ids = [row["id"] for row in rows]
    events = _events(connection, ids, ranges.get(number), database.access)
    is_last = len(rows) < wanted or wanted == page.limit
    return _Fetched(rows=rows, steps=_steps(connection, ids), events=events, is_last=is_last)


def _event_ranges(
    connection: psycopg.Connection[dict[str, Any]], database: Database, query: Query, page: Page
) -> dict[int, _EventRange]:
    """Returns where the events of each page lie; pages without events are absent."""
    if not query.include_trajectory_events:
        return {}
    statement = postgres_sql.event_ranges(query, database.schema, page, database.access.page_size)
    rows = connection.execute(*statement)
    return {row["number"]: _EventRange(row["first"], row["last"], row["most"]) for row in rows}


def _steps(
    connection: psycopg.Connection[dict[str, Any]], ids: Sequence[int]
) -> dict[int, list[dict[str, Any]]]:
    values = {"ids": ids}
    attempts = defaultdict(list)
    notes = defaultdict(list)
    for row in connection.execute(postgres_sql.ATTEMPTS, values, binary=True):
        attempt = {"attempt": row["attempt"], "evaluation": row["evaluation"]}
        attempts[row["session_id"], row["step_id"]].append(attempt)
    for row in connection.execute(postgres_sql.GUIDANCE, values, binary=True):
        notes[row["session_id"], row["step_id"]].append(row["note"])
    steps = defaultdict(list)
    for row in connection.execute(postgres_sql.STEPS, values, binary=True):
        key = row["session_id"], row["step_id"]
        own = {"attempt_details": attempts.get(key, []), "guidance_notes": notes.get(key, [])}
        steps[row["session_id"]].append(row | own)
    return steps


def _events(
    connection: psycopg.Connection[dict[str, Any]],
    ids: Sequence[int],
    span: _EventRange | None,
    access: Access,
) -> dict[int, list[Event]]:
    """Returns the newest events of each session, oldest first."""
    if span is None:
        return {}
    limit = access.events_per_session
    values = {"ids": ids, "first": span.first, "last": span.last, "limit": limit}
    # Choosing the newest costs the database a sort, which most sessions do not need.
    too_many = span.most > limit
    statement = postgres_sql.NEWEST_EVENTS if too_many else postgres_sql.EVENTS
    events: dict[int, list[Event]] = defaultdict(list)
    with connection.cursor(binary=True, row_factory=tuple_row) as cursor:
        for event in cursor.execute(statement, values).fetchall():
            events[event[0]].append(event)
    for own in events.values():
        own.sort()  # by id, which no other event has
    return events
