"""Metrics of teaching, as the ATLAS report has them: answers with a lesson against those without.

Every metric is `(sum, weight)`. Accuracies and rates are over samples with a ground truth whose
texts all exist. Where the student has given several answers, a sample counts with the mean over
them: over its answers for an accuracy, and over all pairs of an answer alone and one with the
lesson for a rate of change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from atlas_jax.rewards.answers import extract_answer
from atlas_jax.rewards.leaks import states_answer
from atlas_jax.rewards.verifiable import is_right
from atlas_jax.rollout.teaching import has_lesson, is_malformed
from atlas_jax.types import Completion, Metrics, Sample


def of_efficiency(samples: Sequence[Sample]) -> Metrics:
    """Returns the reward for every 100 tokens of the policy."""
    earned = sum(s.reward.value for s in samples if s.reward.value is not None)
    spent = _tokens(s.completion for s in samples)
    return {"teaching/token_efficiency": (100.0 * earned, spent)}


def of_teaching(samples: Sequence[Sample]) -> Metrics:
    """Returns the metrics of baseline against guided answers."""
    pairs = [
        (s, _right_share(s.baselines, truth), _right_share(s.guided_answers, truth))
        for s in samples
        if (truth := s.question.ground_truth) and s.baseline and s.guided
        if all(c.token_ids for c in (*s.baselines, *s.guided_answers))
    ]
    count = len(pairs)
    before = sum(b for _, b, _ in pairs)
    after = sum(a for _, _, a in pairs)
    # Without a lesson nothing has changed; chance alone makes the same answers differ.
    changed = [(b, a) for s, b, a in pairs if s.guided is not s.baseline]
    lost = sum(b * (1 - a) for b, a in changed)
    won = sum(a * (1 - b) for b, a in changed)
    lessons = [s for s in samples if s.completion.token_ids]
    missing = sum(not has_lesson(s.completion.text) for s in lessons)
    malformed = sum(is_malformed(s.completion.text) for s in lessons)
    baseline = sum(_mean([c.num_sampled for c in s.baselines]) for s, _, _ in pairs)
    guided = sum(_mean([c.num_sampled for c in s.guided_answers]) for s, _, _ in pairs)
    complete = sum(_mean([_completes(c) for c in s.guided_answers]) for s, _, _ in pairs)
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
        "teaching/malformed_frac": (malformed, len(lessons)),
        "teaching/answer_leak_frac": (leaks, count),
        "teaching/probe_tokens": (_tokens(s.probe for s in samples), len(samples)),
    }


def _right_share(completions: Sequence[Completion], truth: str) -> int | float:
    return _mean([is_right(completion, truth) for completion in completions])


def _mean(values: Sequence[int | float]) -> int | float:
    """Returns the mean; a single number stays as it is, so that counts stay whole."""
    return values[0] if len(values) == 1 else sum(values) / len(values)


def _completes(completion: Completion) -> bool:
    """Returns True if an answer ended by itself and holds an answer."""
    return completion.finish_reason == "stop" and extract_answer(completion.text) is not None


def _tokens(completions: Iterable[Completion | None]) -> int:
    return sum(c.num_sampled for c in completions if c)
