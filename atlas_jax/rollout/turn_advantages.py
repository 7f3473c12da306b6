"""Advantages of the turns that an episode has rewarded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from atlas_jax import distributed
from atlas_jax.types import Metrics, Sample, by_question


def add(
    samples: Sequence[Sample], advantages_of: Callable[[np.ndarray], np.ndarray]
) -> list[Sample]:
    """Returns the samples with the advantages of their turns; every process must call it.

    The rewards of all turns of a group are compared with each other, as those of its completions
    are. A token's advantage is that of its completion plus those of its own turn and of later ones
    (`rows.token_advantages`). Turns without a reward and samples without a score do not count.

    Args:
        samples: the members of each question together.
        advantages_of: rewards of this process's groups, `[N, K]` with NaN where there is none, to
            advantages.

    Reference: Shao et al. 2024, arXiv:2402.03300, section 4.1.3, with turns as steps.
    """
    groups = by_question(samples)
    rewards = [[value for s in group for _, value in _scored(s)] for group in groups]
    widest = distributed.max_over_processes(max(map(len, rewards), default=0))
    if not widest:
        return list(samples)
    padded = np.full((len(groups), widest), np.nan)
    for row, values in zip(padded, rewards, strict=True):
        row[: len(values)] = values
    weighed = []
    for group, row in zip(groups, advantages_of(padded), strict=True):
        advantages = iter(row.tolist())
        for sample in group:
            turns = tuple((end, next(advantages)) for end, _ in _scored(sample))
            weighed.append(sample._replace(turn_advantages=turns))
    return weighed


def differ(samples: Sequence[Sample]) -> bool:
    """Returns True if turns of a group have different rewards."""
    return len({value for sample in samples for _, value in _scored(sample)}) > 1


def metrics(samples: Sequence[Sample]) -> Metrics:
    """Returns the mean reward of the turns that have one."""
    values = [value for sample in samples for _, value in sample.completion.turn_rewards]
    return {"reward/turn_mean": (float(np.sum(values)), len(values))}


def _scored(sample: Sample) -> tuple[tuple[int, float], ...]:
    return () if sample.reward.value is None else sample.completion.turn_rewards
