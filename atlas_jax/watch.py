"""Mutual watch of a run's processes, so that none waits for ever for one that has ended.

Every process publishes a note in JAX's coordination service, with a heartbeat and its progress, and
reads the notes of the others. A run ends, in every process and with the same message, when one

1. failed: its note has the reason,
2. has no heartbeat: it was killed, stopped or cut off,
3. has not reached the point at which the others wait for it, and has made no other progress
   (`progress`), within the limit and the patience that it asked for.

A signal to one process asks all of them to stop: its note passes the request on.

Timeouts count polling rounds instead of seconds, so a process that is merely short of CPU is not
declared dead.

JAX's own heartbeats, with a longer limit, are the second line of defence. They end a process whose
Python is stuck, and end all others at once when process 0 dies, which holds the service.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn, Protocol, runtime_checkable

import jax
from absl import logging

from atlas_jax import progress, stopping

_FOLDER = "atlas_jax/notes"
_LONGEST_INTERVAL_SECS = 5.0
_SYMPTOMS = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED")
"""Texts in the errors that a process gets when another process has ended."""


class WatchLimits(NamedTuple):
    """Limits for a process, in seconds: of its silence, and of the time that others wait for it."""

    heartbeat_secs: float
    stall_secs: float

    @property
    def interval_secs(self) -> float:
        """Seconds between two notes of a process."""
        return min(_LONGEST_INTERVAL_SECS, self.heartbeat_secs / 4)


class Note(NamedTuple):
    """The state of a process, as it publishes it to the others."""

    host: str
    beat: int = 0
    """Heartbeat: a number that grows while the process lives."""
    arrivals: int = 0
    """Number of points reached at which processes wait for each other; all reach the same ones."""
    place: str = "the start"
    """The last of those points that has a name."""
    left: bool = False
    """True after the process has finished."""
    verdict: str = ""
    """Reason for the end of the run; empty while it continues."""
    marks: int = 0
    """Number of answers that the process waited for and got; see `progress`."""
    patience: float = 0.0
    """Seconds that its current wait may take by a limit of its own."""
    stop: str = ""
    """Origin of a request to stop; empty without one."""


class Seen(NamedTuple):
    """A process's latest note, with the polling rounds since its last heartbeat and progress."""

    note: Note
    silent: int = 0
    still: int = 0


@runtime_checkable
class CoordinationService(Protocol):
    """The methods of JAX's coordination service that are used here."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Sets a value for all processes."""

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """Returns the keys of a folder with their values."""


def updated(seen: Mapping[int, Seen], notes: Mapping[int, Note]) -> dict[int, Seen]:
    """Returns the record of each process after another polling round."""
    result = {}
    for process, before in seen.items():
        note = notes.get(process, before.note)
        result[process] = Seen(
            note,
            before.silent + 1 if note.beat == before.note.beat else 0,
            before.still + 1 if _moves(note) == _moves(before.note) else 0,
        )
    return result


def _moves(note: Note) -> tuple[int, int]:
    return note.arrivals, note.marks


def judge(seen: Mapping[int, Seen], limits: WatchLimits) -> str:
    """Returns the reason for which the run must end; "" if it continues."""
    for record in seen.values():
        if record.note.verdict:
            return record.note.verdict
    # A process that has finished sends no more notes; that must not count as silence.
    present = {process: record for process, record in seen.items() if not record.note.left}
    for process, record in present.items():
        silent = record.silent * limits.interval_secs
        if silent > limits.heartbeat_secs:
            return (
                f"process {process} on {record.note.host} has given no sign of life for "
                f"{silent:.0f} s (hosts.heartbeat_timeout_secs={limits.heartbeat_secs:g}); it "
                f"was killed, stopped or cut off after {record.note.place}"
            )
    if not present:
        return ""
    # The processes with the fewest arrivals hold up all others, whatever those are doing.
    first = min(s.note.arrivals for s in present.values())
    slowest = {process: s for process, s in present.items() if s.note.arrivals == first}
    patience = max(record.note.patience for record in slowest.values())
    limit = limits.stall_secs + patience
    # As long as any process makes progress, the run as a whole is not stuck.
    if min(record.still for record in present.values()) * limits.interval_secs <= limit:
        return ""
    names = ", ".join(f"process {p} on {s.note.host}" for p, s in slowest.items())
    places = " and ".join(sorted({s.note.place for s in slowest.values()}))
    others = "the others wait" if len(slowest) < len(present) else "so have all others"
    return (
        f"{names} has not moved on from {places} for {limit:g} s (hosts.stall_timeout_secs"
        f"{f', and {patience:g} s that its wait may take' if patience else ''}), {others}; look at "
        "its stack, or raise the limit"
    )


class Watch:
    """The note of this process, and the threads that publish it and judge the others."""

    def __init__(
        self, service: CoordinationService, process: int, num_processes: int, limits: WatchLimits
    ) -> None:
        """Creates the watch; `start` starts it."""
        self._service = service
        self._process = process
        self._limits = limits
        self._note = Note(socket.gethostname())
        unknown = Note("a host that has not told its name")
        self._seen = {p: Seen(unknown) for p in range(num_processes)}
        self._unanswered = 0  # polling rounds since the service answered
        self._lock = threading.Lock()
        self._over = threading.Event()

    def start(self) -> None:
        """Starts the watch, which runs until the process ends."""
        # Two threads, since a call to a service that is cut off may block the first one.
        for loop in (self._tell_and_judge, self._watch_service):
            threading.Thread(target=loop, daemon=True, name=f"watch{loop.__name__}").start()

    def arrive(self, place: str = "") -> None:
        """Records that this process has reached a point that all processes reach."""
        with self._lock:
            arrivals = self._note.arrivals + 1
            place = place or self._note.place
            self._note = self._note._replace(arrivals=arrivals, place=place)

    def leave(self) -> None:
        """Records that this process has finished, and ends the watch."""
        # Before the note: this process must not judge others that are slower to end.
        self._over.set()
        self._tell(left=True)

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process has failed, which soon ends this process too.

        If the error is a symptom of another process's end, the method waits for that one's name.
        """
        logging.error("process %d: %s: %s", self._process, type(error).__name__, error)
        if any(symptom in str(error) for symptom in _SYMPTOMS):
            if 0 in self._seen:
                logging.error(
                    "another process has ended; if JAX aborts this one now, it is process 0 on %s, "
                    "which holds the coordination service",
                    self._seen[0].note.host,
                )
            # By then the others have declared the dead process, and the run ends with its name.
            time.sleep(self._limits.heartbeat_secs + 6 * self._limits.interval_secs)
        host = self._note.host
        first_line = str(error).partition("\n")[0]
        self._tell(
            verdict=f"process {self._process} on {host} failed: {type(error).__name__}: "
            f"{first_line}"
        )
        # In a thread, so that the caller still unwinds and writes its own error.
        threading.Thread(target=self._exit, daemon=True).start()

    def _tell(self, **changes: Any) -> None:
        with self._lock:
            self._note = self._note._replace(
                beat=self._note.beat + 1,
                marks=progress.marks(),
                patience=progress.patience(),
                stop=stopping.reason(),
                **changes,
            )
            text = json.dumps(self._note)
        self._service.key_value_set(f"{_FOLDER}/{self._process}", text, allow_overwrite=True)

    def _read(self) -> dict[int, Note]:
        found = self._service.key_value_dir_get(_FOLDER)
        return {int(key.rpartition("/")[2]): Note(*json.loads(text)) for key, text in found}

    def _tell_and_judge(self) -> None:
        while not self._over.is_set():
            self._round()
            self._over.wait(self._limits.interval_secs)

    def _round(self) -> None:
        try:
            self._tell()
            notes = self._read()
        except jax.errors.JaxRuntimeError as error:
            logging.warning("the coordination service does not answer: %s", error)
            return
        self._unanswered = 0
        # A scheduler may signal only one process, and all must stop at the same step.
        for process, note in notes.items():
            if note.stop and process != self._process:
                stopping.request(note.stop)
        self._seen = updated(self._seen, notes)
        verdict = judge(self._seen, self._limits)
        # The verdict is published first, so that all processes end with the same message.
        if verdict and not self._note.verdict:
            self._tell(verdict=verdict)
            self._end(verdict)

    def _watch_service(self) -> None:
        """Ends this process if it is cut off from process 0."""
        while not self._over.wait(self._limits.interval_secs):
            self._unanswered += 1
            silent = self._unanswered * self._limits.interval_secs
            if silent > self._limits.heartbeat_secs:
                self._end(
                    f"process 0 on {self._seen[0].note.host}, which holds the coordination "
                    f"service, has not answered for {silent:.0f} s "
                    f"(hosts.heartbeat_timeout_secs={self._limits.heartbeat_secs:g}); it or the "
                    "network between is down"
                )

    def _end(self, verdict: str) -> NoReturn:
        logging.error(
            "%s. Process %d ends too; the same command on all hosts continues from the last "
            "checkpoint",
            *(verdict, self._process),
        )
        self._exit()

    def _exit(self) -> NoReturn:
        """Ends the process without waiting for threads; process 0 waits for readers of its note."""
        time.sleep(3 * self._limits.interval_secs if self._process == 0 else 1)
        logging.flush()
        sys.stderr.flush()
        os._exit(1)
