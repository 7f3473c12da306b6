"""RIM: judges that score what a lesson did, with a second opinion where they do not agree.

Each active judge is asked once for each temperature; where its opinions differ too much or are too
uncertain, the large model decides. Rules keep the scores of different judges from contradicting
each other, and the rest is a weighted mean. Lessons that aim at the judge are named, and `pricing`
says what they are worth. All calls of a batch share one pool. Where one of the judges did not speak
there is no score, so that scores of a group are always those of the same judges.

    from atlas_jax.rewards import RIMReward

    reward = RIMReward(config_path="rim_offline_config")
    reward.evaluate("3 + 4?", "7", ground_truth="7", teacher_trace="Count on from 3.").score
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

from atlas_jax import config as config_lib
from atlas_jax import progress, stopping
from atlas_jax.event_loop import EventLoopThread
from atlas_jax.options.judges import RIMConfig
from atlas_jax.rewards import ensemble, gaming, judges
from atlas_jax.rewards.combined import failure
from atlas_jax.rewards.ensemble import Opinion, Verdict
from atlas_jax.rewards.transport import MAX_HOLD_SECS, CallBatch, CallResult, Transport
from atlas_jax.types import Message, Reward, Sample

_EVIDENCE = {
    "ground_truth": "ground_truth",
    "student_baseline_answer": "baseline",
    "baseline_solution": "baseline",
    "student_plan": "plan",
    "teacher_trace": "lesson",
    "student_trace": "trace",
}
"""Evidence that `evaluate` takes, and its field of a case; the original writes some with an s."""

_NO_LESSON = Opinion(
    score=0.0,
    uncertainty=0.0,
    rationale="there is no lesson",
    principles=(),
    model="",
    temperature=0.0,
)
"""The opinion on an absent lesson, which needs no judge."""

_UNHEARD = Verdict(
    opinion=_NO_LESSON, samples=(), spread=0.0, escalation="", failures=(), num_asked=0
)
"""The verdict of a judge that had to look at a lesson where none was written."""


class RIMEvaluation(NamedTuple):
    """The judges' evaluation of one answer."""

    score: float | None  # None: a judge did not speak
    rationale: str  # of all judges
    judge_scores: dict[str, float]
    judge_explanations: dict[str, str]
    extra: dict[str, Any]  # the whole record

    @property
    def reward(self) -> float | None:
        """The score, by the name that the original has for it besides."""
        return self.score


class _Usage(NamedTuple):
    """Cost of the calls for one judge and one sample."""

    calls: int
    cached: int
    tokens: int
    cost: float | None  # None: the price is not known


class _Hearing(NamedTuple):
    """One judge and one sample."""

    verdict: Verdict
    usage: _Usage
    is_retryable: bool  # it did not speak, for a reason that may pass


class RIMReward:
    """The ensemble as a reward: samples in, rewards with their whole breakdown out."""

    def __init__(
        self,
        config: RIMConfig | None = None,
        config_path: str = "",
        share: int = 1,
        ledger_path: str = "",
    ) -> None:
        """Makes the reward; no call is made yet.

        Args:
            config: the options; None takes those of `config_path`, or the defaults.
            config_path: path, shipped name or dotted name of a file like `configs/rim_config.py`.
            share: how many processes keep the limits together.
            ledger_path: file with what this process has spent; "" keeps no account on disk.

        Raises:
            ValueError: for options that cannot work, and for keys that are not set.
        """
        if config is not None and config_path:
            raise ValueError(f"config and config_path={config_path!r} are given; give one of them")
        self.config = config or (config_lib.read_rim(config_path) if config_path else RIMConfig())
        config_lib.check_rim(self.config)
        self.names = self.config.judge_names
        self._transport = Transport(self.config, share, ledger_path)
        self._loops: set[EventLoopThread] = set()

    def __call__(self, samples: Sequence[Sample]) -> list[Reward]:
        """Returns the reward of each sample; one whose texts failed is not scored."""
        unscored = [_failure(sample) for sample in samples]
        cases = [
            judges.case_of(sample)
            for sample, failed in zip(samples, unscored, strict=True)
            if failed is None
        ]
        rewards = iter(self.judge(cases))
        return [next(rewards) if failed is None else failed for failed in unscored]

    def judge(self, cases: Sequence[judges.Case]) -> list[Reward]:
        """Returns the reward of each case.

        Raises:
            CancelledError: of concurrent.futures, if the reward is closed meanwhile.
            StopRequestedError: if the run is to stop; calls in flight are given up.
        """
        loop = EventLoopThread("judges")
        self._loops.add(loop)
        try:
            # The other processes wait meanwhile, and must not take this one for stuck.
            with progress.waiting(self.config.limits.timeout_secs + MAX_HOLD_SECS):
                return stopping.result(loop.submit(self._judge(cases)))
        finally:
            loop.close()
            self._loops.discard(loop)

    def close(self) -> None:
        """Gives up the calls that other threads have in flight; the reward may be used again."""
        for loop in list(self._loops):
            loop.close()

    def evaluate(
        self, prompt: str, response: str, **evidence: str | Sequence[str] | None
    ) -> RIMEvaluation:
        """Returns what the judges say of one student's answer.

        Args:
            prompt: the question.
            response: the student's answer, with the lesson.
            evidence: `ground_truth`, `baseline_solution` (also `student_baseline_answer`: the
                student's answer alone), `student_plan`, `teacher_trace` (the lesson),
                `student_trace` (how the student came to its answer); each a text or a list of one,
                also under the plural of its name.

        Raises:
            TypeError: for evidence of another name.
            ValueError: for one of several texts, or that is given under two names.
        """
        fields: dict[str, str] = {}
        for name, value in evidence.items():
            field = _field(name)
            text = _one(name, value)
            if fields.setdefault(field, text) != text:
                raise ValueError(f"{name} is given under two names, with two values; give it once")
        case = judges.Case(
            question=prompt,
            ground_truth=fields.get("ground_truth", ""),
            baseline=fields.get("baseline", ""),
            plan=fields.get("plan", ""),
            lesson=fields.get("lesson", ""),
            answer=response,
            trace=fields.get("trace", ""),
        )
        (reward,) = self.judge([case])
        verdicts = reward.details.get("judges", {})
        heard = {name: v for name, v in verdicts.items() if v["score"] is not None}
        explanations = {name: v["rationale"] for name, v in heard.items()}
        return RIMEvaluation(
            score=reward.value,
            rationale="\n".join(f"{name}: {text}" for name, text in explanations.items()),
            judge_scores={name: v["score"] for name, v in heard.items()},
            judge_explanations=explanations,
            extra=reward.details,
        )

    async def _judge(self, cases: Sequence[judges.Case]) -> list[Reward]:
        problems = [judges.problem(case) for case in cases]
        shown = [case for case, why in zip(cases, problems, strict=True) if not why]
        async with self._transport.open() as pool:
            hearings = await asyncio.gather(
                *(self._hear(pool, name, case) for case in shown for name in self.names)
            )
        count = len(self.names)
        results = (
            self._result(case, dict(zip(self.names, hearings[i * count :][:count], strict=True)))
            for i, case in enumerate(shown)
        )
        return [
            Reward(value=None, details={"unscored": why}, is_skipped=True) if why else next(results)
            for why in problems
        ]

    async def _hear(self, pool: CallBatch, name: str, case: judges.Case) -> _Hearing:
        """Returns what one judge says of one case, the arbiter asked where it must be."""
        priced = self._transport.is_priced
        if judges.lacks_lesson(name, case, self.config):
            return _Hearing(_UNHEARD, _total([], priced), False)
        messages = judges.messages(name, case, self.config)
        temperatures = self.config.temperatures
        answers = await _asked(pool, messages, temperatures)
        calls = list(answers)
        # If no sample came, the model is away, and the whole case is asked for again after a wait.
        if any(a.opinion for a in answers):
            missing = [i for i, a in enumerate(answers) if a.later]
            again = await _asked(pool, messages, [temperatures[i] for i in missing])
            calls += again
            for i, answer in zip(missing, again, strict=True):
                answers[i] = answer
        samples = tuple(a.opinion for a in answers if a.opinion)
        opinion = ensemble.choose(samples)
        reason = ensemble.escalation(samples, self.config)
        if reason:
            messages = judges.arbiter_messages(name, case, samples, reason, self.config)
            temperature = self.config.arbiter_temperature
            last = await pool.ask("large_model", messages, temperature)
            answers = [*answers, last]
            calls = [*calls, last]
            # An arbiter that does not answer leaves the decision with the samples.
            opinion = last.opinion or opinion
        failures = tuple(a.failure for a in answers if not a.opinion)
        spread = ensemble.spread(samples)
        verdict = Verdict(
            opinion=opinion,
            samples=samples,
            spread=spread,
            escalation=reason,
            failures=failures,
            num_asked=len(answers),
        )
        retryable = opinion is None and any(a.later for a in answers)
        return _Hearing(verdict, _total(calls, priced), retryable)

    def _result(self, case: judges.Case, hearings: dict[str, _Hearing]) -> Reward:
        """Returns the score with the breakdown that it is made of."""
        verdicts = {name: hearing.verdict for name, hearing in hearings.items()}
        stated = {name: v.opinion.score for name, v in verdicts.items() if v.opinion}
        scores, applied = ensemble.consistent(stated, self.config.consistency_rules)
        weights = self.config.weights
        # A judge without weight only reports: its silence takes no score away.
        unheard = {
            name: hearing
            for name, hearing in hearings.items()
            if name not in stated and weights.get(name, 1.0)
        }
        score = None if unheard else ensemble.aggregate(scores, weights)
        rules = self.config.anti_gaming
        faults = gaming.find(case.question, case.ground_truth, case.lesson, case.answer, rules)
        witnesses = [v for n, v in verdicts.items() if "lesson" in judges.find(n, self.config).sees]
        faults += ensemble.reported(witnesses) if rules.ask_judges else []
        usages = [hearing.usage for hearing in hearings.values()]
        details: dict[str, Any] = {
            "judges": {n: _record(v, scores.get(n)) for n, v in verdicts.items()},
            "rules": applied,
            "gaming": faults,
            **_total(usages, self._transport.is_priced)._asdict(),
        }
        if score is None:
            name, hearing = next(iter(unheard.items()))
            why = f"the judge {name} did not speak: {hearing.verdict.failures[0]}"
            # One judge that will never speak makes another attempt useless.
            retryable = all(hearing.is_retryable for hearing in unheard.values())
            details = {"unscored": why, **details}
            return Reward(value=None, details=details, is_retryable=retryable)
        return Reward(value=score, details=details)


async def _asked(
    pool: CallBatch, messages: Sequence[Message], temperatures: Sequence[float]
) -> list[CallResult]:
    """Returns what the small model says at each temperature."""
    return await asyncio.gather(*(pool.ask("small_model", messages, t) for t in temperatures))


def _field(name: str) -> str:
    """Returns the field of a case that evidence of this name is.

    Raises:
        TypeError: for a name that is not known.
    """
    field = _EVIDENCE.get(name) or _EVIDENCE.get(name.removesuffix("s"))
    if field is None:
        nearest = difflib.get_close_matches(name, _EVIDENCE, 1, 0.0)
        raise TypeError(f"evaluate() takes no {name}; did you mean {nearest[0]}?")
    return field


def _one(name: str, value: str | Sequence[str] | None) -> str:
    """Returns the text of one piece of evidence; "" where there is none."""
    texts = [value] if isinstance(value, str) else list(value or ())
    if len(texts) > 1 or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}={texts!r:.200} must be one text, since there is one answer")
    return texts[0] if texts else ""


def _failure(sample: Sample) -> Reward | None:
    """Returns the reward of a sample that has nothing to judge; None if it has."""
    completions = {"completion": sample.completion}
    if sample.baseline is not None:
        completions |= {"baseline": sample.baseline, "guided answer": sample.answer}
    return failure(completions)


def _total(parts: Sequence[_Usage | CallResult], is_priced: bool) -> _Usage:
    """Returns what several calls took together."""
    return _Usage(
        calls=sum(part.calls for part in parts),
        cached=sum(part.cached for part in parts),
        tokens=sum(part.tokens for part in parts),
        cost=sum(part.cost or 0.0 for part in parts) if is_priced else None,
    )


def _record(verdict: Verdict, score: float | None) -> dict[str, Any]:
    """Returns a verdict as JSON values; `score` is the one after the consistency rules."""
    opinion = verdict.opinion
    return {
        "score": score,
        "stated_score": opinion.score if opinion else None,
        "uncertainty": opinion.uncertainty if opinion else None,
        "rationale": opinion.rationale if opinion else "",
        "principles": list(opinion.principles) if opinion else [],
        "model": opinion.model if opinion else "",
        "escalation": verdict.escalation,
        "spread": verdict.spread,
        "asked": verdict.num_asked,
        "samples": [
            {k: getattr(s, k) for k in ("score", "uncertainty", "temperature", "rationale")}
            for s in verdict.samples
        ],
        "failures": list(verdict.failures),
    }
