"""Baseline against taught answers on the same questions, with how sure the difference is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from atlas_jax import metrics
from atlas_jax.rewards.verifiable import is_right
from atlas_jax.rollout import teaching, teaching_measures
from atlas_jax.rollout.engine import ChatModel
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.student_cache import StudentCache
from atlas_jax.types import Completion, Metrics, Question, Sample

_RESAMPLES = 2000


class Interval(NamedTuple):
    """A metric and its 95 % bootstrap interval over questions."""

    value: float
    low: float
    high: float


def ask(
    questions: Sequence[Question],
    policy: ChatModel,
    student: ChatModel | None,
    protocol: teaching.TeachingProtocol,
    sampling: Sampling,
    cache: StudentCache | None = None,
) -> list[Sample]:
    """Returns one sample of each question.

    Args:
        questions: to ask.
        policy: the teacher, or what answers itself.
        student: None under `protocol=direct`.
        protocol: how a sample comes about.
        sampling: how tokens are drawn.
        cache: what this student has said alone, for other teachers and other steps.
    """
    draws = teaching.Draws(sampling, 0)
    # One answer each: a table of right and wrong answers counts questions.
    protocol = protocol._replace(num_guided=1, num_baseline=1)
    places = range(len(questions))
    return teaching.run(questions, places, policy, student, protocol, draws, cache)


def summary(samples: Sequence[Sample], taught: bool) -> dict[str, float]:
    """Returns the metrics of `teaching_measures.of_teaching`, or the accuracy of direct answers.

    They are over the samples of all processes, each of which calls this with its own.
    """
    values = metrics.means(metrics.sum_over_processes(_measure(samples, taught)))
    return {name.removeprefix("teaching/"): value for name, value in values.items()}


def intervals(samples: Sequence[Sample], seed: int = 0) -> dict[str, Interval]:
    """Returns each metric of `summary` with its percentile bootstrap interval.

    Reference: Efron, Bootstrap methods (1979); questions are drawn with replacement.
    """
    taught = _taught(samples)
    each = [_measure([sample], taught) for sample in samples]
    names = list(each[0])
    table = np.asarray([[one[name] for name in names] for one in each], float)  # [N, metrics, 2]
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(each), np.full(len(each), 1 / len(each)), size=_RESAMPLES)
    # Sums and weights are drawn together: the ratio of the sums is the metric, not a mean of
    # ratios.
    sums = np.einsum("rn,nmk->rmk", drawn, table)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = sums[..., 0] / sums[..., 1]
        values = table.sum(0)[:, 0] / table.sum(0)[:, 1]
    result = {}
    for i, name in enumerate(names):
        # A draw may hold no question to which the metric applies.
        known = ratios[:, i][np.isfinite(ratios[:, i])]
        low, high = np.quantile(known, (0.025, 0.975)) if known.size else (math.nan, math.nan)
        key = name.removeprefix("teaching/")
        result[key] = Interval(float(values[i]), float(low), float(high))
    return result


def mcnemar(improved: int, degraded: int) -> float:
    """Returns the two-sided p-value that changes to right and to wrong are equally likely.

    The exact test of McNemar (Psychometrika 12, 1947): the smaller count under Binomial(n, 1/2).
    """
    changed = improved + degraded
    fewer = min(improved, degraded)
    tail = sum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed
    return min(1.0, 2 * tail)


def report(samples: Sequence[Sample], seed: int = 0) -> dict[str, Any]:
    """Returns the evaluation as JSON values; what nothing is known of is None.

    `compared` are the questions that the student answered alone and taught.
    """
    by_metric = intervals(samples, seed)
    result: dict[str, Any] = {
        "questions": len(samples),
        "metrics": {
            name: {k: v if math.isfinite(v) else None for k, v in interval._asdict().items()}
            for name, interval in by_metric.items()
        },
    }
    counted = _measure(samples, _taught(samples))
    if "teaching/improvement_rate" in counted:
        improved = counted["teaching/improvement_rate"][0]
        degraded = counted["teaching/degradation_rate"][0]
        result |= {
            "compared": counted["teaching/student_accuracy"][1],
            "improved": improved,
            "degraded": degraded,
            "mcnemar_p": mcnemar(improved, degraded),
        }
    return result


def table(results: Sequence[dict[str, Any]]) -> str:
    """Returns reports on one or more teachers, asked the same questions, side by side."""
    labels = _labels(len(results))
    head = "".join(f"{label or 'value':>10}  {'95 % interval':<18}" for label in labels)
    lines = [f"{'metric':<24}{head}"]
    for name in results[0]["metrics"]:
        cells = ""
        for result in results:
            value, low, high = (_number(x) for x in result["metrics"][name].values())
            cells += f"{value:>10}  {f'{low} to {high}':<18}"
        lines.append(f"{name:<24}{cells}")
    for label, result in zip(labels, results, strict=True):
        if "mcnemar_p" in result:
            lines.append(
                f"{label + ': ' if label else ''}wrong to right {result['improved']}, right to "
                f"wrong {result['degraded']} of {result['compared']}: McNemar p = "
                f"{result['mcnemar_p']:.3g}"
            )
    return "\n".join(line.rstrip() for line in lines)


def examples(answers: Sequence[Sequence[Sample]], count: int = 3) -> str:
    """Returns a few questions with what each teacher's samples made of them.

    First come those where the last teacher helped, then those where it harmed. A text without a
    lesson is shown after `(none)`.
    """

    def rank(place: int) -> tuple[bool, int]:
        last = answers[-1][place]
        lost = _right(last, "baseline") - _right(last, "guided")
        return not lost, lost

    blocks = []
    for place in sorted(range(len(answers[0])), key=rank)[:count]:
        first = answers[0][place]
        parts = [("question", first.question.text), ("truth", first.question.ground_truth)]
        if first.baseline:
            parts.append(("alone", _said(first.baseline)))
        for label, samples in zip(_labels(len(answers)), answers, strict=True):
            sample = samples[place]
            if label:
                parts.append((label, ""))
            if sample.baseline:
                parts.append(("lesson", sample.teaching or f"(none) {_said(sample.completion)}"))
            parts.append(("answer", _said(sample.answer)))
        lines = (f"{name:>9}: {_line(text)}".rstrip() for name, text in parts)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _said(completion: Completion) -> str:
    """Returns what was written, or why nothing was."""
    return completion.text if completion.token_ids else f"({completion.finish_reason})"


def _line(text: str, width: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _labels(count: int) -> list[str]:
    """Returns the names of the teachers, empty for a single one."""
    return [f"teacher {i + 1}" for i in range(count)] if count > 1 else [""]


def _taught(samples: Sequence[Sample]) -> bool:
    return any(r.guided for r in samples)


def _measure(samples: Sequence[Sample], taught: bool) -> Metrics:
    if taught:
        return teaching_measures.of_teaching(samples)
    known = [s for s in samples if s.question.ground_truth]
    right = sum(is_right(s.completion, s.question.ground_truth) for s in known)
    return {"accuracy": (right, len(known))}


def _right(sample: Sample, which: str) -> bool:
    completion = getattr(sample, which) or sample.completion
    return is_right(completion, sample.question.ground_truth)
