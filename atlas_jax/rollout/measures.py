"""Metrics of the samples of a step, each `(sum, weight)`: rewards, judges and completions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from atlas_jax.rewards.combined import each_answer
from atlas_jax.rewards.pricing import NO_HONEST
from atlas_jax.types import Metrics, Sample, by_question


def of_rewards(samples: Sequence[Sample], names: Sequence[str]) -> Metrics:
    """Returns the metrics of the rewards, and of each of `names` where there are several."""
    groups = by_question(samples)
    values = [[s.reward.value for s in group if s.reward.value is not None] for group in groups]
    scored = [value for group in values for value in group]
    several = [group for group in values if len(group) > 1]
    spreads = [float(np.std(group, ddof=1)) for group in several]
    # A standard deviation of equal numbers need not be 0: their mean is rounded.
    equal = sum(max(group) == min(group) for group in several)
    dishonest = sum(
        any(s.reward.details.get("unscored") == NO_HONEST for s in group) for group in groups
    )
    skipped = sum(s.reward.is_skipped for s in samples)
    measured = {
        "reward/mean": (float(np.sum(scored)), len(scored)),
        "reward/std": (float(np.sum(spreads)), len(spreads)),
        "reward/zero_std_group_frac": (equal, len(spreads)),
        "reward/failed_frac": (len(samples) - len(scored), len(samples)),
        "reward/no_honest_group_frac": (dishonest, len(groups)),
        "reward/skipped_frac": (skipped, len(samples)),
    }
    for name in names if len(names) > 1 else ():
        parts = [s.reward.details[name]["value"] for s in samples]
        given = [part for part in parts if part is not None]
        measured[f"reward/{name}"] = (float(np.sum(given)), len(given))
    return measured


def of_functions(samples: Sequence[Sample]) -> Metrics:
    """Returns the metrics of rewards that are functions of the user."""
    failed = sum(
        any(
            "error" in answer
            for part in s.reward.details.values()
            if isinstance(part, dict)
            for answer in each_answer(part)
        )
        for s in samples
    )
    return {"reward/error_frac": (failed, len(samples))}


def of_judges(samples: Sequence[Sample], names: Sequence[str]) -> Metrics:
    """Returns the metrics of the judges' reward, per answer; `names` are the active judges."""
    judged = (answer for s in samples for answer in each_answer(s.reward.details["rim"]))
    heard = [details for details in judged if "judges" in details]
    verdicts = [v for d in heard for v in d["judges"].values()]
    spreads = [v["spread"] for v in verdicts if len(v["samples"]) > 1]
    calls, cached, tokens = (sum(d[k] for d in heard) for k in ("calls", "cached", "tokens"))
    costs = [d["cost"] for d in heard if d["cost"] is not None]
    measured = {
        "reward/judge_missing_frac": (
            sum(v["stated_score"] is None for v in verdicts),
            len(verdicts),
        ),
        "reward/opinions_missing_frac": (
            sum(len(v["failures"]) for v in verdicts),
            sum(v["asked"] for v in verdicts),
        ),
        "reward/escalated_frac": (sum(bool(v["escalation"]) for v in verdicts), len(verdicts)),
        "reward/disagreement": (sum(spreads), len(spreads)),
        "reward/gamed_frac": (sum(bool(d["gaming"]) for d in heard), len(heard)),
        "reward/cache_hit_frac": (cached, cached + calls),
        "reward/calls": (calls, len(heard)),
        "reward/tokens": (tokens, len(heard)),
        "reward/cost": (sum(costs), len(costs)),
    }
    for name in names:
        scores = [d["judges"][name]["score"] for d in heard]
        given = [score for score in scores if score is not None]
        measured[f"rim_rewards/{name}"] = (sum(given), len(given))
    return measured


def of_generation(samples: Sequence[Sample], version: int) -> Metrics:
    """Returns the metrics of the policy's completions, trained at `version`, and their prompts."""
    written = [s.completion for s in samples]
    whole = [c for c in written if c.token_ids]
    lengths = sum(c.num_sampled for c in whole)
    lags = [version - c.weights_version for c in whole]
    token_lags = [
        version - written_by
        for c in whole
        for written_by, sampled in zip(
            c.token_versions, c.sampled or (True,) * c.num_tokens, strict=True
        )
        if sampled
    ]
    return {
        "rollout/completion_tokens": (lengths, len(whole)),
        "rollout/prompt_tokens": (sum(len(c.prompt_ids) for c in whole), len(whole)),
        "rollout/truncated_frac": (sum(c.finish_reason == "length" for c in whole), len(written)),
        "rollout/failed_frac": (len(written) - len(whole), len(written)),
        "rollout/text_repeat_frac": (_repeats(samples), len(written)),
        "rollout/version_lag": (sum(token_lags), len(token_lags)),
        "rollout/version_lag_max": (max(lags, default=0), min(len(whole), 1)),
        "rollout/version_lag_none_frac": (lags.count(0), len(whole)),
        "rollout/version_lag_one_frac": (lags.count(1), len(whole)),
        "rollout/version_lag_two_frac": (lags.count(2), len(whole)),
        "rollout/version_lag_more_frac": (sum(lag > 2 for lag in lags), len(whole)),
    }


def of_episodes(samples: Sequence[Sample]) -> Metrics:
    """Returns the metrics of conversations: turns of the policy, and tokens of everyone else."""
    whole = [s for s in samples if s.completion.token_ids]
    turns = sum(m["role"] == "assistant" for s in whole for m in s.messages)
    observed = sum(s.completion.num_tokens - s.completion.num_sampled for s in whole)
    return {
        "rollout/turns": (turns, len(whole)),
        "rollout/observed_tokens": (observed, len(whole)),
    }


def _repeats(samples: Sequence[Sample]) -> int:
    """Returns the number of completions that are the same as an earlier one of their group."""
    groups = [[s.completion.token_ids for s in group] for group in by_question(samples)]
    return sum(len(group) - len(set(group)) for group in groups if all(group))
