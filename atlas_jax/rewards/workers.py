"""Worker processes for a user's sync reward function; `worker_program` is what they run."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence

from atlas_jax import stopping
from atlas_jax.rewards import worker_program
from atlas_jax.rewards.forms import CLOSED, FunctionResult
from atlas_jax.types import Sample

_LOOK_SECS = 0.5  # longest time from a request to stop until a wait ends
_PATIENCE_SECS = 30.0  # with a program that should have killed a call by itself
_END_SECS = 2.0  # that the program has to kill its processes
_CHUNK = 1 << 16


class Workers:
    """Processes that call one function, started with the first call and again if they have died.

    Any thread may call; one batch is worked on at a time.
    """

    def __init__(self, reference: str, timeout_secs: float, num_workers: int) -> None:
        """Starts nothing yet.

        Args:
            reference: `package.module:function`.
            timeout_secs: the time after which a call is killed.
            num_workers: calls at one time.
        """
        self._settings = worker_program.WorkerSettings(
            reference=reference, timeout_secs=timeout_secs, num_workers=num_workers, path=[]
        )
        self._program: _RunningProgram | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()

    def run(self, calls: Sequence[Sequence[Sample]]) -> list[FunctionResult]:
        """Returns the outcome of each call, given the samples of each.

        Raises:
            StopRequestedError: if the run is to stop; the calls are killed.
        """
        with self._lock:
            if self._closed.is_set():
                return [FunctionResult([], CLOSED)] * len(calls)
            try:
                return self._run(calls)
            except stopping.StopRequestedError:
                self._end_program()
                raise

    def close(self) -> None:
        """Kills the processes; calls of other threads fail, and so do later ones."""
        self._closed.set()
        with self._lock:  # a call in progress looks at the event
            self._end_program()

    def _end_program(self) -> None:
        if self._program is not None:
            self._program.close()
            self._program = None

    def _run(self, calls: Sequence[Sequence[Sample]]) -> list[FunctionResult]:
        if self._program is None:
            self._program = _RunningProgram(
                self._settings._replace(path=[p or os.getcwd() for p in sys.path]), self._closed
            )
        outcomes: dict[int, FunctionResult] = {}
        error = self._program.wait_until_ready()
        for number, samples in enumerate(calls):
            try:
                payload = pickle.dumps(list(samples))
            except (AttributeError, TypeError, ValueError, pickle.PicklingError) as unsent:
                outcomes[number] = FunctionResult(
                    [], f"the row cannot be sent to a process: {unsent}"
                )
            else:
                error = error or self._program.send(number, payload)
        while len(outcomes) < len(calls) and not error:
            done, error = self._program.receive(self._settings.timeout_secs + _PATIENCE_SECS)
            outcomes |= done
        if error:
            self._end_program()
        return [outcomes.get(number) or FunctionResult([], error) for number in range(len(calls))]


class _RunningProgram:
    """The running program, and what it has said so far."""

    def __init__(self, settings: worker_program.WorkerSettings, closed: threading.Event) -> None:
        self._closed = closed  # a set event ends a wait for the program
        self._process = subprocess.Popen(
            [sys.executable, "-m", "atlas_jax.rewards.worker_program"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},  # the devices are the run's
            start_new_session=True,  # Ctrl-C is for the run, which closes the pipe
        )
        self._buffer = b""
        self._is_ready = False
        self.close = weakref.finalize(self, _end, self._process)
        self._write(pickle.dumps(tuple(settings)))

    def wait_until_ready(self) -> str:
        """Returns "" when the function is imported there, else what is wrong."""
        if self._is_ready:
            return ""
        lines, error = self._lines(float("inf"))
        self._is_ready = True
        return error or str(lines[0]["error"])

    def send(self, number: int, payload: bytes) -> str:
        """Sends a call; returns what is wrong, "" for nothing."""
        return self._write(pickle.dumps((number, payload)))

    def receive(self, patience_secs: float) -> tuple[dict[int, FunctionResult], str]:
        """Returns the calls that are done, some at least, and what is wrong, "" for nothing."""
        lines, error = self._lines(patience_secs)
        return {
            line["call"]: FunctionResult(line["values"], line["error"]) for line in lines
        }, error

    def _write(self, message: bytes) -> str:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
        except BrokenPipeError:
            return "its worker processes have ended"
        return ""

    def _lines(self, patience_secs: float) -> tuple[list[dict], str]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        end = time.monotonic() + patience_secs
        while b"\n" not in self._buffer:
            stopping.check()
            if self._closed.is_set():
                return [], CLOSED
            if select.select([descriptor], [], [], _LOOK_SECS)[0]:
                chunk = os.read(descriptor, _CHUNK)
                if not chunk:
                    return [], "its worker processes have ended"
                self._buffer += chunk
            elif time.monotonic() > end:
                return [], "its worker processes do not answer"
        *lines, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in lines], ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the program, which kills its processes when its input ends."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_END_SECS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process.stdout.close()
