"""The reward of a lesson to which the student has given several answers: the mean over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from atlas_jax.types import Reward, RewardFn, Sample


def mean_over_answers(reward: RewardFn) -> RewardFn:
    """Returns the mean of a reward over pairs of an answer with the lesson and one alone.

    There are as many pairs as there are answers of the kind that has more; the others take turns.
    A pair to which the reward does not apply is left out. A sample has no value where a pair that
    applies has none. The details hold those of each pair, with its value, under `answers`.
    """

    def score(samples: Sequence[Sample]) -> list[Reward]:
        pairs = [_pairs(sample) for sample in samples]
        # One call, since judges ask for all samples together.
        rewards = iter(reward([pair for group in pairs for pair in group]))
        return [_mean([next(rewards) for _ in group]) for group in pairs]

    return score


def _pairs(sample: Sample) -> list[Sample]:
    """Returns a sample for each pair of answers."""
    alone = sample.baselines or (None,)
    guided = sample.guided_answers or (None,)
    return [
        sample._replace(
            baseline=alone[i % len(alone)],
            guided=guided[i % len(guided)],
            further_baselines=(),
            further_guided=(),
        )
        for i in range(max(len(alone), len(guided)))
    ]


def _mean(rewards: Sequence[Reward]) -> Reward:
    details: dict[str, Any] = {"answers": [{**r.details, "value": r.value} for r in rewards]}
    applied = [r for r in rewards if r.applies]
    missing = [r for r in applied if r.value is None]
    if missing:
        first = next((r for r in missing if r.is_skipped), missing[0])
        return Reward(
            value=None,
            details=details | {k: v for k, v in first.details.items() if k == "unscored"},
            is_retryable=all(r.is_retryable for r in missing),
            is_skipped=first.is_skipped,
        )
    values = [r.value for r in applied if r.value is not None]
    if not values:
        return Reward(value=None, details=details, applies=False)
    # Exact, so that lessons with the same values in another order are worth the same.
    return Reward(value=math.fsum(values) / len(values), details=details)
