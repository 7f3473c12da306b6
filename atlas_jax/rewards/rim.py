"""RIM: judges that score what a lesson did, with a second opinion where they do not agree.

Each active judge is asked once for each temperature; where its opinions differ too much or are too
uncertain, the large model decides. Rules keep the scores of different judges from contradicting
each other, and the rest is a mean. Lessons that aim at the judge are named, and `pricing` says what
they are worth. All calls of a batch share one pool. What no judge could score has no score.

    from atlas_jax.rewards import RIMReward

    reward = RIMReward(config_path="configs/rim_offline_config.py")
    reward.evaluate("3 + 4?", "7", ground_truth="7", teacher_trace="Count on from 3.").score
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

from atlas_jax import config as config_lib
from atlas_jax import progress, stopping
from atlas_jax.options_rim import RIMConfig
from atlas_jax.rewards import ensemble, gaming, judges
from atlas_jax.rewards.ensemble import Verdict
from atlas_jax.rewards.transport import Answer, Pool, Transport
from atlas_jax.rewards.verifiable import failure
from atlas_jax.types import RewardResult, Rollout

T = TypeVar("T")

_CLOSE_SECS = 5.0
"""Longest that closing the connections may hold up the caller."""


class RIMEvaluation(NamedTuple):
    """What the judges say of one answer."""

    score: float | None  # None: no judge could score it
    rationale: str  # of all judges
    judge_scores: dict[str, float]
    judge_explanations: dict[str, str]
    extra: dict[str, Any]  # the whole record


class _Usage(NamedTuple):
    """What the calls for one judge and one sample took."""

    calls: int
    cached: int
    tokens: int
    cost: float | None  # None: the price is not known


class _Hearing(NamedTuple):
    """One judge and one sample."""

    verdict: Verdict
    usage: _Usage
    later: bool  # a failure that may pass


class RIMReward:
    """The ensemble as a reward: rollouts in, results with their whole breakdown out."""

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
            config_path: a file like `configs/rim_config.py`.
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

    def __call__(self, rollouts: Sequence[Rollout]) -> list[RewardResult]:
        """Returns the result of each rollout; one whose texts failed is not scored."""
        unscored = [_failure(rollout) for rollout in rollouts]
        cases = [
            judges.case_of(rollout)
            for rollout, failed in zip(rollouts, unscored, strict=True)
            if failed is None
        ]
        results = iter(self.score(cases))
        return [next(results) if failed is None else failed for failed in unscored]

    def score(self, cases: Sequence[judges.Case]) -> list[RewardResult]:
        """Returns the result of each case.

        Raises:
            StopRequestedError: if the run is to stop; calls in flight are given up.
        """
        with progress.waiting(self.config.limits.timeout_secs):
            return _in_thread(self._score(cases))

    def evaluate(
        self,
        prompt: str,
        response: str,
        *,
        ground_truth: str = "",
        student_baseline_answer: str = "",
        student_plan: str = "",
        teacher_trace: str = "",
    ) -> RIMEvaluation:
        """Returns what the judges say of one student's answer."""
        case = judges.Case(
            prompt, ground_truth, student_baseline_answer, student_plan, teacher_trace, response
        )
        (result,) = self.score([case])
        verdicts = result.details["judges"]
        heard = {name: v for name, v in verdicts.items() if v["score"] is not None}
        explanations = {name: v["rationale"] for name, v in heard.items()}
        return RIMEvaluation(
            score=result.score,
            rationale="\n".join(f"{name}: {text}" for name, text in explanations.items()),
            judge_scores={name: v["score"] for name, v in heard.items()},
            judge_explanations=explanations,
            extra=result.details,
        )

    async def _score(self, cases: Sequence[judges.Case]) -> list[RewardResult]:
        async with self._transport.open() as pool:
            hearings = await asyncio.gather(
                *(self._hear(pool, name, case) for case in cases for name in self.names)
            )
        count = len(self.names)
        return [
            self._result(case, dict(zip(self.names, hearings[i * count :][:count], strict=True)))
            for i, case in enumerate(cases)
        ]

    async def _hear(self, pool: Pool, name: str, case: judges.Case) -> _Hearing:
        """Returns what one judge says of one case, the arbiter asked where it must be."""
        messages = judges.messages(name, case, self.config)
        answers = await asyncio.gather(
            *(
                pool.ask("small_model", messages, temperature)
                for temperature in self.config.temperatures
            )
        )
        samples = tuple(a.opinion for a in answers if a.opinion)
        opinion = ensemble.choose(samples)
        reason = ensemble.escalation(samples, self.config)
        if reason:
            messages = judges.arbiter_messages(name, case, samples, reason, self.config)
            temperature = self.config.arbiter_temperature
            last = await pool.ask("large_model", messages, temperature)
            answers = [*answers, last]
            opinion = last.opinion or opinion
        failures = tuple(a.failure for a in answers if a.failure)
        verdict = Verdict(opinion, samples, ensemble.spread(samples), reason, failures)
        usage = _total(answers, self._transport.is_priced)
        return _Hearing(verdict, usage, any(a.later for a in answers))

    def _result(self, case: judges.Case, hearings: dict[str, _Hearing]) -> RewardResult:
        """Returns the score with the breakdown that it is made of."""
        verdicts = {name: hearing.verdict for name, hearing in hearings.items()}
        stated = {name: v.opinion.score for name, v in verdicts.items() if v.opinion}
        scores, applied = ensemble.consistent(stated, self.config.consistency_rules)
        score = ensemble.aggregate(scores)
        rules = self.config.anti_gaming
        found = gaming.find(case.question, case.ground_truth, case.lesson, case.answer, rules)
        found += ensemble.reported(verdicts.values()) if rules.ask_judges else []
        usages = [hearing.usage for hearing in hearings.values()]
        details: dict[str, Any] = {
            "judges": {n: _record(v, scores.get(n)) for n, v in verdicts.items()},
            "rules": applied,
            "gaming": found,
            **_total(usages, self._transport.is_priced)._asdict(),
        }
        if score is None:
            failures = [f for v in verdicts.values() for f in v.failures]
            later = any(hearing.later for hearing in hearings.values())
            return RewardResult(None, {"unscored": failures[0], **details}, later)
        return RewardResult(score, details)


def _in_thread(work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of a coroutine, which an event loop in a thread of its own runs.

    The thread is a daemon, so that calls which do not end do not hold up the end of the process.

    Raises:
        StopRequestedError: if the run is to stop; the coroutine is cancelled.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_serve, args=(loop,), name="judges", daemon=True)
    thread.start()
    try:
        return stopping.result(asyncio.run_coroutine_threadsafe(work, loop))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_CLOSE_SECS)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Runs an event loop until it is stopped, then what its tasks do when they are cancelled."""

    async def end(tasks: set[asyncio.Task[Any]]) -> None:
        await asyncio.gather(*tasks, return_exceptions=True)

    loop.run_forever()
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        if not task.cancelling():  # a second time would interrupt its cleaning up
            task.cancel()
    loop.run_until_complete(end(tasks))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def _failure(rollout: Rollout) -> RewardResult | None:
    """Returns the result of a rollout that has nothing to judge; None if it has."""
    completions = {"completion": rollout.policy}
    if rollout.baseline is not None:
        completions |= {"baseline": rollout.baseline, "guided answer": rollout.answer}
    return failure(completions)


def _total(parts: Sequence[_Usage | Answer], is_priced: bool) -> _Usage:
    """Returns what several calls took together."""
    return _Usage(
        calls=sum(part.calls for part in parts),
        cached=sum(part.cached for part in parts),
        tokens=sum(part.tokens for part in parts),
        cost=sum(part.cost or 0.0 for part in parts) if is_priced else None,
    )


def _record(verdict: Verdict, score: float | None) -> dict[str, Any]:
    """Returns a verdict as JSON values; `score` is the one behind the consistency rules."""
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
        "samples": [
            {k: getattr(s, k) for k in ("score", "uncertainty", "temperature", "rationale")}
            for s in verdict.samples
        ],
        "failures": list(verdict.failures),
    }
