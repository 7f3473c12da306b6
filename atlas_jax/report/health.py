"""Health of a run: warnings, failed samples, servers, and the slowest step."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from atlas_jax import masking, ranges
from atlas_jax.metric_docs import METRICS
from atlas_jax.report import guide
from atlas_jax.report.run_files import RunFiles
from atlas_jax.report.stored_samples import StepSamples

_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")
_SERVERS = re.compile(r"sync/|(?:perf|rollout)/(?:teacher|student)_")
"""Metrics of servers: the transfer of weights to them, and the requests in their seats."""


class Warned(NamedTuple):
    """One kind of warning."""

    text: str
    times: int
    first: str
    last: str
    advice: str
    """Step to take; empty if the warning says it itself."""


class PhaseShare(NamedTuple):
    """A part of a step."""

    name: str
    secs: float
    share: float
    """Share of the step, at most 1; phases may run at the same time."""
    meaning: str


class Health(NamedTuple):
    """Content of the section on a run's health."""

    warnings: list[Warned]
    failures: list[tuple[str, int]]
    """Reason and number of samples."""
    num_samples: int
    servers: list[tuple[str, str, str, str]]
    """Metric, its mean, its extreme, and its meaning."""
    slowest: int
    """The step that took longest; 0 if no time is known."""
    slowest_secs: float
    phases: list[PhaseShare]
    unread: list[str]


def examine(run: RunFiles, steps: Sequence[StepSamples]) -> Health:
    """Returns the health of a run."""
    slowest, secs, phases = _slowest(run)
    now = measured(run)
    # What the end of the run has logged of them is no other warning.
    logged = [w for w in _logged(run) if not any(w.text.startswith(x.text) for x in now)]
    reasons = collections.Counter(
        _NUMBER.sub("N", masking.hide(member.failure or member.unscored))
        for step in steps
        for group in step.groups
        for member in group.members
        if member.failure or member.unscored
    )
    lost = sum(step.unread for step in steps)
    return Health(
        warnings=[*now, *logged],
        failures=reasons.most_common(),
        num_samples=sum(step.num_samples for step in steps),
        servers=_servers(run),
        slowest=slowest,
        slowest_secs=secs,
        phases=phases,
        unread=[*run.unread, *([f"rollouts: {lost} lines are no samples"] if lost else [])],
    )


def measured(run: RunFiles) -> list[Warned]:
    """Returns warnings about the means of the last steps."""
    where = f"step {run.last_step}"
    return [
        Warned(text=fault.text, times=1, first=where, last=where, advice=fault.advice)
        for fault in ranges.faults(lambda name: guide.last_mean(run, name))
    ]


def _logged(run: RunFiles) -> list[Warned]:
    """Returns the warnings and errors of the log; texts that differ in numbers are one kind."""
    kinds: dict[str, list[int]] = {}
    for i, line in enumerate(run.log):
        if line.level in ("WARNING", "ERROR", "CRITICAL"):
            kinds.setdefault(_NUMBER.sub("N", line.text), []).append(i)
    found = []
    for places in kinds.values():
        last = run.log[places[-1]]
        advice = ranges.ADVICE.get(last.text.partition("=")[0], "")
        found.append(
            Warned(
                text=masking.hide(last.text),
                times=len(places),
                first=run.log[places[0]].time,
                last=last.time,
                advice="" if advice in last.text else advice,
            )
        )
    return found


def _servers(run: RunFiles) -> list[tuple[str, str, str, str]]:
    """Returns the metrics of servers with their means and extremes."""
    names = dict.fromkeys(name for line in run.metrics for name in line if _SERVERS.match(name))
    rows = []
    for name in names:
        values = [value for _, value in run.series(name) if not math.isnan(value)]
        if values:
            extreme = min(values) if name == "sync/servers" else max(values)
            kind = "least" if name == "sync/servers" else "most"
            mean = ranges.number(sum(values) / len(values))
            meaning = METRICS[name].meaning if name in METRICS else ""
            rows.append((name, mean, f"{kind} {ranges.number(extreme)}", meaning))
    return rows


def _slowest(run: RunFiles) -> tuple[int, float, list[PhaseShare]]:
    """Returns the slowest step, its seconds, and what it spent them on, the longest first."""
    timed = [line for line in run.metrics if line.get("perf/step_secs", math.nan) > 0]
    if not timed:
        return 0, 0.0, []
    line = max(timed, key=lambda values: values["perf/step_secs"])
    total = line["perf/step_secs"]
    phases = [
        PhaseShare(
            name=name,
            secs=secs,
            share=min(secs / total, 1.0),
            meaning=METRICS[name].meaning if name in METRICS else "",
        )
        for name, secs in line.items()
        if name.endswith("_secs") and name != "perf/step_secs" and secs > 0
    ]
    phases.sort(key=lambda phase: -phase.secs)
    return int(line["step"]), total, phases
