"""Signs of progress of a process, for the other processes of a run, which watch it.

A process that waits for servers or judges reaches no common point of the processes until it has
their answers. Each answer counts as a mark, and a wait with a limit of its own announces the limit.
Only a process without either counts as stuck.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_marks = [0]
_waits: list[float] = []


def mark() -> None:
    """Counts an answer that this process waited for, or a text that it has written."""
    with _lock:
        _marks[0] += 1


def marks() -> int:
    """Returns the number of marks so far."""
    return _marks[0]


@contextlib.contextmanager
def waiting(secs: float) -> Iterator[None]:
    """Announces that the block may take `secs` seconds, by a limit of its own."""
    with _lock:
        _waits.append(secs)
    try:
        yield
    finally:
        with _lock:
            _waits.remove(secs)
        mark()


def patience() -> float:
    """Returns the seconds that the current waits may take; 0 without a wait."""
    with _lock:
        return max(_waits, default=0.0)
