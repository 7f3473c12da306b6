"""Rewards that compare answers with a known one: what is right, and what teaching changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from atlas_jax.rewards.answers import extract_answer, is_correct, normalise
from atlas_jax.types import Completion, Reward, RewardFn, Sample

__all__ = [
    "combine",
    "exact_match",
    "extract_answer",
    "is_correct",
    "is_right",
    "normalise",
    "teaching_gain",
]


def is_right(completion: Completion, ground_truth: str) -> bool:
    """Returns whether a completion answers right; one cut by its limit must mark its answer."""
    is_cut = completion.finish_reason == "length"
    return is_correct(completion.text, ground_truth, is_cut)


def exact_match() -> RewardFn:
    """Returns the reward that is 1 for a correct answer and 0 for any other.

    None where there is no ground truth or the completion failed.
    """

    def score(sample: Sample) -> Reward:
        answer = sample.answer
        truth = sample.question.ground_truth
        if unscored := _unscored(truth, {"answer": answer}):
            return unscored
        correct = is_right(answer, truth)
        details = {"correct": correct, "extracted": extract_answer(answer.text)}
        return Reward(value=float(correct), details=details)

    return lambda samples: [score(sample) for sample in samples]


def teaching_gain(efficiency_weight: float = 1.0, degradation_penalty: float = 1.0) -> RewardFn:
    """Returns the reward of what a lesson changed between the student's two answers.

    Wrong to right is 1 + w e, right to right is w e, right to wrong is minus the degradation
    penalty, wrong to wrong is 0. What a lesson that states the answer costs, `pricing` says.
    e = max(0, (baseline tokens - guided tokens) / baseline tokens), of the full answers, and w is
    the efficiency weight. None where there is no ground truth, or a completion is missing or
    failed.

    Raises:
        ValueError: for an option that is negative or not finite.

    Reference: reward `adaptive_teaching` of RCL, the predecessor of ATLAS (Arc Intelligence).
    """
    _check_option("efficiency_weight", efficiency_weight)
    _check_option("degradation_penalty", degradation_penalty)

    def score(sample: Sample) -> Reward:
        truth = sample.question.ground_truth
        baseline = sample.baseline
        guided = sample.guided
        completions = {"lesson": sample.completion, "baseline": baseline, "guided answer": guided}
        if unscored := _unscored(truth, completions):
            return unscored
        assert baseline is not None and guided is not None
        before = is_right(baseline, truth)
        after = is_right(guided, truth)
        efficiency = _efficiency(baseline.num_tokens, guided.num_tokens)
        gain = 0.0 if before == after else 1.0 if after else -degradation_penalty
        gain += efficiency_weight * efficiency if after else 0.0
        details = {"baseline_correct": before, "correct": after, "efficiency": efficiency}
        return Reward(value=gain, details=details)

    return lambda samples: [score(sample) for sample in samples]


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


def _unscored(ground_truth: str, completions: Mapping[str, Completion | None]) -> Reward | None:
    """Returns the reward of a sample that cannot be scored; None if it can be."""
    if ground_truth.strip():
        return failure(completions)
    return Reward(value=None, details={"unscored": "no ground truth"}, is_skipped=True)


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


def _efficiency(baseline_tokens: int, guided_tokens: int) -> float:
    if not baseline_tokens:
        return 0.0
    return max(0.0, (baseline_tokens - guided_tokens) / baseline_tokens)


def _check_option(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} of the reward is {value}; set a finite number of 0 or more")


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
