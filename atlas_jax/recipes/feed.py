"""The batches of GRPO: questions asked, samples scored, rows laid out."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from atlas_jax import distributed, loop, losses, metrics, step, stopping
from atlas_jax.data import questions as asked
from atlas_jax.data.packing import bucket_length
from atlas_jax.options.grpo import GRPOConfig
from atlas_jax.recipes import chat_models
from atlas_jax.recipes.layout import Layout
from atlas_jax.recipes.rollouts import Asker, Collected, Rollouts, Window
from atlas_jax.recipes.scoring import reason, retry_outages
from atlas_jax.rewards.pricing import price_lessons
from atlas_jax.rollout import measures, record, teaching, timing
from atlas_jax.rollout.engine import Backend, ChatModel
from atlas_jax.rollout.rows import collate_policy, row_tokens, split_rows
from atlas_jax.rollout.student_cache import StudentCache
from atlas_jax.sharding import Sharding, fetch, put_back, to_global
from atlas_jax.stopping import StopRequestedError
from atlas_jax.types import (
    DependencyError,
    Metrics,
    Params,
    PolicyBatch,
    RewardFn,
    Sample,
    by_question,
)

_LEAVE = StopRequestedError, DependencyError
"""Reasons to give up a batch, in all processes together; a stop counts before an outage."""

_JOIN_SECS = 5.0  # for the batch that is being made when a run ends


class Parts(NamedTuple):
    """The parts of a step that stay the same while the run trains."""

    config: GRPOConfig
    layout: Layout
    order: asked.QuestionOrder
    backend: Backend
    protocol: teaching.TeachingProtocol
    reward: RewardFn
    logprobs_fn: Callable[[Params, PolicyBatch], jax.Array]
    sharding: Sharding
    writer: metrics.MetricWriter
    student_cache: StudentCache
    """Texts of the student without a lesson, for steps and evaluations."""
    given_labels: tuple[str, ...] = ()
    """Short names of the rewards, where a caller from Python has given some."""
    num_steps: int = 0
    """Steps of the whole run."""


class Feed:
    """Source of each step's batch; its state is the number of the next question.

    The questions of a step are dealt to the processes in order, as evenly as possible: each asks
    and scores whole groups, and some may have none. The rows are then exchanged, so that each
    process trains an equal part of them. The policy is that of the step, or of at most
    `rollout.max_staleness` steps before.
    """

    def __init__(self, parts: Parts, reference: Params | None) -> None:
        self._parts = parts
        self._batches = PolicyBatches(
            parts.config, parts.layout, parts.logprobs_fn, parts.sharding, reference
        )
        self._position = 0
        self._rollouts = Rollouts(_asker(parts))
        depth = parts.config.rollout.max_staleness
        self._window = Window(self._begin, depth, parts.layout.questions)

    @property
    def samples_policy(self) -> bool:
        """Completions are sampled from the parameters that the step has changed."""
        return True

    def next(self, state: step.TrainState, pause: Callable[[float], None]) -> loop.StepInput:
        """Returns a batch of new completions, scored."""
        parts = self._parts
        config = self._parts.config
        version = int(state.step)
        # The weights go out before anything is asked, so that every new batch begins with them.
        policy = parts.backend.publish(state.whole, version)
        published = time.perf_counter()
        # A process that gives up must tell the others, which would wait for it further down.
        with distributed.together(*_LEAVE):
            collected, position = self._take(policy)
        usage = self._rollouts.meter.read()
        wait_secs = time.perf_counter() - published
        if policy.complete:
            _log_critical_path(version + 1, wait_secs, collected)
        samples = retry_outages(parts.reward, collected.samples, config.reward, pause)
        # A leak and a missing lesson cost reward before the rewards of a group are compared.
        samples = self._weigh(self._price(samples))
        # The record is written before the samples are counted, so that a run that ends for too
        # many failures leaves them to be looked at.
        facts = record.StepFacts(
            num_samples=parts.layout.questions * config.num_generations,
            num_steps=parts.num_steps,
            given_rewards=parts.given_labels,
        )
        record.write(config.output_dir, version + 1, jax.process_index(), samples, facts)
        parts.writer.write_text(version + 1, "lessons", record.lessons_text(samples))
        has_student = parts.backend.student is not None
        values = measure(
            samples, version, config, parts.given_labels, has_student, self._usage(usage)
        )
        values |= parts.backend.metrics()
        if config.rollout.refill_rounds:
            values["rollout/refills"] = position - self._position - parts.layout.questions, 1
        # The position advances only now: if anything above raises, the step that is repeated asks
        # the same questions.
        self._position = position
        # Nor may the reference move before: the repeated step would mix it a second time.
        start = time.perf_counter()
        batch, num_tokens = self._batches.make(samples, state)
        # Without waiting, the time of these log-probabilities would count as the training step's.
        jax.block_until_ready(batch)
        values |= collected.trace.metrics()
        values["perf/real_token_frac"] = num_tokens, batch.tokens.size
        values["perf/generate_secs"] = collected.trace.generate_secs, 1
        values["perf/wait_secs"] = wait_secs, 1
        values["perf/score_secs"] = collected.trace.score_secs, 1
        values["perf/logprobs_secs"] = time.perf_counter() - start, 1
        return loop.StepInput(batch, num_tokens * config.num_iterations, values)

    def get_state(self) -> dict[str, Any]:
        """Returns the position in the questions."""
        return {"position": self._position, "fingerprint": self._parts.order.fingerprint}

    def set_state(self, state: dict[str, Any], *, allow_other_data: bool = False) -> None:
        """Continues after the questions that were asked when `state` was taken.

        Args:
            state: from `get_state`.
            allow_other_data: whether the position is kept though the questions are others.

        Raises:
            ValueError: if the state is from other questions, unless they are allowed.
        """
        fingerprint = self._parts.order.fingerprint
        if state["fingerprint"] != fingerprint and not allow_other_data:
            raise ValueError(
                f"the checkpoint is from questions {state['fingerprint']}, this run has "
                f"{fingerprint}: the dataset, the seed or data.shuffle differ; restore them, or "
                "start with a new output_dir and resume_from"
            )
        self._position = state["position"]

    def get_reference(self) -> Params | None:
        """Returns the reference if it follows the policy, so that checkpoints must hold it."""
        return self._batches.reference if self._parts.config.sync_ref_model else None

    def close(self) -> None:
        """Gives up questions in flight."""
        self._rollouts.close()

    def join(self) -> None:
        """Waits for the threads that make batches, when all that they ask has been closed."""
        self._rollouts.join(_JOIN_SECS)

    def _take(self, policy: ChatModel) -> tuple[Collected, int]:
        """Returns the samples of the next step and the number of the question after it."""
        if not self._parts.config.rollout.max_staleness:
            return self._collect(policy, self._position)
        step = self._window.next(policy, self._position)
        return stopping.result(step), self._position + self._parts.layout.questions

    def _begin(self, policy: ChatModel, position: int) -> Future[Collected]:
        return self._rollouts.begin(policy, self._places(position))

    def _places(self, position: int) -> range:
        """Returns the numbers of this process's questions in the step that begins at `position`."""
        shares = question_shares(self._parts.layout.questions)
        process = jax.process_index()
        first = position + sum(shares[:process])
        return range(first, first + shares[process])

    def _collect(self, policy: ChatModel, position: int) -> tuple[Collected, int]:
        """Returns the samples of a step and the number of the next question.

        Groups that teach nothing are replaced by later ones while `refill_rounds` last.
        """
        process = jax.process_index()
        refills = self._parts.config.rollout.refill_rounds
        agree = distributed.together(*_LEAVE) if refills else contextlib.nullcontext()
        with agree:
            collected = self._rollouts.ask(policy, self._places(position))
        position += self._parts.layout.questions
        for _ in range(refills):
            groups = by_question(collected.samples)
            idle = [i for i, group in enumerate(groups) if not self._teaches(group)]
            counts = distributed.gather(np.asarray(len(idle)))
            if not counts.any():
                break
            # Processes take new questions in turn, so that none is asked twice.
            first = position + int(counts[:process].sum())
            with distributed.together(*_LEAVE):
                more = self._rollouts.ask(policy, range(first, first + len(idle)))
            position += int(counts.sum())
            for i, group in zip(idle, by_question(more.samples), strict=True):
                groups[i] = group
            samples = [sample for group in groups for sample in group]
            collected.trace.extend(more.trace)
            collected = Collected(samples, collected.trace)
        return collected, position

    def _weigh(self, samples: Sequence[Sample]) -> list[Sample]:
        """Returns the samples with their advantages, and with whether they train."""
        config = self._parts.config
        # A sample without a score is NaN, which the statistics of its group leave out.
        rewards = [math.nan if s.reward.value is None else s.reward.value for s in samples]
        own_rewards = np.asarray(rewards, np.float64).reshape(-1, config.num_generations)
        advantages = self._advantages(own_rewards).ravel()
        weighed = [
            sample._replace(advantage=float(advantage), trains=self._trains(sample))
            for sample, advantage in zip(samples, advantages, strict=True)
        ]
        if config.has_episodes:
            from atlas_jax.rollout import turn_advantages  # only they have turns

            weighed = turn_advantages.add(weighed, self._advantages)
        return weighed

    def _advantages(self, own_rewards: np.ndarray) -> np.ndarray:
        """Returns the advantages of rewards `[own groups, ...]`; all processes must call it."""
        shares = question_shares(self._parts.layout.questions)
        # Scales may be taken over the batch, so the advantages are those of all processes.
        everyone = distributed.gather_rows(own_rewards, shares)  # [questions of the step, ...]
        first = sum(shares[: jax.process_index()])
        advantages = losses.group_advantages(everyone, self._parts.config.scale_rewards)
        return advantages[first : first + len(own_rewards)]

    def _price(self, samples: Sequence[Sample]) -> list[Sample]:
        """Returns scored samples with rewards under which only honest lessons pay."""
        config = self._parts.config
        reward = config.reward
        if reward.overlong_tokens:
            from atlas_jax.rewards import overlong  # only this option asks for it

            window = reward.overlong_tokens, reward.overlong_penalty
            samples = overlong.penalized(samples, config.max_new_tokens, *window)
        return price_lessons(samples, reward.answer_leak_penalty, reward.missing_lesson_penalty)

    def _trains(self, sample: Sample) -> bool:
        truncated = sample.completion.finish_reason == "length"
        left_out = truncated and self._parts.config.mask_truncated_completions
        scored = sample.reward.value is not None
        return scored and bool(sample.completion.token_ids) and not left_out

    def _teaches(self, group: Sequence[Sample]) -> bool:
        """Returns True if a group's rewards differ and at least one of its members trains."""
        priced = self._price(group)
        values = {s.reward.value for s in priced if s.reward.value is not None}
        differ = len(values) > 1
        if not differ and self._parts.config.has_episodes:
            from atlas_jax.rollout import turn_advantages  # only they have turns

            differ = turn_advantages.differ(priced)
        return differ and any(map(self._trains, priced))

    def _usage(self, usage: timing.Workload) -> Metrics:
        """Returns how this process generated the step."""
        values = timing.of_usage(usage, distributed.is_main())
        if self._parts.backend.student:
            values["rollout/student_cached_frac"] = self._parts.student_cache.counts()
        return values


class PolicyBatches:
    """The batches of samples, and the reference that they are compared with."""

    def __init__(
        self,
        config: GRPOConfig,
        layout: Layout,
        logprobs_fn: Callable[[Params, PolicyBatch], jax.Array],
        sharding: Sharding,
        reference: Params | None,
    ) -> None:
        """Takes the reference in the state that it has before the next step; None has none."""
        self._config = config
        self._layout = layout
        self._logprobs_fn = logprobs_fn
        self._sharding = sharding
        self.reference = reference

    def make(self, samples: Sequence[Sample], state: step.TrainState) -> tuple[PolicyBatch, int]:
        """Returns the batch of a step, and its tokens without padding over all processes.

        It is called once a step, since the reference may follow the policy.

        Args:
            samples: those that this process asked.
            state: before the step.
        """
        config = self._config
        version = int(state.step)
        self._sync_reference(version, state.params)
        rows = self._rows(samples, version)
        num_tokens = int(distributed.gather(np.asarray((rows.segment_ids > 0).sum())).sum())
        batch = to_global(rows, self._sharding, self._layout.microbatches)
        if self.reference is not None:
            batch = batch._replace(ref_logprobs=self._logprobs_fn(self.reference, batch))
        # With one update a step, the update itself computes the log-probabilities before it.
        if config.updates_per_step > 1:
            batch = batch._replace(old_logprobs=self._logprobs_fn(state.whole, batch))
        return batch, num_tokens

    def _sync_reference(self, version: int, params: Params) -> None:
        config = self._config
        due = config.sync_ref_model and version and version % config.ref_model_sync_steps == 0
        if due and self.reference is not None:
            self.reference = _mix(config.ref_model_mixup_alpha, self.reference, params)

    def _rows(self, samples: Sequence[Sample], version: int) -> PolicyBatch:
        """Returns the rows that this process trains."""
        layout = self._layout
        group = self._config.num_generations // layout.per_row
        counts = [share * group for share in question_shares(layout.questions)]
        trained_by = version if self._config.rollout.max_staleness else None
        return _exchanged(_collate(samples, layout, trained_by), counts)


def measure(
    samples: Sequence[Sample],
    version: int,
    config: GRPOConfig,
    given_labels: Sequence[str] = (),
    has_student: bool = False,
    others: Metrics | None = None,
) -> Metrics:
    """Returns the metrics of a step's samples, and others, over all processes.

    Args:
        samples: those that this process asked, with their advantages.
        version: the step of the weights that are trained.
        config: of the run.
        given_labels: short names of the rewards, where a caller from Python has given some.
        has_student: whether a student has answered.
        others: further metrics of this process, which are summed by the same message.

    Raises:
        DependencyError: if an outage left too many samples without a score.
    """
    reward = config.reward
    values = measures.of_rewards(samples, given_labels or reward.labels)
    if given_labels or reward.functions:
        values |= measures.of_functions(samples)
    if "rim" in reward.parts:
        values |= measures.of_judges(samples, reward.rim.judge_names)
    values |= measures.of_generation(samples, version)
    if reward.overlong_tokens:
        from atlas_jax.rewards import overlong  # only this option asks for it

        values |= overlong.metrics(samples)
    if config.has_episodes:
        from atlas_jax.rollout import turn_advantages  # only they have turns

        values |= measures.of_episodes(samples) | turn_advantages.metrics(samples)
    if has_student:
        from atlas_jax.rollout import teaching_measures  # compares answers with the truth

        values |= teaching_measures.of_teaching(samples)
        values |= teaching_measures.of_efficiency(samples)
    values["rollout/trained_frac"] = sum(s.trains for s in samples), len(samples)
    values = metrics.sum_over_processes(values | (others or {}))
    (without, total) = values["reward/failed_frac"]
    (skipped, _) = values["reward/skipped_frac"]
    # What was skipped would be skipped again. Only outages may end the run, since the same
    # command can continue after them.
    failed = without - skipped
    possible = total - skipped
    if failed > reward.max_failed_frac * possible:
        reasons = [reason(s.reward) for s in samples if s.reward.is_outage]
        raise DependencyError(
            f"{failed:.0f} of {possible:.0f} samples could not be scored, more than "
            f"reward.max_failed_frac={reward.max_failed_frac}; the first: {reasons[:1]}; look "
            f"at {config.output_dir}/rollouts"
        )
    if not values["rollout/trained_frac"][0] and distributed.is_main():
        reasons = [reason(s.reward) for s in samples if s.reward.value is None]
        logging.warning(
            "step %d trains nothing: of %d samples %d have no score and the others are cut; "
            "the first: %s; look at %s/rollouts",
            *(version + 1, total, without, reasons[:1] or "out of tokens"),
            config.output_dir,
        )
    return values


def _asker(parts: Parts) -> Asker:
    config = parts.config
    of_users = parts.given_labels or config.reward.functions
    judges = config.reward.rim
    return Asker(
        question=lambda place: parts.order.at(place),
        student=parts.backend.student,
        protocol=parts.protocol,
        draws=chat_models.make_draws(config),
        cache=parts.student_cache,
        reward=parts.reward,
        scores_beside=not of_users,
        # Without a cache, equal calls of a group are shared where they are made together.
        scores_alone=not of_users and "rim" in config.reward.parts and bool(judges.cache_dir),
    )


def _log_critical_path(step: int, wait_secs: float, collected: Collected) -> None:
    """Logs the question that a step waited for, and where its time went."""
    path = collected.trace.critical_path()
    if not path:
        return
    ids = {sample.place: sample.question.id for sample in collected.samples}
    phases = (
        f"{span.phase} {span.end - span.start:.1f} s"
        + (f" (sample {span.member})" if span.member >= 0 else "")
        for span in path
    )
    logging.info(
        "step %d waited %.1f s for its samples, the last of them of question %s: %s",
        *(step, wait_secs, ids[path[-1].place], ", ".join(phases)),
    )


def question_shares(total: int) -> list[int]:
    """Returns the number of things of each process: as many as the others, or one more."""
    each, more = divmod(total, jax.process_count())
    return [each + (process < more) for process in range(jax.process_count())]


def _exchanged(rows: PolicyBatch, counts: Sequence[int]) -> PolicyBatch:
    """Returns this process's equal part of the rows of all processes.

    Args:
        rows: those of the groups that this process asked.
        counts: the number of them in each process.
    """
    if min(counts) == max(counts):
        return rows
    share = sum(counts) // len(counts)
    part = slice(share * jax.process_index(), share * (jax.process_index() + 1))
    return jax.tree.map(lambda x: distributed.gather_rows(x, counts)[part], rows)


def _collate(samples: Sequence[Sample], layout: Layout, version: int | None) -> PolicyBatch:
    """Returns the rows of this process's samples, of a length that all processes have."""
    # A process without samples calls too: the length is that of the longest row of all.
    longest = max(map(row_tokens, split_rows(samples, layout.per_row)), default=0)
    length = bucket_length(distributed.max_over_processes(longest), layout.buckets)
    return collate_policy(samples, layout.per_row, length, version)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _mix(alpha: float, reference: Params, params: Params) -> Params:
    """Returns `(1 - alpha) reference + alpha params`."""

    def one(r: jax.Array, p: jax.Array) -> jax.Array:
        old = fetch(r)
        new = fetch(p).astype(r.dtype)
        return put_back(((1 - alpha) * old + alpha * new).astype(r.dtype), r)

    return jax.tree.map(one, reference, params)
