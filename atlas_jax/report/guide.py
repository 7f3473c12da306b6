"""The verdict on a run: what it has reached of the ranges of the ATLAS training guide.

A criterion is judged by the mean of the last steps, or by the evaluation where there is one. Its
status is a word as well as a colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from atlas_jax.ranges import (
    ADVICE,
    LABELS,
    MISSED,
    NEAR,
    NOT_MEASURED,
    RANGES,
    REACHED,
    RESULTS,
    SFT_ONLY,
    goal_text,
    num_last,
    number,
    points,
)

if TYPE_CHECKING:
    from atlas_jax.report.run_files import RunFiles

Values = dict[str, float]
"""A line of metrics: name -> value, and `step`."""

_TREND = 8
"""Steps below which a trend cannot be told from chance."""
_SIGNIFICANT = 0.05


class Criterion(NamedTuple):
    """One row of the success table."""

    name: str
    goal: str
    reached: str
    status: str
    basis: str
    """Origin of the value, and the step to take where the goal is missed."""


class RunVerdict(NamedTuple):
    """The answer to the question whether a run did what it was for."""

    sentence: str
    criteria: list[Criterion]


def judge(run: RunFiles) -> RunVerdict:
    """Returns the verdict on a run as far as it has come."""
    if not run.metrics:
        return RunVerdict("No step is done yet, so there is nothing to judge.", [])
    if run.algorithm in ("sft", "gkd"):
        return _judge_loss(run)
    evaluation = run.evaluations[-1] if run.evaluations else None
    criteria = [_reward(run)]
    criteria += _non_degradation(run, evaluation)
    criteria += _ranges(run, ("policy/kl",))
    criteria += _results(run, evaluation)
    return RunVerdict(_sentence(run, evaluation, criteria[0]), criteria)


def last_mean(run: RunFiles, name: str) -> float:
    """Returns the mean of a metric over the last steps; NaN without a value there."""
    values = [value for _, value in run.series(name)]
    known = [v for v in values[-num_last(len(values)) :] if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def _judge_loss(run: RunFiles) -> RunVerdict:
    """Returns the verdict on a run without rewards; the guide has ranges for SFT alone."""
    criteria = _ranges(run, SFT_ONLY) if run.algorithm == "sft" else []
    losses = [value for _, value in run.series("loss/total") if not math.isnan(value)]
    held_out = [value for _, value in run.series("eval/loss") if not math.isnan(value)]
    if not losses:
        return RunVerdict("No step has a loss, so there is nothing to judge.", criteria)
    end = last_mean(run, "loss/total")
    words = f"The loss went from {losses[0]:.3g} to {end:.3g} nats a token"
    words += f", and to {held_out[-1]:.3g} on held-out rows" if held_out else ""
    goal = RANGES["loss/total"].status(end)
    if run.algorithm == "gkd":
        words += ", from the teacher's distribution."
    else:
        words += (
            ": below the 1.5 of the guide." if goal == REACHED else ": not below the guide's 1.5."
        )
    if run.evaluations:
        results = _results(run, run.evaluations[-1])
        criteria += results
        if any(row.name == LABELS["accuracy_delta"] for row in results):
            words += f" {_sentence(run, run.evaluations[-1], criteria[0])}"
    return RunVerdict(words, criteria)


def _ranges(run: RunFiles, names: Sequence[str]) -> list[Criterion]:
    return [
        _of_range(name, last_mean(run, name), _over_last(run, name))
        for name in names
        if run.series(name)
    ]


def _non_degradation(run: RunFiles, evaluation: Mapping[str, Any] | None) -> list[Criterion]:
    """Returns the row of non-degradation, by held-out questions where some were asked."""
    value, basis = _best_source(run, evaluation, "non_degradation_rate")
    return [_of_range("teaching/non_degradation_rate", value, basis)] if basis else []


def _of_range(name: str, value: float, basis: str) -> Criterion:
    status = RANGES[name].status(value)
    advice = f"; {ADVICE[name]}" if status == MISSED else ""
    low = name == "policy/kl" and value < RANGES[name].low
    advice += "; the policy has moved little from its reference" if low else ""
    return Criterion(
        name=LABELS[name],
        goal=goal_text(name),
        reached=number(value),
        status=status,
        basis=basis + advice,
    )


def _reward(run: RunFiles) -> Criterion:
    """Returns the row of the reward, whose trend is tested.

    Reference: Kendall's rank correlation with the step, as a test of a trend (Mann 1945).
    """
    pairs = [(step, v) for step, v in run.series("reward/mean") if not math.isnan(v)]
    row = Criterion(
        name=LABELS["reward/mean"],
        goal="rising",
        reached=number(last_mean(run, "reward/mean")),
        status=NOT_MEASURED,
        basis=f"{len(pairs)} steps are too few for a trend ({_TREND} are needed)",
    )
    if len(pairs) < _TREND:
        return row
    from scipy import stats

    tau, p = stats.kendalltau(*zip(*pairs, strict=True))
    if math.isnan(tau):
        return row._replace(status=MISSED, basis="it never changes, so nothing is learned")
    sure = p < _SIGNIFICANT
    status = NEAR if not sure else REACHED if tau > 0 else MISSED
    words = "no clear trend" if not sure else "rising" if tau > 0 else "falling"
    first = sum(v for _, v in pairs[: num_last(len(pairs))]) / len(pairs[: num_last(len(pairs))])
    return row._replace(
        status=status,
        basis=f"{words} over {len(pairs)} steps, from {number(first)} "
        f"(Kendall's tau {tau:.2f}, p = {p:.2g})",
    )


def _results(run: RunFiles, evaluation: Mapping[str, Any] | None) -> list[Criterion]:
    """Returns the rows of the results that the guide reports for its own run."""
    p = (evaluation or {}).get("mcnemar_p", 0.0)
    rows = []
    for name, (goal, wanted) in RESULTS.items():
        signed = name == "accuracy_delta"
        value, basis = _best_source(run, evaluation, name)
        status = wanted.status(value)
        if signed and p >= _SIGNIFICANT and status == REACHED:
            status = NEAR  # it may be chance
        if basis:
            rows.append(
                Criterion(
                    name=LABELS[name],
                    goal=goal,
                    reached=f"{points(value)} points" if signed else number(value),
                    status=status,
                    basis=basis,
                )
            )
    return rows


def _best_source(
    run: RunFiles, evaluation: Mapping[str, Any] | None, name: str
) -> tuple[float, str]:
    """Returns a value with what it is taken from: an evaluation, held-out questions, training."""
    measured = (evaluation or {}).get("metrics", {}).get(name) or {}
    if measured.get("value") is not None:
        shown = points if name == "accuracy_delta" else number
        interval = f"{shown(measured.get('low'))} to {shown(measured.get('high'))}"
        count = (evaluation or {}).get("questions", "?")
        return float(
            measured["value"]
        ), f"evaluation of {count} questions, 95 % interval {interval}"
    held_out = [(s, v) for s, v in run.series(f"eval/{name}") if not math.isnan(v)]
    if held_out:
        return held_out[-1][1], f"held-out questions at step {held_out[-1][0]}"
    value = last_mean(run, f"teaching/{name}")
    return value, "" if math.isnan(value) else _over_last(run, f"teaching/{name}")


def _sentence(run: RunFiles, evaluation: Mapping[str, Any] | None, reward: Criterion) -> str:
    """Returns one sentence on what the lessons did."""
    tested = bool(evaluation and "mcnemar_p" in evaluation)
    delta, basis = _best_source(run, evaluation if tested else None, "accuracy_delta")
    if not basis:
        reached = "" if reward.reached == "-" else f" (last steps: {reward.reached})"
        return f"Mean reward: {reward.basis}{reached}."
    taught, _ = _best_source(run, evaluation if tested else None, "student_accuracy")
    alone, _ = _best_source(run, evaluation if tested else None, "baseline_accuracy")
    numbers = (
        f"right answers taught {100 * taught:.1f} %, alone {100 * alone:.1f} % "
        f"({points(delta)} points; {basis}"
    )
    if not tested or evaluation is None:
        opening = "The lessons help" if delta > 0 else "The lessons do not help"
        return f"{opening} so far: {numbers}); atlas-evaluate tells how sure that is."
    p = evaluation["mcnemar_p"]
    sure = p < _SIGNIFICANT
    if delta > 0:
        opening = "The lessons help" if sure else "The lessons may help, but that is not proven"
    else:
        opening = "The lessons harm" if sure else "The lessons do not help"
    return f"{opening}: {numbers}, McNemar p = {p:.2g})."


def _over_last(run: RunFiles, name: str) -> str:
    count = len(run.series(name))
    last = min(num_last(count), count)
    return "mean of the last step" if last == 1 else f"mean of the last {last} steps"
