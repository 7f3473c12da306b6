"""The ranges of the ATLAS training guide, and what a run has reached of them.

A criterion is judged by the mean of the last steps, or by the evaluation where there is one. Its
status is a word as well as a colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from atlas_jax.report.run_files import RunFiles

Values = dict[str, float]
"""A line of metrics: name -> value, and `step`."""

_LAST = 0.1
"""Share of the steps over whose mean a run is judged."""
_FEWEST = 5
"""Steps of that mean at least."""
_TREND = 8
"""Steps below which a trend cannot be told from chance."""
_SIGNIFICANT = 0.05


class Range(NamedTuple):
    """A range of a metric in the guide."""

    low: float
    high: float
    warn_below: float = -math.inf
    warn_above: float = math.inf

    def status(self, value: int | float) -> str:
        """Returns `reached`, `near` or `missed` for a value; `not measured` for NaN."""
        if math.isnan(value):
            return NOT_MEASURED
        if self.low <= value <= self.high:
            return REACHED
        return MISSED if value < self.warn_below or value > self.warn_above else NEAR


REACHED = "reached"
NEAR = "near"
MISSED = "missed"
NOT_MEASURED = "not measured"

RANGES = {
    "policy/kl": Range(low=0.5, high=2.0, warn_above=5.0),
    "teaching/non_degradation_rate": Range(low=0.95, high=1.0, warn_below=0.9),
    "loss/total": Range(low=-math.inf, high=1.5, warn_above=1.5),
    "optim/grad_norm": Range(low=-math.inf, high=5.0, warn_above=5.0),
}
"""Metric -> its range in the guide; the last two are of SFT."""
SFT_ONLY = ("loss/total", "optim/grad_norm")

ADVICE = {
    "policy/kl": "lower learning_rate, or raise beta",
    "teaching/non_degradation_rate": "lower learning_rate or raise beta; read the samples that "
    "turned right into wrong",
    "loss/total": "train longer, or raise learning_rate",
    "optim/grad_norm": "lower learning_rate, or max_grad_norm",
    "reward/zero_std_group_frac": "most groups have equal rewards and train nothing: raise "
    "num_generations or temperature, or choose questions that the student sometimes solves",
    "teaching/missing_frac": "the teacher leaves <teaching> out: warm it up by SFT, or lower the "
    "reward of a missing lesson",
    "rollout/truncated_frac": "texts are cut by their limit: raise max_new_tokens",
    "rollout/failed_frac": "completions are missing: look at the servers' logs",
    "reward/failed_frac": "samples have no score: see the reasons below",
    "teaching/answer_leak_frac": "lessons state the answer: raise reward.answer_leak_penalty",
    "rollout/mismatch_kl": "the engine and the trainer compute other probabilities: compare their "
    "number formats",
}
"""Metric -> what to do where it is out of range."""


LABELS = {
    "reward/mean": "mean reward",
    "teaching/non_degradation_rate": "non-degradation",
    "policy/kl": "KL from the reference",
    "loss/total": "loss",
    "optim/grad_norm": "gradient norm",
    "accuracy_delta": "right answers, taught less alone",
    "response_token_reduction": "share of answer tokens saved",
    "completion_rate": "answers that end",
}


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
    criteria += _ranges(run, ("teaching/non_degradation_rate", "policy/kl"))
    criteria += _results(run, evaluation)
    return RunVerdict(_sentence(run, evaluation, criteria[0]), criteria)


def last_mean(run: RunFiles, name: str) -> float:
    """Returns the mean of a metric over the last steps; NaN without a value there."""
    values = [value for _, value in run.series(name)]
    known = [v for v in values[-num_last(len(values)) :] if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def num_last(count: int) -> int:
    """Returns the number of steps, of all, over which the end of a run is judged."""
    return max(_FEWEST, round(_LAST * count))


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
        criteria += _results(run, run.evaluations[-1])
        words += f" {_sentence(run, run.evaluations[-1], criteria[0])}"
    return RunVerdict(words, criteria)


def _ranges(run: RunFiles, names: Sequence[str]) -> list[Criterion]:
    rows = []
    for name in names:
        if not run.series(name):
            continue
        value = last_mean(run, name)
        status = RANGES[name].status(value)
        advice = f"; {ADVICE[name]}" if status == MISSED else ""
        low = name == "policy/kl" and value < RANGES[name].low
        advice += "; the policy has moved little from its reference" if low else ""
        rows.append(
            Criterion(
                name=LABELS[name],
                goal=goal_text(name),
                reached=number(value),
                status=status,
                basis=_over_last(run, name) + advice,
            )
        )
    return rows


def goal_text(name: str) -> str:
    """Returns the range of a metric as the guide says it."""
    wanted = RANGES[name]
    if name == "teaching/non_degradation_rate":
        return "above 0.95 (warning below 0.90)"
    if math.isinf(wanted.low):
        return f"below {wanted.high:g}"
    return f"{wanted.low:g} to {wanted.high:g} (warning above {wanted.warn_above:g})"


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
    goals = (
        ("accuracy_delta", "+15.7 points", Range(low=0.157, high=1.0, warn_below=0.0)),
        ("response_token_reduction", "0.50", Range(low=0.5, high=1.0, warn_below=0.0)),
        ("completion_rate", "1.00 (from 0.69)", Range(low=0.98, high=1.0, warn_below=0.69)),
    )
    p = (evaluation or {}).get("mcnemar_p", 0.0)
    rows = []
    for name, goal, wanted in goals:
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


def points(value: int | float | None) -> str:
    """Returns a difference of shares in points of a hundred."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:+.1f}"


def number(value: int | float | None) -> str:
    """Returns a number for people; "-" where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.3g}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"
