"""What groups of rollouts tell: the teaching metrics of the ATLAS report, and rewards.

Every metric is `(sum, weight)`. Accuracies and rates are over rollouts with a ground truth whose
texts all came about.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from atlas_jax.rewards.answers import extract_answer
from atlas_jax.rewards.leaks import states_answer
from atlas_jax.rewards.pricing import NO_HONEST
from atlas_jax.rewards.verifiable import is_right
from atlas_jax.rollout.teaching import has_lesson
from atlas_jax.types import Completion, Metrics, RewardResult, Rollout


def of_rewards(results: Sequence[Sequence[RewardResult]], names: Sequence[str]) -> Metrics:
    """Returns the metrics of the scores `[N][G]`, of their parts too."""
    scores = [[r.score for r in group] for group in results]
    scored = [s for group in scores for s in group if s is not None]
    groups = [[s for s in group if s is not None] for group in scores]
    spreads = [float(np.std(g, ddof=1)) for g in groups if len(g) > 1]
    total = sum(map(len, scores))
    found = {
        "reward/mean": (float(np.sum(scored)), len(scored)),
        "reward/std": (float(np.sum(spreads)), len(spreads)),
        "reward/zero_std_group_frac": (
            # A standard deviation of equal numbers need not be 0: their mean is rounded.
            sum(max(g) == min(g) for g in groups if len(g) > 1),
            len(spreads),
        ),
        "reward/failed_frac": (total - len(scored), total),
        "reward/no_honest_group_frac": (
            sum(any(r.details.get("unscored") == NO_HONEST for r in g) for g in results),
            len(results),
        ),
        "reward/skipped_frac": (sum(r.is_skipped for group in results for r in group), total),
    }
    for name in names if len(names) > 1 else ():
        parts = [r.details[name]["score"] for group in results for r in group]
        known = [p for p in parts if p is not None]
        found[f"reward/{name}"] = (float(np.sum(known)), len(known))
    return found


def of_judges(results: Sequence[Sequence[RewardResult]], names: Sequence[str]) -> Metrics:
    """Returns the metrics of the judges' reward, per sample; `names` are the active judges."""
    heard = [d for group in results for r in group if "judges" in (d := r.details["rim"])]
    verdicts = [v for d in heard for v in d["judges"].values()]
    several = [v["spread"] for v in verdicts if len(v["samples"]) > 1]
    calls, cached, tokens = (sum(d[k] for d in heard) for k in ("calls", "cached", "tokens"))
    costs = [d["cost"] for d in heard if d["cost"] is not None]
    found = {
        "reward/judge_missing_frac": (
            sum(v["stated_score"] is None for v in verdicts),
            len(verdicts),
        ),
        "reward/opinions_missing_frac": (
            sum(len(v["failures"]) for v in verdicts),
            sum(v["asked"] for v in verdicts),
        ),
        "reward/escalated_frac": (sum(bool(v["escalation"]) for v in verdicts), len(verdicts)),
        "reward/disagreement": (sum(several), len(several)),
        "reward/gamed_frac": (sum(bool(d["gaming"]) for d in heard), len(heard)),
        "reward/cache_hit_frac": (cached, cached + calls),
        "reward/calls": (calls, len(heard)),
        "reward/tokens": (tokens, len(heard)),
        "reward/cost": (sum(costs), len(costs)),
    }
    for name in names:
        scores = [d["judges"][name]["score"] for d in heard]
        known = [s for s in scores if s is not None]
        found[f"rim_rewards/{name}"] = (sum(known), len(known))
    return found


def of_generation(groups: Sequence[Sequence[Rollout]], version: int) -> Metrics:
    """Returns the metrics of the policy's completions, trained at `version`, and their prompts."""
    written = [r.policy for group in groups for r in group]
    whole = [c for c in written if c.token_ids]
    lengths = sum(c.num_tokens for c in whole)
    return {
        "rollout/completion_tokens": (lengths, len(whole)),
        "rollout/prompt_tokens": (sum(len(c.prompt_ids) for c in whole), len(whole)),
        "rollout/truncated_frac": (sum(c.finish_reason == "length" for c in whole), len(written)),
        "rollout/failed_frac": (len(written) - len(whole), len(written)),
        "rollout/text_repeat_frac": (_repeats(groups), len(written)),
        "rollout/version_lag_max": (
            max((version - c.weights_version for c in whole), default=0),
            min(len(whole), 1),
        ),
    }


def of_efficiency(
    groups: Sequence[Sequence[Rollout]], results: Sequence[Sequence[RewardResult]]
) -> Metrics:
    """Returns the reward for every 100 tokens of the policy."""
    earned = sum(r.score for group in results for r in group if r.score is not None)
    spent = _tokens(r.policy for group in groups for r in group)
    return {"teaching/token_efficiency": (100.0 * earned, spent)}


def of_teaching(groups: Sequence[Sequence[Rollout]]) -> Metrics:
    """Returns the metrics of baseline against guided answers."""
    rollouts = [r for group in groups for r in group]
    pairs = [
        (r, is_right(r.baseline, truth), is_right(r.guided, truth))
        for r in rollouts
        if (truth := r.question.ground_truth) and r.baseline and r.guided
        if r.baseline.token_ids and r.guided.token_ids
    ]
    count = len(pairs)
    before, after = sum(b for _, b, _ in pairs), sum(a for _, _, a in pairs)
    lost = sum(b > a for _, b, a in pairs)
    won = sum(a > b for _, b, a in pairs)
    lessons = [r for r in rollouts if r.policy.token_ids]
    baseline = _tokens(r.baseline for r, _, _ in pairs)
    guided = _tokens(r.guided for r, _, _ in pairs)
    complete = sum(_completes(r.guided) for r, _, _ in pairs)
    leaks = sum(
        states_answer(r.teaching, r.question.ground_truth, r.question.question) for r, _, _ in pairs
    )
    return {
        "teaching/student_accuracy": (after, count),
        "teaching/baseline_accuracy": (before, count),
        "teaching/accuracy_delta": (after - before, count),
        "teaching/improvement_rate": (won, count),
        "teaching/degradation_rate": (lost, count),
        "teaching/non_degradation_rate": (count - lost, count),
        "teaching/completion_rate": (complete, count),
        "teaching/response_token_reduction": (baseline - guided, baseline),
        "teaching/missing_frac": (
            sum(not has_lesson(r.policy.text) for r in lessons),
            len(lessons),
        ),
        "teaching/answer_leak_frac": (leaks, count),
        "teaching/probe_tokens": (_tokens(r.probe for r in rollouts), len(rollouts)),
    }


def _tokens(completions: Iterable[Completion | None]) -> int:
    return sum(c.num_tokens for c in completions if c)


def _completes(completion: Completion | None) -> bool:
    """Whether an answer ended by itself and holds an answer."""
    return bool(
        completion
        and completion.finish_reason == "stop"
        and extract_answer(completion.text) is not None
    )


def _repeats(groups: Sequence[Sequence[Rollout]]) -> int:
    """Returns how many completions are the same as an earlier one of their group."""
    return sum(
        len(group) - len({r.policy.token_ids for r in group})
        for group in groups
        if all(r.policy.token_ids for r in group)
    )
