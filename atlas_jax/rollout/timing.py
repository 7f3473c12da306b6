"""Times of the requests of a step: who is busy, and what the step waits for."""

from __future__ import annotations

import contextlib
import enum
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from atlas_jax.types import Completion, Metrics

ALL = -1
"""Member of a span that belongs to the whole group of its question."""

ROLES = ("teacher", "student")
"""Models that write, in the order of metrics: the one that is trained and the frozen one."""


class Phase(enum.StrEnum):
    """Part of a question's way through a step."""

    BASELINE = "baseline"
    PROBE = "probe"
    POLICY = "policy"
    GUIDED = "guided"
    REWARD = "reward"

    @property
    def role(self) -> str:
        """The model that writes in this phase; "" if none does."""
        return {"policy": "teacher", "reward": ""}.get(self.value, "student")


class Span(NamedTuple):
    """One request from its beginning to its end, in seconds of the meter's clock."""

    phase: Phase
    place: int
    """Number of the question in the run."""
    member: int
    """Number in the group of its question; `ALL` for what the whole group waits for."""
    start: float
    end: float


class Workload(NamedTuple):
    """Work of the models in a period."""

    secs: float
    """Length of the period."""
    seat_secs: dict[str, float]
    """Sum over requests of their time in flight, by role."""
    busy_secs: dict[str, float]
    """Time with at least one request in flight, by role."""
    tokens: int
    """Tokens of the completions that ended."""


class Meter:
    """Requests in flight by role, added up over time; any thread may call it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts the first period.

        Args:
            clock: the time in seconds.
        """
        self.clock = clock
        self._lock = threading.Lock()
        self._flying = dict.fromkeys(ROLES, 0)
        self._begin()

    def _begin(self) -> None:
        self._start = self._now = self.clock()
        self._seats = dict.fromkeys(ROLES, 0.0)
        self._busy = dict.fromkeys(ROLES, 0.0)
        self._tokens = 0

    def _advance(self) -> None:
        now = self.clock()
        for role, count in self._flying.items():
            self._seats[role] += count * (now - self._now)
            self._busy[role] += (count > 0) * (now - self._now)
        self._now = now

    def change(self, role: str, by: int, tokens: int = 0) -> None:
        """Counts requests that begin, or with a negative number those that end with `tokens`."""
        with self._lock:
            self._advance()
            self._flying[role] += by
            self._tokens += tokens

    def read(self) -> Workload:
        """Returns the work since the last call, and starts the next period."""
        with self._lock:
            self._advance()
            usage = Workload(
                secs=self._now - self._start,
                seat_secs=self._seats,
                busy_secs=self._busy,
                tokens=self._tokens,
            )
            self._begin()
        return usage


class Trace:
    """Spans of the requests of one step."""

    def __init__(self, meter: Meter | None = None) -> None:
        """Begins the step.

        Args:
            meter: counts the requests too; None makes one that nobody reads.
        """
        self.meter = meter or Meter()
        self.start = self.meter.clock()
        self.spans: list[Span] = []

    @contextlib.contextmanager
    def span(
        self, phase: Phase, place: int, member: int = ALL, seats: int = 1
    ) -> Iterator[list[Completion]]:
        """Times the block, which puts what was written into the list that it gets."""
        written: list[Completion] = []
        begun = self.meter.clock()
        if phase.role:
            self.meter.change(phase.role, seats)
        try:
            yield written
        finally:
            if phase.role:
                self.meter.change(phase.role, -seats, sum(c.num_sampled for c in written))
            end = self.meter.clock()
            self.spans.append(Span(phase=phase, place=place, member=member, start=begun, end=end))

    def extend(self, other: Trace) -> None:
        """Adds the spans of further questions of the same step."""
        self.spans += other.spans

    @property
    def generate_secs(self) -> float:
        """Seconds from the beginning until the last text."""
        ends = [span.end for span in self.spans if span.phase.role]
        return max(ends, default=self.start) - self.start

    @property
    def score_secs(self) -> float:
        """Seconds from the last text until the last reward."""
        ends = [span.end for span in self.spans]
        return max(ends, default=self.start) - self.start - self.generate_secs

    def critical_path(self) -> list[Span]:
        """Returns the spans that the step waited for, one after another, of one question."""
        if not self.spans:
            return []
        path = [max(self.spans, key=lambda span: span.end)]
        while before := [span for span in self.spans if _precedes(span, path[0])]:
            path.insert(0, max(before, key=lambda span: span.end))
        return path

    def metrics(self) -> Metrics:
        """Returns the mean time of a question in each phase that writes a text."""
        values: Metrics = {}
        names = {
            Phase.BASELINE: "perf/baseline_secs",
            Phase.PROBE: "perf/probe_secs",
            Phase.POLICY: "perf/policy_secs",
            Phase.GUIDED: "perf/guided_secs",
        }
        for phase, name in names.items():
            secs = _secs_by_question([span for span in self.spans if span.phase is phase])
            if secs:
                values[name] = sum(secs), len(secs)
        return values


def _precedes(span: Span, later: Span) -> bool:
    """Returns whether a span can be what a later one of its question had waited for."""
    related = ALL in (span.member, later.member) or span.member == later.member
    return (
        span.place == later.place and related and span.start < later.start and
        span.end <= later.start
    )  # fmt: skip


def _secs_by_question(spans: Sequence[Span]) -> list[float]:
    """Returns for each question the time from its first beginning to its last end."""
    places = {span.place for span in spans}
    groups = [[span for span in spans if span.place == place] for place in places]
    return [max(s.end for s in group) - min(s.start for s in group) for group in groups]


def of_usage(usage: Workload, is_main: bool) -> Metrics:
    """Returns the metrics of a period.

    Args:
        usage: of this process.
        is_main: whether this process gives the seconds by which sums over processes are divided.
    """
    secs = usage.secs if is_main else 0.0
    return {
        "perf/rollout_tokens_per_sec": (usage.tokens, secs),
        "perf/teacher_seats": (usage.seat_secs["teacher"], secs),
        "perf/student_seats": (usage.seat_secs["student"], secs),
        "perf/teacher_busy_frac": (usage.busy_secs["teacher"], usage.secs),
        "perf/student_busy_frac": (usage.busy_secs["student"], usage.secs),
    }
