"""The program that runs a user's sync reward function, in processes that it kills when they hang.

It imports the function's module once and forks a pool of processes from itself, so that a new one
is ready at once where one was killed, and none of them knows JAX. Calls come in on standard input,
outcomes go out as lines of JSON on standard output; what the function prints goes to standard
error. It ends with its input, also when the run is killed, and kills all that the function started.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import pebble

from atlas_jax import sockets
from atlas_jax.rewards import forms

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


class WorkerSettings(NamedTuple):
    """The first message that the program reads."""

    reference: str  # package.module:function
    timeout_secs: float  # of a call
    num_workers: int
    path: list[str]  # sys.path of the run


class _Streams(NamedTuple):
    """Descriptors that the processes of the pool must not keep."""

    requests: int
    replies: int


def main() -> None:
    """Answers calls until the input ends."""
    streams = _claim_streams()
    requests = os.fdopen(streams.requests, "rb", closefd=False)
    settings = WorkerSettings(*pickle.load(requests))
    sys.path[:] = settings.path
    function, error = sockets.attempt(sockets.resolve, settings.reference, "reward.names")
    form = None if error else forms.form_of(function, settings.reference)
    os.write(streams.replies, json.dumps({"error": error}).encode() + b"\n")
    if form is None:
        return
    groups = _Groups()
    pool = pebble.ProcessPool(
        max_workers=settings.num_workers,
        context=multiprocessing.get_context("fork"),
        initializer=_enter,
        initargs=(streams, groups, function, form),
    )
    replies = _Replies(streams.replies, groups, settings.timeout_secs)
    for number, payload in _calls(requests):
        future = pool.schedule(_score, args=(payload,), timeout=settings.timeout_secs)
        future.add_done_callback(replies.sender(number))
    groups.kill()
    os._exit(0)  # the threads of the pool would wait for calls


def _claim_streams() -> _Streams:
    """Takes standard input and output for the messages; the function gets others."""
    streams = _Streams(os.dup(0), os.dup(1))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return streams


def _calls(requests: BinaryIO) -> Any:
    """Yields the number and the pickled samples of each call."""
    with contextlib.suppress(EOFError, pickle.UnpicklingError):
        while True:
            yield pickle.load(requests)


class _Groups:
    """The process groups of the pool, which hold what the function starts besides."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        self._leaders: set[int] = set()
        self._lock = threading.Lock()

    def join(self) -> None:
        """Makes this process the leader of a group, in the process itself."""
        os.setpgid(0, 0)
        os.write(self._write, os.getpid().to_bytes(8, "little"))
        os.close(self._read)
        os.close(self._write)

    def kill(self, only_dead: bool = False) -> None:
        """Kills the groups, or those whose leader is dead."""
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                while number := os.read(self._read, 8):
                    self._leaders.add(int.from_bytes(number, "little"))
            for leader in [pid for pid in self._leaders if not (only_dead and _is_alive(pid))]:
                self._leaders.remove(leader)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(leader, signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class _Replies:
    """Writes outcomes, from whatever thread knows them."""

    def __init__(self, descriptor: int, groups: _Groups, timeout_secs: float) -> None:
        self._descriptor = descriptor
        self._groups = groups
        self._timeout_secs = timeout_secs
        self._lock = threading.Lock()

    def sender(self, number: int) -> Callable[[Any], None]:
        """Returns the function that writes the outcome of a call when it is done."""
        return lambda future: self._send(number, self._outcome(future))

    def _outcome(self, future: Any) -> forms.FunctionResult:
        error = future.exception()
        if error is None:
            return future.result()
        self._groups.kill(only_dead=True)
        if isinstance(error, TimeoutError):
            return forms.FunctionResult([], forms.overdue(self._timeout_secs))
        if isinstance(error, pebble.ProcessExpired):
            return forms.FunctionResult([], f"its process ended with code {error.exitcode}")
        return forms.FunctionResult([], sockets.describe(error))

    def _send(self, number: int, outcome: forms.FunctionResult) -> None:
        line = json.dumps({"call": number, **outcome._asdict()}).encode() + b"\n"
        with self._lock, contextlib.suppress(BrokenPipeError):
            while line:
                line = line[os.write(self._descriptor, line) :]


class _PoolProcess:
    """Function and form that a process of the pool works with."""

    function: forms.UserFunction
    form: forms.Form


_worker = _PoolProcess()
"""A process of the pool works for one function, and is told no more of it with each call."""


def _enter(
    streams: _Streams, groups: _Groups, function: forms.UserFunction, form: forms.Form
) -> None:
    """Begins a process of the pool."""
    if sys.platform == "linux":  # a program that was killed itself could not end its pool
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    for descriptor in streams:
        os.close(descriptor)
    groups.join()
    _worker.function = function
    _worker.form = form


def _score(payload: bytes) -> forms.FunctionResult:
    """Returns the outcome of a call, in a process of the pool."""
    return forms.call(_worker.function, _worker.form, pickle.loads(payload))


if __name__ == "__main__":
    main()
