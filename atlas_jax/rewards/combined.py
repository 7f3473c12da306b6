"""Weighted sums of rewards, and the rewards of samples whose texts do not exist."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from atlas_jax.types import Completion, Reward, RewardFn, Sample


def combine(rewards: Mapping[str, tuple[RewardFn, float]]) -> RewardFn:
    """Returns the weighted sum of named rewards.

    A reward that does not apply to a sample adds nothing to it, and a sample to which none applies
    is skipped. A sample has no value where a reward that applies and has weight gives none. It is
    retryable where each of these is, and skipped where one of these is. A reward of weight 0 is
    recorded only. The details are those of each reward, under its name and with its value.

    Raises:
        ValueError: if a weight is not finite or none differs from 0. The reward itself raises it
            for a value that is not finite, and for a list that is not as long as the samples.
    """
    weights = {name: weight for name, (_, weight) in rewards.items()}
    if not any(weights.values()) or not all(map(math.isfinite, weights.values())):
        raise ValueError(
            f"the weights of the rewards are {weights}; give finite ones that are not all 0"
        )

    def score(samples: Sequence[Sample]) -> list[Reward]:
        # Each reward gets all samples at one time, since judges ask for them together.
        columns = {name: _checked(name, reward, samples) for name, (reward, _) in rewards.items()}
        rows = (
            {name: results[i] for name, results in columns.items()} for i in range(len(samples))
        )
        return [_weighted(row, weights) for row in rows]

    return score


def each_answer(details: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the details of a reward for each of the student's answers; see `repeated`."""
    return details.get("answers", [details])


def failure(completions: Mapping[str, Completion | None]) -> Reward | None:
    """Returns the reward of a sample of which a text is missing or failed; None if all exist.

    It names the first of the skipped texts, if there is one: an engine that works again would not
    help such a sample.

    Args:
        completions: the texts that a reward needs, by name.
    """
    reasons: dict[str, str] = {}
    skipped: list[str] = []
    for name, completion in completions.items():
        if completion is None:
            reasons[name] = f"no {name}"
        elif completion.is_failed:
            reasons[name] = f"{name}: {completion.finish_reason}"
            skipped += [name] * completion.is_skipped
    if not reasons:
        return None
    first = (skipped or list(reasons))[0]
    return Reward(value=None, details={"unscored": reasons[first]}, is_skipped=bool(skipped))


def _checked(name: str, reward: RewardFn, samples: Sequence[Sample]) -> list[Reward]:
    rewards = reward(samples)
    if len(rewards) != len(samples):
        ids = [sample.question.id for sample in samples[:3]]
        raise ValueError(
            f"reward {name!r} returned {len(rewards)} rewards for {len(samples)} samples "
            f"(first: {ids}); return one Reward for each, with value None where there is none"
        )
    for sample, given in zip(samples, rewards, strict=True):
        if given.value is not None and not math.isfinite(given.value):
            raise ValueError(
                f"reward {name!r} of sample {sample.question.id!r} is {given.value}; return a "
                "finite number, or None for a sample that cannot be scored"
            )
    return rewards


def _weighted(row: Mapping[str, Reward], weights: Mapping[str, float]) -> Reward:
    details: dict[str, Any] = {n: {**r.details, "value": r.value} for n, r in row.items()}
    weighed = [(weights[n], r) for n, r in row.items() if weights[n] and r.applies]
    if not weighed:
        details["unscored"] = "no reward applies to it"
        return Reward(value=None, details=details, is_skipped=True)
    missing = [r for _, r in weighed if r.value is None]
    if missing:
        return Reward(
            value=None,
            details=details,
            is_retryable=all(r.is_retryable for r in missing),
            is_skipped=any(r.is_skipped for r in missing),
        )
    value = sum(weight * r.value for weight, r in weighed if r.value is not None)
    return Reward(value=value, details=details)
