"""The soft penalty of completions that come near their limit."""

from __future__ import annotations

from collections.abc import Sequence

from atlas_jax.types import Metrics, Sample

_TAKEN = "overlong"
"""Key in the details of a reward for what was taken off."""


def penalized(samples: Sequence[Sample], longest: int, window: int, penalty: float) -> list[Sample]:
    """Returns the samples with lower rewards for long completions.

    The last `window` tokens before `longest` cost the reward, each the same, and all of them
    `penalty`. A sample without a reward stays without one.

    Args:
        samples: scored samples.
        longest: most tokens of a completion.
        window: number of tokens over which the penalty rises, above 0.
        penalty: subtracted from the reward of the longest completion.

    Reference: DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 13, where the penalty is 1.
    """
    priced = []
    for sample in samples:
        over = sample.completion.num_tokens - (longest - window)
        reward = sample.reward
        if over > 0 and reward.value is not None:
            taken = penalty * min(over / window, 1.0)
            details = {**reward.details, _TAKEN: taken}
            reward = reward._replace(value=reward.value - taken, details=details)
        priced.append(sample._replace(reward=reward))
    return priced


def metrics(samples: Sequence[Sample]) -> Metrics:
    """Returns the mean penalty of samples with a reward."""
    scored = [s.reward for s in samples if s.reward.value is not None]
    taken = sum(reward.details.get(_TAKEN, 0.0) for reward in scored)
    return {"reward/overlong_penalty": (taken, len(scored))}
