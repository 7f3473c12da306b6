"""Requests to stop a run: the signals that make them, and checks for them.

SIGTERM, SIGINT, SIGHUP and SIGUSR1 (which schedulers send before a time limit) ask a run to stop;
so does another process of the run. A batch in preparation is given up, a step that the devices
compute is finished, and the state is saved. Code that may take longer than a second checks for a
request: with `check` between two pieces of work, with `sleep` instead of `time.sleep`, and with
`result` while another thread works.

Python runs signal handlers between two instructions of the main thread, which may compile or wait
for minutes. A separate thread therefore reads the signals from a pipe and answers them at once.
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
"""Exit code of a run that was stopped before its end: EX_TEMPFAIL of sysexits.h, try again."""

GRACE_SECS = 30.0
"""Seconds that everything else has to end after the state was saved."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_LOOK_SECS = 0.5  # longest time from a request to stop until a wait ends
_TWICE_SECS = 1.0  # a second signal within this time belongs to the first


class StopRequestedError(Exception):
    """Raised in code that gives up its work because the run was asked to stop."""


class _Process:
    """Signal state of this process. There is one instance, because signals go to a process."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        self.reason = ""
        self.requested_at = 0.0
        self.trains = False  # whether there is a state to save
        self.saving = False
        self.owned = False  # whether the process runs only this program, which may then end it

    def request(self, reason: str) -> None:
        if not self.requested.is_set():
            self.reason = reason
            self.requested_at = time.monotonic()
            self.requested.set()


_process = _Process()


def request(reason: str) -> None:
    """Asks the run to stop.

    Args:
        reason: the origin of the request, such as "SIGTERM"; the first one is kept.
    """
    _process.request(reason)


def reason() -> str:
    """Returns the origin of the request to stop; empty without a request."""
    return _process.reason


def requested() -> bool:
    """Returns whether the run was asked to stop."""
    return _process.requested.is_set()


def reset() -> None:
    """Forgets the request of a run that has ended."""
    _process.requested.clear()
    _process.reason = ""


def check() -> None:
    """Raises `StopRequestedError` if the run was asked to stop."""
    if _process.requested.is_set():
        raise StopRequestedError(_process.reason)


def sleep(secs: float) -> None:
    """Waits `secs` seconds; raises `StopRequestedError` as soon as the run is asked to stop."""
    _process.requested.wait(secs)
    check()


def result(future: concurrent.futures.Future[T]) -> T:
    """Returns the result of a future, or cancels it as soon as the run is asked to stop.

    Raises:
        StopRequestedError: if the run is asked to stop before the future is done.
    """
    while True:
        done, _ = concurrent.futures.wait([future], timeout=_LOOK_SECS)
        if done:
            return future.result()
        if _process.requested.is_set():
            future.cancel()
            check()


def listen() -> None:
    """Starts to answer signals, in a process that only runs this program.

    Before `training` nothing has to be saved, and a signal ends the process.
    """
    _process.owned = True
    _Listener().start()


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Makes signals ask the run to stop, instead of ending the process.

    A request outlives the block, so that threads which are still working give up too. The next run
    resets it.
    """
    # A request to stop the last run of this process, such as a notebook, is not one for this run.
    reset()
    listener = None
    # Python sets signal handlers in the main thread only.
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
    """Keeps signals from interrupting the save; the run stops after it."""
    _process.saving = True
    try:
        yield
    finally:
        _process.saving = False


def end_soon(code: int) -> None:
    """Ends the process with `code` after `GRACE_SECS`, even if threads still hang then.

    A process that does not belong to this program, such as a notebook, is left running.
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
        os.set_blocking(self._write, False)  # as `signal.set_wakeup_fd` requires
        self._handlers: dict[int, object] = {}
        self._last_fd = -1
        self._thread = threading.Thread(target=self._run, daemon=True, name="signals")

    def start(self) -> None:
        """Takes the signals over; a signal that the caller ignores (nohup) stays ignored."""
        # The thread comes first: a signal with a handler but no pipe yet would be lost.
        self._last_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread.start()
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if number != signal.SIGHUP or before != signal.SIG_IGN:
                self._handlers[number] = before
                # The handler does nothing, but Python writes only handled signals to the pipe.
                signal.signal(number, lambda *_: None)

    def stop(self) -> None:
        """Gives the signals back."""
        signal.set_wakeup_fd(self._last_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.write(self._write, b"\0")  # no signal has the number 0, so it ends the thread
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _run(self) -> None:
        while number := os.read(self._read, 1)[0]:
            if number in self._handlers:
                _answer(signal.Signals(number))


def _answer(number: signal.Signals) -> None:
    """Carries out a signal's request, and logs it."""
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
    # A person who presses Ctrl-C again wants the end now. Schedulers repeat their other signals.
    elif (
        number == signal.SIGINT
        and _process.owned
        and time.monotonic() - _process.requested_at > _TWICE_SECS
    ):
        _say("SIGINT again: ends without saving")
        _exit(128 + number)


def _say(line: str) -> None:
    """Logs a line, even if standard error is closed or has no reader any more."""
    with contextlib.suppress(OSError, ValueError):
        logging.warning("%s", line)


def _exit(code: int) -> None:
    """Ends the process without waiting for its threads."""
    with contextlib.suppress(OSError, ValueError):
        logging.flush()
        sys.stderr.flush()
    os._exit(code)
