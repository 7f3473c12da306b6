"""Snapshot of the sessions that a run read from the database, kept in its `output_dir`.

`data/sessions-NNNN.parquet` holds the records and is never written again; beside it, written last,
`sessions-NNNN.json` says what was asked, how far the database went then, and the file's hash. The
highest number counts.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from absl import logging

from atlas_jax import extras
from atlas_jax.files import replace_atomically, write_whole
from atlas_jax.options.data import DataConfig
from atlas_jax.traces import parser, postgres
from atlas_jax.traces.query import Query
from atlas_jax.traces.schema import AtlasSessionTrace

with extras.importing("postgres", "a snapshot of a database"):
    import pyarrow
    import pyarrow.parquet

_SCHEMA = pyarrow.schema(
    [("session_id", pyarrow.int64()), ("created_at", pyarrow.string()),
     ("status", pyarrow.string()), ("review_status", pyarrow.string()),
     ("record", pyarrow.large_string())]
)  # fmt: skip
_GROUP = 200  # records held at one time


def check(config: DataConfig, output_dir: str) -> None:
    """Checks that the database, or the snapshot that was made of it, can be trained on.

    Raises:
        ValueError: for filters that cannot be read, a database that does not answer them, and a
            snapshot that was made with others.
        ConnectionError: if the database cannot be reached.
    """
    query = Query.from_config(config)
    if not config.db_url or _current(config, output_dir):
        return
    database = postgres.open_database(config.db_url, query, _access(config))
    if postgres.count(database, query):
        return
    everything = postgres.count(database, Query())
    raise ValueError(
        f"none of {everything} sessions in {postgres.shown(config.db_url)} passes the filters "
        f"({query.described()}); change data.min_reward, data.status_filters or "
        "data.review_status_filters, or review the sessions"
    )


def take(config: DataConfig, output_dir: str) -> None:
    """Reads the database into a new snapshot, if there is none yet or `config.refresh` is set.

    Raises:
        ValueError: as `check`.
        OSError: if the database is lost on the way.
    """
    if _current(config, output_dir):
        return
    query = Query.from_config(config)
    folder = pathlib.Path(output_dir) / "data"
    number = len(list(folder.glob("sessions-*.json")))
    target = folder / f"sessions-{number:04d}.parquet"
    database = postgres.open_database(config.db_url, query, _access(config))
    records = postgres.read(database, query, config.max_sessions or None)
    with replace_atomically(target) as partial:
        total, newest = _write(partial, records)
    description = {
        "database": postgres.shown(config.db_url),
        "query": _asked(config),
        "watermark": {"session_id": database.last_id, "created_at": newest},
        "sessions": total,
        "sha256": _hash(target),
    }
    write_whole(target.with_suffix(".json"), json.dumps(description, indent=2) + "\n")
    logging.info("%d sessions of %s kept in %s", total, description["database"], target)


def read(output_dir: str) -> Iterator[tuple[str, AtlasSessionTrace | str]]:
    """Yields the sessions of the newest snapshot, or why one is rejected, with their names.

    Raises:
        ValueError: if there is no snapshot, or its file is not the one that was written.
    """
    latest = _latest(output_dir)
    if latest is None:
        raise ValueError(f"{output_dir}/data holds no snapshot of the database; start the run anew")
    path = latest.with_suffix(".parquet")
    if not path.is_file() or _hash(path) != _description(latest)["sha256"]:
        raise ValueError(f"{path} is not the file that {latest.name} describes; restore it")
    with pyarrow.parquet.ParquetFile(path) as table:
        for batch in table.iter_batches(_GROUP, columns=["session_id", "record"]):
            for row in batch.to_pylist():
                yield f"session {row['session_id']}", _parsed(row["record"])


def _current(config: DataConfig, output_dir: str) -> bool:
    """True if there is a snapshot that the run may use."""
    latest = _latest(output_dir)
    if latest is None or config.refresh:
        return False
    before = _description(latest)["query"]
    now = _asked(config)
    if before != now:
        changed = ", ".join(
            f"{k}={before.get(k)} (now {v})" for k, v in now.items() if before.get(k) != v
        )
        raise ValueError(
            f"{latest.with_suffix('.parquet')} was read with {changed}; restore that, read the "
            "database again with data.refresh=true, or choose another output_dir"
        )
    return True


def _latest(output_dir: str) -> pathlib.Path | None:
    return max(pathlib.Path(output_dir).glob("data/sessions-*.json"), default=None)


def _description(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _asked(config: DataConfig) -> dict[str, Any]:
    return Query.from_config(config).described() | {"max_sessions": config.max_sessions}


def _access(config: DataConfig) -> postgres.Access:
    return postgres.Access(statement_timeout_secs=config.statement_timeout_secs)


def _write(path: pathlib.Path, records: Iterator[dict[str, Any]]) -> tuple[int, str | None]:
    """Writes the records; returns how many there are, and the time of the newest."""
    total = 0
    newest = None
    rows = []
    with pyarrow.parquet.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
        for record in records:
            rows.append(_row(record))
            newest = newest or rows[0]["created_at"]
            total += 1
            if len(rows) == _GROUP:
                writer.write_table(pyarrow.Table.from_pylist(rows, _SCHEMA))
                rows = []
        writer.write_table(pyarrow.Table.from_pylist(rows, _SCHEMA))
    return total, newest


def _row(record: dict[str, Any]) -> dict[str, Any]:
    metadata = record["session_metadata"]
    shown = {name: metadata[name] for name in _SCHEMA.names[:-1]}
    return shown | {"record": json.dumps(record, ensure_ascii=False, separators=(",", ":"))}


def _parsed(record: str) -> AtlasSessionTrace | str:
    try:
        return parser.parse_line(record)
    except ValueError as error:
        return str(error)


def _hash(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
