"""What a lesson that gives the answer away, or aims at the judge, is worth in its group.

A reward cannot tell by itself: a student with the answer in hand is right, and a judge may be
pleased. Against the honest lessons of the same question such a lesson must never be the better one.
"""

from __future__ import annotations

from collections.abc import Sequence

from atlas_jax.rewards import gaming
from atlas_jax.rewards.leaks import states_answer
from atlas_jax.types import RewardResult, Rollout

NO_HONEST = "no lesson of its group is honest"
"""Why a sample of such a group has no score."""


def priced(
    rollouts: Sequence[Rollout], results: Sequence[RewardResult], penalty: float
) -> list[RewardResult]:
    """Returns the results of one group in which no leak pays.

    The score of a lesson that gives the answer away, or of which the judges' reward says that it
    aims at them, is the lower of its own and the lowest honest one, less the penalty. Where no
    honest lesson has a score, none has, so that the group trains nothing.

    Args:
        rollouts: those of one question, with the same policy.
        results: what the reward says of each.
        penalty: not negative.
    """
    found = [_found(*member) for member in zip(rollouts, results, strict=True)]
    honest = [
        result.score
        for result, reasons in zip(results, found, strict=True)
        if result.score is not None and not reasons
    ]
    floor = min(honest, default=None)
    return [
        _lowered(result, reasons, floor, penalty) if reasons else result
        for result, reasons in zip(results, found, strict=True)
    ]


def _found(rollout: Rollout, result: RewardResult) -> list[str]:
    """Returns what is wrong with a lesson: what the judges' reward found, and any leak."""
    judged = result.details.get("rim", {}).get("gaming", [])
    if gaming.LEAK in judged or not rollout.teaching:
        return list(judged)
    question = rollout.question
    leaks = states_answer(rollout.teaching, question.ground_truth, question.question)
    return [gaming.LEAK] * leaks + list(judged)


def _lowered(
    result: RewardResult, reasons: list[str], floor: float | None, penalty: float
) -> RewardResult:
    details = {**result.details, "gaming": reasons}
    if result.score is None:
        return result._replace(details=details)
    details["own_score"] = result.score
    if floor is None:
        return RewardResult(None, {"unscored": NO_HONEST, **details}, is_skipped=True)
    return result._replace(score=min(result.score, floor) - penalty, details=details)
