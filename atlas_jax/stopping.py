"""Whether the run is to stop, for everything that waits.

A request to stop comes from a signal or from another process of the run. Whatever may take longer
than a few seconds looks for it: `check` between two pieces of work, `result` while a thread works.
"""

from __future__ import annotations

import concurrent.futures
import threading
from typing import TypeVar

T = TypeVar("T")

EXIT_CODE = 75
"""Of a run that was stopped before its end: EX_TEMPFAIL of sysexits.h, try the same again."""

_LOOK_SECS = 0.5
"""Longest time from a request to stop until a wait ends."""

# Signals belong to the whole process, so the request does too.
_reasons: list[str] = []
_requested = threading.Event()


class StopRequestedError(Exception):
    """The run is to stop; what was being made is given up."""


def request(reason: str) -> None:
    """Asks the run to stop.

    Args:
        reason: who asked, such as "SIGTERM"; the first one is kept.
    """
    _reasons.append(reason)
    _requested.set()


def requested() -> bool:
    """Returns whether somebody asked the run to stop."""
    return _requested.is_set()


def reset() -> None:
    """Forgets the requests, when a run has ended."""
    _requested.clear()
    _reasons.clear()


def check() -> None:
    """Raises `StopRequestedError` if the run is to stop."""
    if _requested.is_set():
        raise StopRequestedError(_reasons[0])


def sleep(secs: float) -> None:
    """Waits for so many seconds; raises `StopRequestedError` as soon as the run is to stop."""
    _requested.wait(secs)
    check()


def result(future: concurrent.futures.Future[T]) -> T:
    """Returns the result of a future, or cancels it as soon as the run is to stop.

    Raises:
        StopRequestedError: if the run is to stop before the result is there.
    """
    while True:
        done, _ = concurrent.futures.wait([future], timeout=_LOOK_SECS)
        if done:
            return future.result()
        if _requested.is_set():
            future.cancel()
            check()
