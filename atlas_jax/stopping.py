"""Requests to stop a run: the signals that make them, and the checks of everything that waits.

SIGTERM, SIGINT, SIGHUP and SIGUSR1 (which schedulers send before the time is over) ask a run to
stop; so does another process of the run. The batch that is being made is given up, a step that the
devices compute is finished, and the state is saved. Whatever may take longer than a second looks
for the request: `check` between two pieces of work, `sleep` in place of `time.sleep`, `result`
while another thread works.

Python runs signal handlers between two instructions of the main thread, which may compile or wait
for minutes. So a thread of its own reads the signals from a pipe and answers them at once.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

from absl import logging

T = TypeVar("T")

EXIT_CODE = 75
"""Of a run that was stopped before its end: EX_TEMPFAIL of sysexits.h, try the same again."""

GRACE_SECS = 30.0
"""Time that everything but the save has to end, after the save."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_LOOK_SECS = 0.5  # longest time from a request to stop until a wait ends
_TWICE_SECS = 1.0  # a signal that comes sooner after another one is the same wish


class StopRequestedError(Exception):
    """The run is to stop; what was being made is given up."""


class _Process:
    """What this process does about signals; signals belong to a process, so there is one."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        self.reason = ""
        self.requested_at = 0.0
        self.trains = False  # there is a state to save
        self.saving = False
        self.owned = False  # the process is this program's own, to be ended by it

    def request(self, reason: str) -> None:
        if not self.requested.is_set():
            self.reason = reason
            self.requested_at = time.monotonic()
            self.requested.set()


_process = _Process()


def request(reason: str) -> None:
    """Asks the run to stop.

    Args:
        reason: who asked, such as "SIGTERM"; the first one is kept.
    """
    _process.request(reason)


def reason() -> str:
    """Returns who asked the run to stop; empty if nobody did."""
    return _process.reason


def requested() -> bool:
    """Returns whether somebody asked the run to stop."""
    return _process.requested.is_set()


def reset() -> None:
    """Forgets the request of a run that has ended."""
    _process.requested.clear()
    _process.reason = ""


def check() -> None:
    """Raises `StopRequestedError` if the run is to stop."""
    if _process.requested.is_set():
        raise StopRequestedError(_process.reason)


def sleep(secs: float) -> None:
    """Waits for so many seconds; raises `StopRequestedError` as soon as the run is to stop."""
    _process.requested.wait(secs)
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
        if _process.requested.is_set():
            future.cancel()
            check()


def listen() -> None:
    """Answers signals from now on, in a process that only runs this program.

    Until `training` there is nothing to save, and a signal ends the process.
    """
    _process.owned = True
    _Listener().start()


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Lets signals ask the run to stop, instead of ending the process.

    A request outlives it, so that what is still working gives up too; the next run forgets it.
    """
    reset()
    listener = None
    if not _process.owned and threading.current_thread() is threading.main_thread():
        listener = _Listener()
        listener.start()
    _process.trains = True
    try:
        yield
    finally:
        _process.trains = False
        if listener:
            listener.stop()


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Lets no signal cut the save short; the run stops after it."""
    _process.saving = True
    try:
        yield
    finally:
        _process.saving = False


def end_soon(code: int) -> None:
    """Ends the process with `code` after `GRACE_SECS`, whatever still hangs then.

    A process that is not this program's own, such as a notebook, goes on.
    """
    if not _process.owned:
        return

    def end() -> None:
        logging.error("not everything ended within %g s; ends all the same", GRACE_SECS)
        _exit(code)

    timer = threading.Timer(GRACE_SECS, end)
    timer.daemon = True
    timer.start()


class _Listener:
    """The thread that answers signals."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers: dict[int, object] = {}
        self._last_fd = -1
        self._thread = threading.Thread(target=self._run, daemon=True, name="signals")

    def start(self) -> None:
        """Takes the signals over; those that the caller ignores (nohup) stay ignored."""
        # The thread comes first: a signal that had a handler and no pipe yet would be lost.
        self._last_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread.start()
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if number != signal.SIGHUP or before != signal.SIG_IGN:
                self._handlers[number] = before
                # The handler itself does nothing, but the pipe gets signals that have one only.
                signal.signal(number, lambda *_: None)

    def stop(self) -> None:
        """Gives the signals back."""
        signal.set_wakeup_fd(self._last_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _run(self) -> None:
        while number := os.read(self._read, 1)[0]:
            if number in self._handlers:
                _answer(signal.Signals(number))


def _answer(number: signal.Signals) -> None:
    """Does what a signal asks for, and says so."""
    if _process.saving:
        _process.request(number.name)
        _say(f"{number.name}: stops when the state is saved; SIGKILL would lose it")
    elif not _process.requested.is_set():
        _process.request(number.name)
        if not _process.trains:
            _say(f"{number.name}: stopped; the same command starts again or continues")
            _exit(EXIT_CODE)
        _say(
            f"{number.name}: stops as soon as the step that computes is done, or at once where a "
            "batch is being made, and saves; the same command continues"
        )
    elif (
        number == signal.SIGINT
        and _process.owned
        and time.monotonic() - _process.requested_at > _TWICE_SECS
    ):
        _say("SIGINT again: ends without saving")
        _exit(128 + number)


def _say(line: str) -> None:
    """Logs a line; standard error may be closed or its reader gone."""
    with contextlib.suppress(OSError, ValueError):
        logging.warning("%s", line)


def _exit(code: int) -> None:
    """Ends the process without waiting for its threads."""
    with contextlib.suppress(OSError, ValueError):
        logging.flush()
        sys.stderr.flush()
    os._exit(code)
