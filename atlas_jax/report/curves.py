"""Curves of a run's metrics as pictures: lines, the guide's ranges, and intervals, as SVG paths.

A picture is 360 units wide, about the width of a phone, so that its words are readable without
scaling. It is drawn here and not in the browser, so that it prints and needs no script.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from atlas_jax import ranges
from atlas_jax.metric_docs import METRICS
from atlas_jax.report.run_files import RunFiles
from atlas_jax.report.stored_samples import StepSamples

WIDTH = 360
HEIGHT = 194
LEFT = 46
RIGHT = 352
TOP = 8
BOTTOM = 164
_MAX_POINTS = 500
"""Points of a line; a longer one is shown by the means of its parts."""


class PlottedLine(NamedTuple):
    """One line of a picture."""

    label: str
    colour: int
    """Number of the colour, from 0."""
    dash: int
    """Number of the pattern, from 0, so that colour is not needed to tell lines apart."""
    path: str
    dots: str
    """Points with no value beside them, to which no line leads."""
    interval: str
    """Outline of the 95 % interval; empty without one, and where runs lie over each other."""
    steps: list[int]
    values: list[float | None]


class Band(NamedTuple):
    """A shaded range of the guide."""

    kind: str
    """`good` or `warning`."""
    y: float
    height: float


class Tick(NamedTuple):
    """A mark on an axis."""

    at: float
    label: str


class Picture(NamedTuple):
    """One picture with its axes, in units of the drawing."""

    title: str
    goal: str
    """The guide's range in words; empty without one."""
    meanings: list[tuple[str, str]]
    """Metric and meaning."""
    lines: list[PlottedLine]
    bands: list[Band]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_range: tuple[float, float]
    y_range: tuple[float, float]


class _Chart(NamedTuple):
    title: str
    names: tuple[str, ...]


_CHARTS = (
    _Chart("Reward and its parts", ("reward/mean", "reward/*")),
    _Chart("Judges", ("rim_rewards/*",)),
    _Chart("Right answers", ("teaching/student_accuracy", "teaching/baseline_accuracy")),
    _Chart("Right answers, held out", ("eval/student_accuracy", "eval/baseline_accuracy")),
    _Chart("Non-degradation", ("teaching/non_degradation_rate", "eval/non_degradation*")),
    _Chart("KL from the reference", ("policy/kl",)),
    _Chart("Lengths in tokens", ("rollout/completion_tokens", "teaching/probe_tokens")),
    _Chart("Shorter answers", ("teaching/response_token_reduction",)),
    _Chart("Loss", ("loss/total", "eval/loss")),
    _Chart("Entropy", ("policy/entropy", "distillation/teacher_entropy")),
    _Chart("Clipped share", ("policy/clip_frac",)),
    _Chart("Mismatch of engine and trainer", ("rollout/mismatch_kl", "rollout/fresh_mismatch*")),
    _Chart("Staleness", ("rollout/version_lag_max", "rollout/version_lag*")),
    _Chart("Gradient norm", ("optim/grad_norm",)),
    _Chart("Learning rate", ("optim/learning_rate",)),
    _Chart("Seconds of a step", ("perf/step_secs", "perf/*_secs")),
    _Chart("Seats", ("perf/*_seats", "rollout/*_running", "rollout/*_waiting")),
    _Chart("Throughput", ("perf/tokens_per_sec_per_device",)),
    _Chart("Memory", ("perf/memory*",)),
    _Chart("Faults", ("teaching/missing_frac", "teaching/answer_leak_frac",
        "rollout/truncated_frac", "reward/failed_frac", "reward/zero_std_group_frac")),
)  # fmt: skip
_NOT_PARTS = {name for name in METRICS if name.startswith("reward/")}
"""Metrics of the area of rewards that are no part of the reward."""


def draw(
    runs: Sequence[RunFiles], samples: Sequence[Sequence[StepSamples]]
) -> tuple[list[Picture], list[Picture]]:
    """Returns the pictures that the guide speaks of, and one of each other metric.

    Args:
        runs: laid over each other.
        samples: of each run, from which intervals of accuracies are computed.
    """
    found = dict.fromkeys(name for run in runs for line in run.metrics for name in line)
    names = [name for name in found if name != "step"]
    intervals = [_intervals(steps) for steps in samples]
    pictures = []
    shown: set[str] = set()
    for chart in _CHARTS:
        own = [name for name in _resolved(chart.names, names) if name not in shown]
        shown.update(own)
        if own:
            pictures.append(_picture(chart.title, own, runs, intervals))
    rest = [_picture(name, [name], runs, intervals) for name in names if name not in shown]
    return pictures, rest


def _resolved(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns the metrics that a chart names; `reward/*` are the parts of the reward."""
    found = [
        name
        for pattern in patterns
        for name in names
        if fnmatch.fnmatchcase(name, pattern) and not ("*" in pattern and name in _NOT_PARTS)
    ]
    return list(dict.fromkeys(found))


Intervals = dict[str, dict[int, tuple[float, float]]]
"""Metric -> step -> its 95 % interval."""


def _intervals(steps: Sequence[StepSamples]) -> Intervals:
    """Returns the intervals of the accuracies in training.

    A question counts as one observation, however many lessons it got: their answers depend on each
    other.

    Reference: Jeffreys interval (Brown, Cai, DasGupta 2001), of Beta(k + 1/2, n - k + 1/2).
    """
    result: Intervals = {"teaching/student_accuracy": {}, "teaching/baseline_accuracy": {}}
    for step in steps:
        both = [
            [(m.before, m.after) for m in g.members if m.before is not None and m.after is not None]
            for g in step.groups
        ]
        both = [group for group in both if group]
        for which, name in ((1, "teaching/student_accuracy"), (0, "teaching/baseline_accuracy")):
            shares = [sum(pair[which] for pair in group) / len(group) for group in both]
            if shares:
                result[name][step.step] = _jeffreys(sum(shares), len(shares))
    return result


def _jeffreys(right: float, count: int) -> tuple[float, float]:
    from scipy import stats

    low, high = stats.beta.ppf((0.025, 0.975), right + 0.5, count - right + 0.5)
    return (0.0 if right == 0 else float(low), 1.0 if right == count else float(high))


def _picture(
    title: str, names: Sequence[str], runs: Sequence[RunFiles], intervals: Sequence[Intervals]
) -> Picture:
    series = [
        (place, name, *_thinned(run.series(name)))
        for place, run in enumerate(runs)
        for name in names
        if run.series(name)
    ]
    values = [v for *_, ys in series for v in ys if not math.isnan(v)]
    for place, name, xs, _ in series if len(runs) == 1 else ():
        values += [border for x in xs for border in intervals[place].get(name, {}).get(x, ())]
    steps = [x for _, _, xs, _ in series for x in xs]
    wanted = _range_of(names, runs)
    x_range = (float(min(steps)), float(max(steps)))
    y_range = _y_range(names, values, wanted)
    scale = _Scale(x_range, y_range)
    several = len(runs) > 1
    lines = []
    for place, name, xs, ys in series:
        number = names.index(name)
        lines.append(
            PlottedLine(
                label=_label(runs[place], name, names, several),
                colour=place if several else number,
                dash=(place if several and len(names) == 1 else number) % 4,
                path=_path(scale, xs, ys),
                dots=_dots(scale, xs, ys),
                interval="" if several else _outline(scale, xs, intervals[place].get(name, {})),
                steps=list(xs),
                values=[None if math.isnan(v) else v for v in ys],
            )
        )
    return Picture(
        title=title,
        goal=ranges.goal_text(wanted) if wanted else "",
        meanings=[(name, METRICS[name].meaning if name in METRICS else "") for name in names],
        lines=lines,
        bands=_bands(scale, wanted),
        x_ticks=[Tick(scale.x(v), f"{v:g}") for v in _round_numbers(*x_range, whole=True)],
        y_ticks=[Tick(scale.y(v), f"{v:.6g}") for v in _round_numbers(*y_range)],
        x_range=x_range,
        y_range=y_range,
    )


class _Scale(NamedTuple):
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: int | float) -> float:
        low, high = self.x_range
        share = (value - low) / (high - low) if high > low else 0.5
        return round(LEFT + share * (RIGHT - LEFT), 1)

    def y(self, value: int | float) -> float:
        low, high = self.y_range
        share = (min(max(value, low), high) - low) / (high - low)
        return round(BOTTOM - share * (BOTTOM - TOP), 1)


def _range_of(names: Sequence[str], runs: Sequence[RunFiles]) -> str:
    """Returns the metric of a chart of which the guide has a range; empty without one."""
    is_sft = any(run.algorithm == "sft" for run in runs)
    known = (n for n in names if n in ranges.RANGES and (is_sft or n not in ranges.SFT_ONLY))
    return next(known, "")


def _y_range(names: Sequence[str], values: Sequence[float], wanted: str) -> tuple[float, float]:
    low = min(values, default=0.0)
    high = max(values, default=1.0)
    if wanted:  # the border of the range is always in the picture
        goal = ranges.RANGES[wanted]
        borders = [b for b in (goal.low, goal.high) if math.isfinite(b)]
        low = min(low, *borders)
        high = max(high, *borders)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 0.5
    return low - room * (low != 0.0), high + room


def _bands(scale: _Scale, wanted: str) -> list[Band]:
    if not wanted:
        return []
    goal = ranges.RANGES[wanted]
    low, high = scale.y_range
    parts = [
        ("good", goal.low, goal.high),
        ("warning", -math.inf, goal.warn_below),
        ("warning", goal.warn_above, math.inf),
    ]
    bands = []
    for kind, first, last in parts:
        top = scale.y(min(last, high))
        bottom = scale.y(max(first, low))
        if bottom > top and first < high and last > low:
            bands.append(Band(kind, top, round(bottom - top, 1)))
    return bands


def _label(run: RunFiles, name: str, names: Sequence[str], several: bool) -> str:
    if not several:
        return name
    return run.name if len(names) == 1 else f"{run.name}: {name}"


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Returns steps and values; those of a long series are means over parts of equal length."""
    size = math.ceil(len(points) / _MAX_POINTS)
    xs = []
    ys = []
    for start in range(0, len(points), max(size, 1)):
        part = points[start : start + size]
        known = [value for _, value in part if not math.isnan(value)]
        xs.append(part[-1][0])
        ys.append(sum(known) / len(known) if known else math.nan)
    return xs, ys


def _path(scale: _Scale, xs: Sequence[int], ys: Sequence[float]) -> str:
    """Returns the path through the points; a gap where there is no value."""
    parts = []
    pen_is_down = False
    for x, y in zip(xs, ys, strict=True):
        if not math.isnan(y):
            parts.append(f"{'L' if pen_is_down else 'M'}{scale.x(x)} {scale.y(y)}")
        pen_is_down = not math.isnan(y)
    return "".join(parts)


def _dots(scale: _Scale, xs: Sequence[int], ys: Sequence[float]) -> str:
    """Returns the points between two gaps, as lines without length, whose ends are round."""
    known = [False, *(not math.isnan(y) for y in ys), False]
    alone = [i for i in range(len(ys)) if known[i : i + 3] == [False, True, False]]
    return "".join(f"M{scale.x(xs[i])} {scale.y(ys[i])}h.01" for i in alone)


def _outline(scale: _Scale, xs: Sequence[int], known: dict[int, tuple[float, float]]) -> str:
    places = [(x, *known[x]) for x in xs if x in known]
    if len(places) < 2:
        return ""
    there = [f"{scale.x(x)} {scale.y(high)}" for x, _, high in places]
    back = [f"{scale.x(x)} {scale.y(low)}" for x, low, _ in reversed(places)]
    return "M" + "L".join(there + back) + "Z"


def _round_numbers(low: float, high: float, whole: bool = False) -> list[float]:
    """Returns about four round numbers of a range: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    unit = max(unit, 1.0) if whole else unit
    first = math.ceil(low / unit - 1e-9)
    last = math.floor(high / unit + 1e-9)
    return [round(i * unit, 12) for i in range(first, last + 1)]


def as_json(picture: Picture) -> dict[str, Any]:
    """Returns what the browser needs to show values of a picture."""
    return {
        "title": picture.title,
        "x": picture.x_range,
        "y": picture.y_range,
        "lines": [[line.label, line.steps, _rounded(line.values)] for line in picture.lines],
    }


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.6g}") for value in values]
