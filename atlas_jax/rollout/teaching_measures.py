"""Metrics of teaching, as the ATLAS report has them: answers with a lesson against those without.

Every metric is `(sum, weight)`. Accuracies and rates are over samples with a ground truth whose
texts all exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from atlas_jax.rewards.answers import extract_answer
from atlas_jax.rewards.leaks import states_answer
from atlas_jax.rewards.verifiable import is_right
from atlas_jax.rollout.teaching import has_lesson
from atlas_jax.types import Completion, Metrics, Sample


def of_efficiency(samples: Sequence[Sample]) -> Metrics:
    """Returns the reward for every 100 tokens of the policy."""
    earned = sum(s.reward.value for s in samples if s.reward.value is not None)
    spent = _tokens(s.completion for s in samples)
    return {"teaching/token_efficiency": (100.0 * earned, spent)}


def of_teaching(samples: Sequence[Sample]) -> Metrics:
    """Returns the metrics of baseline against guided answers."""
    pairs = [
        (s, is_right(s.baseline, truth), is_right(s.guided, truth))
        for s in samples
        if (truth := s.question.ground_truth) and s.baseline and s.guided
        if s.baseline.token_ids and s.guided.token_ids
    ]
    count = len(pairs)
    before = sum(b for _, b, _ in pairs)
    after = sum(a for _, _, a in pairs)
    lost = sum(b > a for _, b, a in pairs)
    won = sum(a > b for _, b, a in pairs)
    lessons = [s for s in samples if s.completion.token_ids]
    missing = sum(not has_lesson(s.completion.text) for s in lessons)
    baseline = _tokens(s.baseline for s, _, _ in pairs)
    guided = _tokens(s.guided for s, _, _ in pairs)
    complete = sum(_completes(s.guided) for s, _, _ in pairs)
    leaks = sum(
        states_answer(s.teaching, s.question.ground_truth, s.question.text) for s, _, _ in pairs
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
        "teaching/missing_frac": (missing, len(lessons)),
        "teaching/answer_leak_frac": (leaks, count),
        "teaching/probe_tokens": (_tokens(s.probe for s in samples), len(samples)),
    }


def _completes(completion: Completion | None) -> bool:
    """Returns True if an answer ended by itself and holds an answer."""
    return bool(
        completion
        and completion.finish_reason == "stop"
        and extract_answer(completion.text) is not None
    )


def _tokens(completions: Iterable[Completion | None]) -> int:
    return sum(c.num_sampled for c in completions if c)
