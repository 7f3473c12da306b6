"""The price of a lesson that gives the answer away, or that aims at the judge.

A reward cannot tell by itself: a student with the answer in hand is right, and a judge may be
pleased. Such a lesson must never be worth more than the honest lessons of the same question.
"""

from __future__ import annotations

from collections.abc import Sequence

from atlas_jax.rewards.combined import each_answer
from atlas_jax.types import Reward, Sample, by_question

NO_HONEST = "no lesson of its group is honest"
"""The reason for which no sample of such a group has a reward."""


def price_leaks(samples: Sequence[Sample], penalty: float) -> list[Sample]:
    """Returns the samples with rewards under which no leak pays.

    The reward of a lesson that gives the answer away, or that the judges found to aim at them, is
    the lower of its own and the lowest honest one of its group, minus the penalty. A group in which
    no honest lesson has a reward has none at all, so it trains nothing.

    Args:
        samples: scored samples, the members of each question together.
        penalty: subtracted from the lowest honest reward; not negative.
    """
    return [sample for group in by_question(samples) for sample in _price_group(group, penalty)]


def _price_group(group: Sequence[Sample], penalty: float) -> list[Sample]:
    reasons = [_gaming(sample) for sample in group]
    honest = [
        sample.reward.value
        for sample, reason in zip(group, reasons, strict=True)
        if sample.reward.value is not None and not reason
    ]
    floor = min(honest, default=None)
    return [
        sample._replace(reward=_lowered(sample.reward, reason, floor, penalty))
        if reason
        else sample
        for sample, reason in zip(group, reasons, strict=True)
    ]


def _gaming(sample: Sample) -> list[str]:
    """Returns the faults of a lesson: those that the judges' reward found, and any leak."""
    answers = each_answer(sample.reward.details.get("rim", {}))
    judged = list(dict.fromkeys(fault for d in answers for fault in d.get("gaming", [])))
    if not sample.teaching:
        return judged
    from atlas_jax.rewards import leaks  # only a lesson can give the answer away

    if leaks.LEAK in judged:
        return judged
    question = sample.question
    states = leaks.states_answer(sample.teaching, question.ground_truth, question.text)
    return [leaks.LEAK] * states + judged


def _lowered(reward: Reward, reasons: list[str], floor: float | None, penalty: float) -> Reward:
    details = {**reward.details, "gaming": reasons}
    if reward.value is None:
        return reward._replace(details=details)
    details["own_value"] = reward.value
    if floor is None:
        details = {"unscored": NO_HONEST, **details}
        return Reward(value=None, details=details, is_skipped=True)
    return reward._replace(value=min(reward.value, floor) - penalty, details=details)
