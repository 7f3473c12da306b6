"""The price of a lesson that gives the answer away or aims at the judge, and of no lesson.

A reward cannot tell by itself: a student with the answer in hand is right, a judge may be pleased,
and a text that teaches nothing cannot harm. None of them may be worth more than the honest lessons
of the same question.
"""

from __future__ import annotations

from collections.abc import Sequence

from atlas_jax.rewards.combined import each_answer
from atlas_jax.types import Reward, Sample, by_question

NO_HONEST = "no lesson of its group is honest"
"""The reason for which no sample of such a group has a reward."""

NO_LESSON = "the text has no lesson"
CUT = "the text was cut by its limit"


def price_lessons(
    samples: Sequence[Sample], leak_penalty: float, missing_penalty: float = 0.0
) -> list[Sample]:
    """Returns the samples with rewards under which neither a leak nor a missing lesson pays.

    The reward of a lesson that gives the answer away, or that the judges found to aim at them, is
    the lower of its own and the lowest honest one of its group, minus the penalty. It has none if
    no honest lesson of its group has a reward. A text without a lesson, or one that did not end, is
    priced in the same way with its own penalty, and by that alone where no lesson is honest;
    without a penalty it counts as an honest lesson. What follows a lesson reaches no student, so
    that nothing else keeps a text from going on until its limit.

    Args:
        samples: scored samples, the members of each question together.
        leak_penalty: subtracted from the lowest honest reward; not negative.
        missing_penalty: the same for a text without a lesson or without an end.
    """
    return [
        sample
        for group in by_question(samples)
        for sample in _price_group(group, leak_penalty, missing_penalty)
    ]


def _price_group(
    group: Sequence[Sample], leak_penalty: float, missing_penalty: float
) -> list[Sample]:
    reasons = [_gaming(sample) for sample in group]
    flaws = [_flaw(sample) if missing_penalty else "" for sample in group]
    marked = list(zip(group, reasons, flaws, strict=True))
    honest = [
        sample.reward.value
        for sample, reason, flaw in marked
        if sample.reward.value is not None and not reason and not flaw
    ]
    floor = min(honest, default=None)
    priced = []
    for sample, reason, flaw in marked:
        reward = sample.reward
        if reason:
            reward = _lowered(reward, reason, floor, leak_penalty)
        elif flaw and reward.value is not None:
            own = reward.value if floor is None else floor
            reward = _lowered(reward, [flaw], own, missing_penalty)
        priced.append(sample._replace(reward=reward))
    return priced


def _flaw(sample: Sample) -> str:
    """Returns what is missing in a text, a lesson or its end; empty if it has both."""
    if not sample.teaching:
        return NO_LESSON
    return CUT if sample.completion.finish_reason == "length" else ""


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
