"""Signs that a process gets on, for the other processes of a run that watch it.

A process that waits for servers or judges comes to no place where the others meet, for as long as
their answers take. Each answer is a mark, and a wait with a limit of its own says how long it may
take; only a process without either is held to be stuck.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_marks = [0]
_waits: list[float] = []


def mark() -> None:
    """Notes that something that was waited for has come."""
    with _lock:
        _marks[0] += 1


def marks() -> int:
    """Returns how many marks there were."""
    return _marks[0]


@contextlib.contextmanager
def waiting(secs: float) -> Iterator[None]:
    """Says that what happens inside may take so many seconds by a limit of its own."""
    with _lock:
        _waits.append(secs)
    try:
        yield
    finally:
        with _lock:
            _waits.remove(secs)
        mark()


def patience() -> float:
    """Returns the seconds that the present waits may take; 0 where there is none."""
    with _lock:
        return max(_waits, default=0.0)
