"""Display of work that takes long: lines of the log, summaries, and a status line in a terminal.

The first process of a run shows its steps, and `evaluate` the texts that its models write.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
from absl import logging

from atlas_jax import progress, ranges, terminal

_SHOWN = {
    "reward/mean": "reward",
    "policy/kl": "KL",
    "teaching/baseline_accuracy": "alone",
    "teaching/student_accuracy": "taught",
    "loss/total": "loss",
    "eval/loss": "held out",
    "eval/accuracy": "held out",
    "eval/baseline_accuracy": "held out alone",
    "eval/student_accuracy": "held out taught",
}
"""Metric -> its word, the most important first."""
_STEP_SECS = "perf/step_secs"
_SAME = 0.01
"""Relative change below which two means count as equal."""
_BAR = (6, 24)
"""Least and most columns of a bar."""
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_COMPILE_SECS = 1.0
"""Seconds of a compilation before the status line speaks of it."""


class RunDisplay:
    """Display of a training run."""

    def __init__(self, name: str, num_steps: int, start: int, every: int, mode: str) -> None:
        """Shows nothing yet.

        Args:
            name: of the recipe.
            num_steps: of the whole run.
            start: steps that are done.
            every: steps between two summaries.
            mode: the option `terminal`.
        """
        self._name = name
        self._num_steps = num_steps
        self._step = start
        self._every = every
        self._values: dict[str, float] = {}
        self._since_summary: list[Mapping[str, float]] = []
        self._summarized = start
        self._before: dict[str, float] = {}
        self._warned: set[str] = set()
        self._secs_left = math.nan
        self._activity = Activity()
        self._has_status = mode == "auto" and terminal.has_status_line()

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Shows a status line during the block, in a terminal."""
        logging.info("compiling … the first step takes longer than those after it")
        with contextlib.ExitStack() as stack:
            if self._has_status:
                stack.enter_context(self._activity.watched())
                stack.enter_context(terminal.StatusLine(self._status))
            yield

    def begin(self, phase: str) -> None:
        """Says in the status line what is done now."""
        self._activity.begin(phase)

    def advance(self, step: int) -> None:
        """Counts a step."""
        self._step = step

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs metrics, warnings, and a summary if it is due.

        Args:
            step: the last one that the metrics are about.
            values: means over the steps since the last call, or an evaluation.
        """
        where = f"step {step}/{self._num_steps}"
        line = " ".join((where, *(f"{name}={value:.4g}" for name, value in values.items())))
        if self._has_status:
            terminal.details(line)
        else:
            logging.info("%s", line)
        for warning in ranges.warnings(values):
            logging.warning("%s", warning)
        if _STEP_SECS not in values:
            self._say(f"{where}, evaluation", values)
        else:
            if self._since_summary or _STEP_SECS in self._before:  # the first one compiles
                self._secs_left = values[_STEP_SECS] * (self._num_steps - step)
            self._since_summary.append(values)
            due = step // self._every > self._summarized // self._every
            if due or step == self._num_steps:
                self._summarize(step, where)
        self._values |= values

    def _summarize(self, step: int, where: str) -> None:
        """Logs the means since the last summary, against those of that summary."""
        lines = self._since_summary
        means = {
            name: _mean([line[name] for line in lines if name in line])
            for name in dict.fromkeys(name for line in lines for name in line)
        }
        self._say(f"{where}, mean of {step - self._summarized}", means)
        faults = ranges.faults(lambda name: means.get(name, math.nan))
        faults = [fault for fault in faults if fault.learns_nothing]
        # Not again while it lasts, nor at the last step, whose verdict says it.
        for fault in faults if step < self._num_steps else ():
            if fault.name not in self._warned:
                logging.warning("%s; %s", fault.text, fault.advice)
        self._warned = {fault.name for fault in faults}
        self._since_summary = []
        self._summarized = step

    def _say(self, where: str, values: Mapping[str, float]) -> None:
        """Logs the metrics that people follow, with arrows against those of the last time."""
        words = [
            f"{word} {ranges.number(values[name])}{_arrow(values[name], self._before.get(name))}"
            for name, word in _chosen(values)
        ]
        if _STEP_SECS in values:
            words.append(f"{values[_STEP_SECS]:.3g} s a step")
        logging.info("%s: %s", where, ", ".join(words))
        self._before |= values

    def _status(self, columns: int) -> str:
        parts = [LinePart(f"{word} {ranges.number(self._values[name])}", 2 + place)
                 for place, (name, word) in enumerate(_chosen(self._values))]  # fmt: skip
        left = _duration(self._secs_left)
        return status_line(
            columns,
            LinePart(f"{self._name} {self._step}/{self._num_steps}", 0),
            self._step / max(self._num_steps, 1),
            [*parts, *([LinePart(f"{left} left", 1)] if left else []), self._activity.part()],
        )


@contextlib.contextmanager
def texts(name: str, total: int, mode: str) -> Iterator[None]:
    """Shows how many texts are written during the block, in a terminal.

    Args:
        name: of what is asked.
        total: texts that are asked for, at most.
        mode: the option `terminal`.
    """
    if mode != "auto" or not terminal.has_status_line():
        yield
        return
    first = progress.marks()
    start = time.monotonic()
    activity = Activity()

    def status(columns: int) -> str:
        done = min(progress.marks() - first, total)
        secs = time.monotonic() - start
        left = _duration(secs / done * (total - done)) if done else ""
        parts = [LinePart(f"{left} left", 1)] if left else []
        head = LinePart(f"{name} {done}/{total} texts", 0)
        return status_line(columns, head, done / max(total, 1), [*parts, activity.part()])

    with activity.watched(), terminal.StatusLine(status):
        yield


class LinePart(NamedTuple):
    """A part of a status line."""

    text: str
    rank: int
    """Importance; parts with lower numbers are kept where the line is short."""


def status_line(columns: int, head: LinePart, share: float, parts: Sequence[LinePart]) -> str:
    """Returns a line of at most `columns` columns: the head, a bar, and as many parts as fit.

    Args:
        columns: of the terminal.
        head: comes first, cut off where even that does not fit.
        share: of the work that is done, 0 to 1.
        parts: in the order in which they are shown.
    """
    used = len(head.text)
    chosen = set()
    for place in sorted(range(len(parts)), key=lambda i: parts[i].rank):
        size = len(parts[place].text) + 2
        if parts[place].text and used + size <= columns:
            chosen.add(place)
            used += size
    shown = [part.text for place, part in enumerate(parts) if place in chosen]
    least, most = _BAR
    room = min(columns - used - 1, most)
    bar = []
    if room >= least:
        done = round(min(max(share, 0.0), 1.0) * room)
        bar = ["━" * done + "─" * (room - done)]
    return "  ".join([" ".join([head.text[:columns], *bar]), *shown])


class Activity:
    """The work of this moment: a compilation, else a phase with its texts."""

    def __init__(self) -> None:
        self._phase = ""
        self._marks = 0
        self._lock = threading.Lock()
        self._compiling: dict[int, float] = {}

    def begin(self, phase: str) -> None:
        """Begins a phase."""
        self._phase = phase
        self._marks = progress.marks()

    def part(self) -> LinePart:
        """Returns the activity as a part of a status line."""
        with self._lock:
            begun = min(self._compiling.values(), default=math.inf)
        secs = time.monotonic() - begun
        if secs > _COMPILE_SECS:
            return LinePart(f"compiling … {_duration(secs)}", 0)
        written = progress.marks() - self._marks
        count = f": {written} texts" if written and self._phase else ""
        return LinePart(f"{self._phase}{count}", 99)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Notices compilations during the block."""
        monitoring = jax.monitoring
        monitoring.register_scalar_listener(self._begun)
        monitoring.register_event_duration_secs_listener(self._done)
        try:
            yield
        finally:
            monitoring.unregister_scalar_listener(self._begun)
            monitoring.unregister_event_duration_listener(self._done)

    def _begun(self, event: str, value: float, **kwargs: str | int) -> None:
        if event == _COMPILE_EVENT:
            with self._lock:
                self._compiling[threading.get_ident()] = time.monotonic()

    def _done(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILE_EVENT:
            with self._lock:
                self._compiling.pop(threading.get_ident(), None)


def _chosen(values: Mapping[str, float]) -> list[tuple[str, str]]:
    """Returns the metrics that people follow, with their words.

    With a reward the loss is left out, which is near 0 whatever the policy has learned.
    """
    left_out = "loss/total" if "reward/mean" in values else ""
    return [(name, word) for name, word in _SHOWN.items() if name in values and name != left_out]


def _arrow(value: float, before: float | None) -> str:
    """Returns where a value has gone; empty where one of the two is not known."""
    if before is None or math.isnan(value) or math.isnan(before):
        return ""
    if abs(value - before) <= _SAME * abs(before):
        return " ="
    return " ↑" if value > before else " ↓"


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _duration(secs: float) -> str:
    """Returns a time for people; empty for none."""
    if math.isnan(secs) or not secs:
        return ""
    minutes, seconds = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes}:{seconds:02d} min" if minutes else f"{seconds} s"
