"""Combination of judges' opinions into one score: escalation, choice, consistency, aggregation.

The functions are pure. No result depends on the order in which replies arrive.

Reference: the RIM reward of ATLAS (Arc Intelligence), with two corrections: if the arbiter fails,
the first opinions count, and a sample without an opinion of some judge has no score.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from atlas_jax.options.judges import ConsistencyRules, RIMConfig

_ROUNDING = 1e-9


class Opinion(NamedTuple):
    """The opinion that one call returned."""

    score: float  # in 0..1
    uncertainty: float  # in 0..1
    rationale: str
    principles: tuple[dict[str, Any], ...]  # name, weight, description
    model: str
    temperature: float
    gives_away: bool = False  # whether the lesson gives the answer away or addresses the judge


class Verdict(NamedTuple):
    """The result of one judge for one sample."""

    opinion: Opinion | None  # the opinion that counts; None: the judge has no score
    samples: tuple[Opinion, ...]  # opinions of the small model, in the order of the temperatures
    spread: float  # standard deviation of the samples' scores
    escalation: str  # reason for asking the large model; "" if it was not asked
    failures: tuple[str, ...]  # reasons of the requested opinions that are missing
    num_asked: int  # number of requested opinions, the large model's included


def spread(samples: Sequence[Opinion]) -> float:
    """Returns the population standard deviation of the scores; 0 for fewer than two."""
    if len(samples) < 2:
        return 0.0
    mean = statistics.fmean(s.score for s in samples)
    return math.sqrt(statistics.fmean((s.score - mean) ** 2 for s in samples))


def escalation(samples: Sequence[Opinion], config: RIMConfig) -> str:
    """Returns the reason for which the large model must decide; "" if it need not."""
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
    """Returns the opinion of least uncertainty; of equal ones, the first by temperature."""
    return min(samples, key=lambda s: s.uncertainty, default=None)


def consistent(
    scores: Mapping[str, float], rules: ConsistencyRules
) -> tuple[dict[str, float], list[str]]:
    """Returns scores that are consistent with each other, and the rules that changed some.

    A rule is skipped if one of its judges has no score. The order is fixed: process is limited by
    accuracy, helpfulness by process, helpfulness by diagnostic.
    """
    limited = dict(scores)
    applied = []

    def cap(name: str, limit: float, why: str) -> None:
        if limited[name] > limit + _ROUNDING:
            limited[name] = limit
            applied.append(f"{name} at most {limit:.3g}: {why}")

    if {"process", "accuracy"} <= limited.keys():
        cap("process", limited["accuracy"] + rules.process_over_accuracy, "accuracy")
    bound = rules.process_for_helpfulness
    if {"process", "helpfulness"} <= limited.keys() and limited["process"] < bound:
        cap("helpfulness", bound, "process")
    if {"helpfulness", "diagnostic"} <= limited.keys():
        cap("helpfulness", limited["diagnostic"] + rules.helpfulness_over_diagnostic, "diagnostic")
    return {name: min(max(score, 0.0), 1.0) for name, score in limited.items()}, applied


def reported(verdicts: Iterable[Verdict]) -> list[str]:
    """Returns the faults of a lesson that more than half of the first opinions report.

    Args:
        verdicts: those of the judges that see the lesson.
    """
    votes = [sample.gives_away for verdict in verdicts for sample in verdict.samples]
    found = 2 * sum(votes) > len(votes)
    return ["judges say that it gives the answer away or speaks to them"] if found else []


def aggregate(scores: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    """Returns the weighted mean of the judges' scores; None without judges.

    Equal weights give the plain mean to the last bit.

    Args:
        scores: judge -> score in 0..1.
        weights: judge -> weight, not all 0; a judge that is not named weighs 1.
    """
    if not scores:
        return None
    factors = [weights.get(name, 1.0) for name in scores]
    if len(set(factors)) == 1:
        return statistics.fmean(scores.values())
    return statistics.fmean(scores.values(), factors)
