"""Rewards that compare answers with a known one: what is right, and what teaching changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from atlas_jax.rewards.answers import extract_answer, is_correct, normalise
from atlas_jax.types import Completion, Reward, RewardResult, Rollout

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


def exact_match() -> Reward:
    """Returns the reward that is 1 for a correct answer and 0 for any other.

    None where there is no ground truth or the completion failed.
    """

    def score(rollout: Rollout) -> RewardResult:
        text, truth = rollout.answer.text, rollout.question.ground_truth
        if unscored := _unscored(truth, {"answer": rollout.answer}):
            return unscored
        correct = is_right(rollout.answer, truth)
        return RewardResult(float(correct), {"correct": correct, "extracted": extract_answer(text)})

    return lambda rollouts: [score(rollout) for rollout in rollouts]


def teaching_gain(efficiency_weight: float = 1.0, degradation_penalty: float = 1.0) -> Reward:
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

    def score(rollout: Rollout) -> RewardResult:
        truth, baseline, guided = rollout.question.ground_truth, rollout.baseline, rollout.guided
        completions = {"lesson": rollout.policy, "baseline": baseline, "guided answer": guided}
        if unscored := _unscored(truth, completions):
            return unscored
        assert baseline is not None and guided is not None
        before, after = is_right(baseline, truth), is_right(guided, truth)
        efficiency = _efficiency(baseline.num_tokens, guided.num_tokens)
        gain = 0.0 if before == after else 1.0 if after else -degradation_penalty
        gain += efficiency_weight * efficiency if after else 0.0
        details = {"baseline_correct": before, "correct": after, "efficiency": efficiency}
        return RewardResult(gain, details)

    return lambda rollouts: [score(rollout) for rollout in rollouts]


def combine(rewards: Mapping[str, tuple[Reward, float]]) -> Reward:
    """Returns the weighted sum of named rewards.

    A sample is None where a reward that has weight says None. It may be scored later where each of
    these may, and is skipped where one of these is. A reward of weight 0 is recorded only. The
    details are those of each reward, under its name and with its score.

    Raises:
        ValueError: if a weight is not finite or none differs from 0. The reward itself raises it
            for a score that is not finite, and for a list that is not as long as the rollouts.
    """
    weights = {name: weight for name, (_, weight) in rewards.items()}
    if not any(weights.values()) or not all(map(math.isfinite, weights.values())):
        raise ValueError(
            f"the weights of the rewards are {weights}; give finite ones that are not all 0"
        )

    def score(rollouts: Sequence[Rollout]) -> list[RewardResult]:
        columns = {name: _checked(name, reward, rollouts) for name, (reward, _) in rewards.items()}
        rows = (
            {name: results[i] for name, results in columns.items()} for i in range(len(rollouts))
        )
        return [_weighted(row, weights) for row in rows]

    return score


def _unscored(
    ground_truth: str, completions: Mapping[str, Completion | None]
) -> RewardResult | None:
    """Returns the result of a rollout that cannot be scored; None if it can be."""
    if ground_truth.strip():
        return failure(completions)
    return RewardResult(None, {"unscored": "no ground truth"}, is_skipped=True)


def failure(completions: Mapping[str, Completion | None]) -> RewardResult | None:
    """Returns the result of a rollout whose texts did not all come about; None if they did.

    It names the first of the skipped texts, if there is one: an engine that works again would not
    help such a sample.

    Args:
        completions: the texts that a reward needs, by name.
    """
    reasons, skipped = {}, []
    for name, completion in completions.items():
        if completion is None:
            reasons[name] = f"no {name}"
        elif completion.is_failed:
            reasons[name] = f"{name}: {completion.finish_reason}"
            skipped += [name] * completion.is_skipped
    if not reasons:
        return None
    first = (skipped or list(reasons))[0]
    return RewardResult(None, {"unscored": reasons[first]}, is_skipped=bool(skipped))


def _efficiency(baseline_tokens: int, guided_tokens: int) -> float:
    if not baseline_tokens:
        return 0.0
    return max(0.0, (baseline_tokens - guided_tokens) / baseline_tokens)


def _check_option(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} of the reward is {value}; set a finite number of 0 or more")


def _checked(name: str, reward: Reward, rollouts: Sequence[Rollout]) -> list[RewardResult]:
    results = reward(rollouts)
    if len(results) != len(rollouts):
        ids = [rollout.question.id for rollout in rollouts[:3]]
        raise ValueError(
            f"reward {name!r} returned {len(results)} results for {len(rollouts)} samples "
            f"(first: {ids}); return one RewardResult for each, with score None where there is none"
        )
    for rollout, result in zip(rollouts, results, strict=True):
        if result.score is not None and not math.isfinite(result.score):
            raise ValueError(
                f"reward {name!r} of sample {rollout.question.id!r} is {result.score}; return a "
                "finite score, or None for a sample that cannot be scored"
            )
    return results


def _weighted(row: Mapping[str, RewardResult], weights: Mapping[str, float]) -> RewardResult:
    details: dict[str, Any] = {n: {**r.details, "score": r.score} for n, r in row.items()}
    weighed = [(weights[n], r) for n, r in row.items() if weights[n]]
    missing = [r for _, r in weighed if r.score is None]
    if missing:
        return RewardResult(
            score=None,
            details=details,
            later=all(r.later for r in missing),
            is_skipped=any(r.is_skipped for r in missing),
        )
    return RewardResult(sum(w * r.score for w, r in weighed if r.score is not None), details)
