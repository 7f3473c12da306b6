"""Rewards that compare answers with a known one: what is right, and what teaching changed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from atlas_jax.rewards.answers import extract_answer, is_correct, normalise
from atlas_jax.rewards.combined import failure
from atlas_jax.types import Completion, Reward, RewardFn, Sample

__all__ = [
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


def _unscored(ground_truth: str, completions: Mapping[str, Completion | None]) -> Reward | None:
    """Returns the reward of a sample that cannot be scored; None if it can be."""
    if ground_truth.strip():
        return failure(completions)
    return Reward(value=None, details={"unscored": "no ground truth"}, is_skipped=True)


def _efficiency(baseline_tokens: int, guided_tokens: int) -> float:
    if not baseline_tokens:
        return 0.0
    return max(0.0, (baseline_tokens - guided_tokens) / baseline_tokens)


def _check_option(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} of the reward is {value}; set a finite number of 0 or more")
