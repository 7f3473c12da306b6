"""The ranges of the ATLAS training guide, and the limits above which a run is warned about.

The page of a run, its warnings and the verdict at its end read this one table. Imports no JAX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

REACHED = "reached"
NEAR = "near"
MISSED = "missed"
NOT_MEASURED = "not measured"

_LAST = 0.1
"""Share of the steps over whose mean a run is judged."""
_FEWEST = 5
"""Steps of that mean at least."""
_ALL = 0.999
"""Share from which on a fault counts as that of all samples."""


class Range(NamedTuple):
    """A range of a metric in the guide."""

    low: float
    high: float
    warn_below: float = -math.inf
    warn_above: float = math.inf

    def status(self, value: int | float) -> str:
        """Returns `reached`, `near` or `missed` for a value; `not measured` for NaN."""
        if math.isnan(value):
            return NOT_MEASURED
        if self.low <= value <= self.high:
            return REACHED
        return MISSED if value < self.warn_below or value > self.warn_above else NEAR


RANGES = {
    "policy/kl": Range(low=0.5, high=2.0, warn_above=5.0),
    "teaching/non_degradation_rate": Range(low=0.95, high=1.0, warn_below=0.9),
    "loss/total": Range(low=-math.inf, high=1.5, warn_above=1.5),
    "optim/grad_norm": Range(low=-math.inf, high=5.0, warn_above=5.0),
}
"""Metric -> its range in the guide; the last two are of SFT."""
SFT_ONLY = ("loss/total", "optim/grad_norm")
EVERY_STEP = ("policy/kl", "teaching/non_degradation_rate")
"""Metrics whose warning a run logs at each step."""


class Goal(NamedTuple):
    """A result that the guide reports of its own run."""

    text: str
    wanted: Range


RESULTS = {
    "accuracy_delta": Goal("+15.7 points", Range(low=0.157, high=1.0, warn_below=0.0)),
    "response_token_reduction": Goal("0.50", Range(low=0.5, high=1.0, warn_below=0.0)),
    "completion_rate": Goal("1.00 (from 0.69)", Range(low=0.98, high=1.0, warn_below=0.69)),
}
"""Metric of an evaluation -> the result of the guide."""

LABELS = {
    "reward/mean": "mean reward",
    "teaching/non_degradation_rate": "non-degradation",
    "policy/kl": "KL from the reference",
    "loss/total": "loss",
    "optim/grad_norm": "gradient norm",
    "accuracy_delta": "right answers, taught less alone",
    "response_token_reduction": "share of answer tokens saved",
    "completion_rate": "answers that end",
}

ADVICE = {
    "policy/kl": "lower learning_rate, or raise beta",
    "teaching/non_degradation_rate": "lower learning_rate or raise beta; read the samples that "
    "turned right into wrong",
    "loss/total": "train longer, or raise learning_rate",
    "optim/grad_norm": "lower learning_rate, or max_grad_norm",
    "reward/zero_std_group_frac": "most groups have equal rewards and train nothing: raise "
    "num_generations or temperature, or choose questions that the student sometimes solves",
    "teaching/missing_frac": "the teacher leaves <teaching> out: warm it up by SFT, or raise "
    "reward.missing_lesson_penalty",
    "rollout/truncated_frac": "texts are cut by their limit: raise max_new_tokens",
    "rollout/failed_frac": "completions are missing: look at the servers' logs",
    "reward/failed_frac": "samples have no score: read the reasons in rollouts/",
    "teaching/answer_leak_frac": "lessons state the answer: raise reward.answer_leak_penalty",
    "rollout/mismatch_kl": "the engine and the trainer compute other probabilities: compare their "
    "number formats",
}
"""Metric -> step to take where it is out of range."""


class Limit(NamedTuple):
    """A limit of a fault's share of samples."""

    above: float
    """Value above which the mean of several steps is warned about."""
    nothing: str = ""
    """Sentence where all samples have the fault, so that nothing is learned; empty if something
    is learned all the same."""


LIMITS = {
    "reward/zero_std_group_frac": Limit(0.8, "the rewards of every group are equal"),
    "teaching/missing_frac": Limit(0.2, "no text has a lesson"),
    "rollout/truncated_frac": Limit(0.3, "every completion is cut by its limit"),
    "rollout/failed_frac": Limit(0.05, "every completion is missing"),
    "reward/failed_frac": Limit(0.2, "no sample has a score"),
    "teaching/answer_leak_frac": Limit(0.02),
    "rollout/mismatch_kl": Limit(0.05),
}


class Fault(NamedTuple):
    """A metric above its limit."""

    name: str
    text: str
    advice: str
    learns_nothing: bool


def faults(mean: Callable[[str], float]) -> list[Fault]:
    """Returns the faults of some steps.

    Args:
        mean: a metric's mean over the steps; NaN where it is not known.
    """
    found = []
    for name, limit in LIMITS.items():
        value = mean(name)
        if value > limit.above:
            # Distillation compares the tokens of cut completions too.
            compared = not math.isnan(mean("distillation/own_frac"))
            learns_nothing = bool(limit.nothing) and value >= _ALL and not compared
            text = f"{name} is {number(value)} in the last steps, above {limit.above:g}"
            text = f"nothing is learned: {limit.nothing} ({text})" if learns_nothing else text
            fault = Fault(name=name, text=text, advice=ADVICE[name], learns_nothing=learns_nothing)
            found.append(fault)
    return found


def warnings(values: Mapping[str, float]) -> list[str]:
    """Returns a line for each metric of a step that the guide warns about."""
    lines = []
    for name in EVERY_STEP:
        value = values.get(name, math.nan)
        wanted = RANGES[name]
        if value < wanted.warn_below or value > wanted.warn_above:
            border = (
                f"above {wanted.warn_above:g}"
                if value > wanted.warn_above
                else f"below {wanted.warn_below:g}"
            )
            lines.append(f"{name}={value:.4g} is {border}; {ADVICE[name]}")
    return lines


def goal_text(name: str) -> str:
    """Returns the range of a metric as the guide says it."""
    wanted = RANGES[name]
    if name == "teaching/non_degradation_rate":
        return "above 0.95 (warning below 0.90)"
    if math.isinf(wanted.low):
        return f"below {wanted.high:g}"
    return f"{wanted.low:g} to {wanted.high:g} (warning above {wanted.warn_above:g})"


def num_last(count: int) -> int:
    """Returns the number of steps, of all, over which the end of a run is judged."""
    return max(_FEWEST, round(_LAST * count))


def points(value: int | float | None) -> str:
    """Returns a difference of shares in points of a hundred."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:+.1f}"


def number(value: int | float | None) -> str:
    """Returns a number for people; "-" where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.3g}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"
