"""Baseline against taught answers on the same questions, with how sure the difference is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from atlas_jax import metrics, ranges
from atlas_jax.rewards.verifiable import is_right
from atlas_jax.rollout import significance, teaching, teaching_measures
from atlas_jax.rollout.engine import ChatModel
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.significance import Comparison, Interval, mcnemar
from atlas_jax.rollout.student_cache import StudentCache
from atlas_jax.types import Completion, Metrics, Question, Sample

_RESAMPLES = 2000
EFFECTS = (0.05, 0.1, 0.157)
"""Effects of which a report says how many questions they need; the last one is the guide's."""


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


def comparisons(answers: Sequence[Sequence[Sample]], seed: int = 0) -> list[dict[str, Any]]:
    """Returns, as JSON values, how each teacher compares with each one before it.

    Args:
        answers: samples of each teacher, of the same questions in the same order.
        seed: of the bootstrap.
    """
    rights = [[_taught_right(sample) for sample in samples] for samples in answers]
    found = []
    for second in range(len(rights)):
        for first in range(second):
            compared = significance.compare(rights[first], rights[second], seed, _RESAMPLES)
            found.append({"first": first + 1, "second": second + 1, **_as_json(compared)})
    return found


def _as_json(compared: Comparison) -> dict[str, Any]:
    difference = compared.difference._asdict()
    return {
        "compared": compared.compared,
        "improved": compared.improved,
        "degraded": compared.degraded,
        "difference": {k: v if math.isfinite(v) else None for k, v in difference.items()},
        "mcnemar_p": compared.p_value,
    }


def add_significance(
    results: Sequence[dict[str, Any]],
    compared: Sequence[dict[str, Any]],
    effects: Sequence[float] = (),
) -> None:
    """Adds to reports and comparisons what they are worth together.

    `holm_p` is McNemar's p corrected for all of these tests by Holm's method. `needed` has the
    numbers of questions at which effects are found: the one that was `seen`, and under `effects`
    those of `EFFECTS` and `effects`. As many answers change there as here, or as many as the effect
    needs at least; where none have changed, nothing is known of them.

    Args:
        results: of `report`, of each teacher.
        compared: of `comparisons`.
        effects: differences of shares of right answers, above 0.
    """
    tested = [test for test in (*results, *compared) if "mcnemar_p" in test]
    corrected = significance.holm([test["mcnemar_p"] for test in tested])
    for test, p_value in zip(tested, corrected, strict=True):
        test["holm_p"] = p_value
        changes = test["improved"] + test["degraded"]
        if not changes:
            continue
        changed = changes / test["compared"]
        seen = abs(test["improved"] - test["degraded"]) / test["compared"]
        test["needed"] = {
            "changed": changed,
            "power": significance.POWER,
            "seen": _needed(seen, changed) if seen else None,
            "effects": [_needed(effect, changed) for effect in sorted({*EFFECTS, *effects})],
        }


def _needed(effect: float, changed: float) -> dict[str, Any]:
    count = significance.questions_needed(effect, max(changed, effect))
    return {"effect": effect, "questions": count}


def table(results: Sequence[dict[str, Any]], width: int = 0) -> str:
    """Returns reports on one or more teachers, asked the same questions, side by side.

    Args:
        results: of `report`.
        width: columns of the terminal; teachers that do not fit stand below. 0 is any number.
    """
    labels = _labels(len(results))
    columns = max((width - _NAME) // _CELL, 1) if width else len(results)
    lines = []
    for first in range(0, len(results), columns):
        part = slice(first, first + columns)
        lines += _metrics_table(results[part], labels[part])
    for label, result in zip(labels, results, strict=True):
        if "mcnemar_p" in result:
            lines.append(f"{label + ': ' if label else ''}{_test(result, len(results) > 1)}")
    return "\n".join(line.rstrip() for line in lines)


_NAME = 24
_CELL = 30
"""Columns of a metric's name, and of its value with its interval."""


def _metrics_table(results: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[str]:
    head = "".join(f"{label or 'value':>10}  {'95 % interval':<18}" for label in labels)
    lines = [f"{'metric':<{_NAME}}{head}"]
    for name in results[0]["metrics"]:
        cells = ""
        for result in results:
            value, low, high = (_number(x) for x in result["metrics"][name].values())
            cells += f"{value:>10}  {f'{low} to {high}':<18}"
        lines.append(f"{name:<{_NAME}}{cells}")
    return lines


def _test(test: dict[str, Any], several: bool) -> str:
    holm = f", Holm p = {test['holm_p']:.3g}" if several and "holm_p" in test else ""
    return (
        f"wrong to right {test['improved']}, right to wrong {test['degraded']} of "
        f"{test['compared']}: McNemar p = {test['mcnemar_p']:.3g}{holm}"
    )


def comparison_lines(compared: Sequence[dict[str, Any]]) -> str:
    """Returns a line for each two teachers, as in `comparisons` after `add_significance`."""
    return "\n".join(
        f"teacher {test['second']} against {test['first']}: "
        f"{ranges.points(test['difference']['value'])} points "
        f"({ranges.points(test['difference']['low'])} to "
        f"{ranges.points(test['difference']['high'])})\n  {_test(test, True)}"
        for test in compared
    )


def needed_table(
    results: Sequence[dict[str, Any]], compared: Sequence[dict[str, Any]], title: str
) -> str:
    """Returns how many questions effects need, a line for each test; empty without a test.

    Args:
        results: of `report`, after `add_significance`.
        compared: of `comparisons`, after `add_significance`.
        title: a line above the table.
    """
    names = [f"{label or 'taught'} against alone" for label in _labels(len(results))]
    names += [f"teacher {test['second']} against {test['first']}" for test in compared]
    tests = [(n, t) for n, t in zip(names, (*results, *compared), strict=True) if "needed" in t]
    if not tests:
        return ""
    wanted = tests[0][1]["needed"]["effects"]
    head = "".join(f"{ranges.points(each['effect']):>10}" for each in wanted)
    lines = [title, f"{'':<24}{'changed':>8}{'as seen':>18}{head}  points"]
    for name, test in tests:
        needed = test["needed"]
        seen = needed["seen"]
        words = f"{_count(seen['questions'])} ({100 * seen['effect']:.1f})" if seen else "-"
        cells = "".join(f"{_count(each['questions']):>10}" for each in needed["effects"])
        lines.append(f"{name:<24}{needed['changed']:>8.0%}{words:>18}{cells}")
    return "\n".join(lines)


def _count(questions: int | None) -> str:
    return "> 1e6" if questions is None else f"{questions:,}"


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


def _taught_right(sample: Sample) -> bool | None:
    """Returns whether the answer that counts is right; None where that is not known."""
    asked = (sample.baseline, sample.guided) if sample.baseline else (sample.completion,)
    if not sample.question.ground_truth or not all(c and c.token_ids for c in asked):
        return None
    return is_right(sample.answer, sample.question.ground_truth)


def _right(sample: Sample, which: str) -> bool:
    completion = getattr(sample, which) or sample.completion
    return is_right(completion, sample.question.ground_truth)
