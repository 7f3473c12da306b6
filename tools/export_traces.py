"""Writes sessions of the Atlas runtime as JSONL, one record a line, as the Atlas SDK exports them.

    python tools/export_traces.py [--database-url URL] --output traces.jsonl[.gz|.zst]

Without --database-url it is $ATLAS_DATABASE_URL, where no list of processes shows its password.
Approved sessions only, unless told otherwise; newest first. A kill leaves the old file or none.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import _checkout  # noqa: F401  (comes first: see there)

from atlas_jax import cli, extras
from atlas_jax.files import replace_atomically
from atlas_jax.traces.query import Query

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


def main() -> None:
    """Parses the arguments and exports."""
    parser = cli.ToolParser(__doc__)
    parser.add_argument(
        "--database-url",
        default=os.environ.get("ATLAS_DATABASE_URL", ""),
        help="postgresql://user:password@host/db",
    )
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--session-id", type=int, action="append", help="only this one; repeatable")
    parser.add_argument("--limit", type=int, help="sessions written, the newest")
    parser.add_argument("--offset", type=int, default=0, help="sessions passed over before")
    parser.add_argument("--status", action="append", default=[], help="such as succeeded")
    parser.add_argument("--min-reward", type=float, default=0.0)
    parser.add_argument(
        "--include-status", action="append", default=[], help="a review status beside approved"
    )
    parser.add_argument("--include-all-statuses", action="store_true", help="whatever the review")
    parser.add_argument("--trajectory-event-limit", type=int, default=200, help="events a session")
    parser.add_argument("--batch-size", type=int, default=150, help="sessions held at one time")
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()
    if not args.database_url:
        parser.error("--database-url is not given, and ATLAS_DATABASE_URL is not set")
    total = write(args.output, (json.dumps(r, ensure_ascii=False) for r in records(args)))
    if not args.quiet:
        print(f"{total} sessions written to {args.output}")
    if not total:
        sys.exit("no session passes the filters; see --include-status and --include-all-statuses")


def records(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the records that the arguments ask for."""
    from atlas_jax.traces import postgres  # here, so that an error of the import is one line

    reviewed = () if args.include_all_statuses else ("approved", *args.include_status)
    access = postgres.Access(
        page_size=args.batch_size, events_per_session=args.trajectory_event_limit
    )
    for number in args.session_id or [None]:
        query = Query(
            session_id=number,
            min_reward=args.min_reward,
            status_filters=tuple(args.status),
            review_status_filters=reviewed,
        )
        database = postgres.open_database(args.database_url, query, access)
        for record in postgres.read(database, query, args.limit, args.offset):
            if events := record.get("trajectory_events"):
                record["session_metadata"]["trajectory_events"] = events
            yield record


def write(path: pathlib.Path, lines: Iterator[str]) -> int:
    """Writes the lines, compressed as the name says, and returns how many there are."""
    with extras.importing("postgres", "an export of sessions"):
        import pyarrow

    total = 0
    compression = _COMPRESSION.get(path.suffix)
    with (
        replace_atomically(path) as partial,
        pyarrow.output_stream(str(partial), compression=compression) as stream,
    ):
        for line in lines:
            stream.write(f"{line}\n".encode())
            total += 1
    return total


if __name__ == "__main__":
    cli.tool(main)
