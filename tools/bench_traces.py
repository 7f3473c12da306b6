"""Speed and memory of reading sessions from a database; run by `tools/bench.py traces`."""

from __future__ import annotations

import argparse
import resource
import time

_EVENT_WORDS = "words of an event " * 20
_BATCH = 1000


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Fills the database if asked to, reads all of it, and returns the figures."""
    from atlas_jax import training_data  # needs the client of a database

    if args.fill:
        fill(args.database_url, args.fill, args.events)
    before, start, cpu = _peak_mib(), time.perf_counter(), time.process_time()
    sessions = steps = events = 0
    for session in training_data.iter_training_sessions(args.database_url):
        sessions += 1
        steps += len(session.steps)
        events += len(session.trajectory_events or ())
    wall_secs = time.perf_counter() - start
    return {
        "sessions": sessions,
        "steps": steps,
        "events": events,
        "sessions_s": sessions / wall_secs,
        "cpu_s": time.process_time() - cpu,
        "growth_mib": _peak_mib() - before,
    }


def fill(url: str, count: int, num_events: int) -> None:
    """Makes the runtime's tables in an empty database, with `count` sessions."""
    import psycopg

    from tests import runtime_database

    events = [runtime_database.event(k, f"{k} {_EVENT_WORDS}") for k in range(num_events)]
    with psycopg.connect(url) as connection:
        connection.execute(runtime_database.SCHEMA)
        for first in range(0, count, _BATCH):
            numbers = range(first, min(first + _BATCH, count))
            runtime_database.fill(
                connection, [runtime_database.session(i, events=events) for i in numbers]
            )
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    raise SystemExit("error: this is a part of tools/bench.py traces and no command; run that")
