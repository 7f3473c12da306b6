"""From judges' opinions to one score: escalation, choice, consistency, aggregation.

Pure functions. Nothing depends on the order in which replies arrive.

Reference: the RIM reward of ATLAS (Arc Intelligence), with its faults left out: an arbiter that
fails leaves the first opinions standing, and where a judge did not speak there is no score.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from atlas_jax.options.judges import ConsistencyRules, RIMConfig

_ROUNDING = 1e-9


class Opinion(NamedTuple):
    """What one call says."""

    score: float  # in 0..1
    uncertainty: float  # in 0..1
    rationale: str
    principles: tuple[dict[str, Any], ...]  # name, weight, description
    model: str
    temperature: float
    gives_away: bool = False  # whether the lesson gives the answer away or speaks to the judge


class Verdict(NamedTuple):
    """What one judge says of one sample."""

    opinion: Opinion | None  # the one that counts; None: the judge has no score
    samples: tuple[Opinion, ...]  # of the small model, in the order of the temperatures
    spread: float  # standard deviation of their scores
    escalation: str  # why the large model was asked; "" if it was not
    failures: tuple[str, ...]  # one for each opinion that was asked for and did not come
    num_asked: int  # opinions that were asked for, the large model's too


def spread(samples: Sequence[Opinion]) -> float:
    """Returns the population standard deviation of the scores; 0 for fewer than two."""
    if len(samples) < 2:
        return 0.0
    mean = statistics.fmean(s.score for s in samples)
    return math.sqrt(statistics.fmean((s.score - mean) ** 2 for s in samples))


def escalation(samples: Sequence[Opinion], config: RIMConfig) -> str:
    """Returns why the large model has to decide; "" if it does not."""
    if not samples:
        return "no valid sample"
    deviation = spread(samples)
    if deviation > config.variance_threshold + _ROUNDING:
        return f"disagreement {deviation:.3f} > {config.variance_threshold:g}"
    highest = max(s.uncertainty for s in samples)
    if highest > config.uncertainty_threshold:
        return f"uncertainty {highest:.3f} > {config.uncertainty_threshold:g}"
    return ""


def choose(samples: Sequence[Opinion]) -> Opinion | None:
    """Returns the opinion of least uncertainty, of equal ones the first by temperature."""
    return min(samples, key=lambda s: s.uncertainty, default=None)


def consistent(
    scores: Mapping[str, float], rules: ConsistencyRules
) -> tuple[dict[str, float], list[str]]:
    """Returns the scores that may stand beside each other, and the rules that changed some.

    A rule is left out where one of its judges has no score. The order is fixed: process to
    accuracy, helpfulness to process, helpfulness to diagnostic.
    """
    found, applied = dict(scores), []

    def cap(name: str, limit: float, why: str) -> None:
        if found[name] > limit + _ROUNDING:
            found[name] = limit
            applied.append(f"{name} at most {limit:.3g}: {why}")

    if {"process", "accuracy"} <= found.keys():
        cap("process", found["accuracy"] + rules.process_over_accuracy, "accuracy")
    bound = rules.process_for_helpfulness
    if {"process", "helpfulness"} <= found.keys() and found["process"] < bound:
        cap("helpfulness", bound, "process")
    if {"helpfulness", "diagnostic"} <= found.keys():
        cap("helpfulness", found["diagnostic"] + rules.helpfulness_over_diagnostic, "diagnostic")
    return {name: min(max(score, 0.0), 1.0) for name, score in found.items()}, applied


def reported(verdicts: Iterable[Verdict]) -> list[str]:
    """Returns what more than half of all first opinions say of a lesson; [] if they do not."""
    votes = [sample.gives_away for verdict in verdicts for sample in verdict.samples]
    found = 2 * sum(votes) > len(votes)
    return ["judges say that it gives the answer away or speaks to them"] if found else []


def aggregate(scores: Mapping[str, float]) -> float | None:
    """Returns the mean over the judges, all of which have spoken; None where there is none."""
    return statistics.fmean(scores.values()) if scores else None
