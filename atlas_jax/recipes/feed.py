"""Where GRPO's batches come from: questions asked, rollouts scored, rows laid out."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from atlas_jax import distributed, loop, losses, metrics, step
from atlas_jax.config import GRPOConfig
from atlas_jax.data import questions as asked
from atlas_jax.data.packing import Scored, bucket_length, collate_policy, row_tokens, split_rows
from atlas_jax.recipes.ahead import Ahead
from atlas_jax.recipes.layout import Layout
from atlas_jax.recipes.scoring import ask_again, why
from atlas_jax.rewards.pricing import priced
from atlas_jax.rollout import measures, record, teaching
from atlas_jax.rollout.engine import Speaker
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.sharding import Sharding, fetch, put_back, to_global
from atlas_jax.stopping import StopRequestedError
from atlas_jax.types import (
    DependencyError,
    Metrics,
    Params,
    PolicyBatch,
    Reward,
    RewardResult,
    Rollout,
)

_LEAVE = StopRequestedError, DependencyError
"""Why processes give up a batch, all of them together; a stop counts before an outage."""


class Parts(NamedTuple):
    """What a step needs, fixed while the run trains."""

    config: GRPOConfig
    layout: Layout
    order: asked.QuestionOrder
    policy: Callable[[Params, int], Speaker]
    student: Speaker | None
    protocol: teaching.Protocol
    reward: Reward
    score: Callable[[Params, PolicyBatch], jax.Array]
    sharding: Sharding
    writer: metrics.MetricWriter
    pushed: Callable[[], Metrics] = dict
    """Metrics of the last time that the policy was brought to its servers."""


class Groups(NamedTuple):
    """What a step has collected; one entry a question."""

    rollouts: list[list[Rollout]]
    results: list[list[RewardResult]]


class Feed:
    """Makes each step's batch; its state is the next question.

    The questions of a step are dealt to the processes in order, as evenly as possible: each asks
    and scores whole groups, and some may have none. The rows are then exchanged, so that each
    process trains an equal part of them. The policy is that of the step, or of at most
    `rollout.max_staleness` steps before.
    """

    def __init__(self, parts: Parts, reference: Params | None) -> None:
        self._parts = parts
        self._reference = reference
        self._position = 0
        self._ahead = Ahead(self._collect, parts.config.rollout.max_staleness)

    @property
    def samples_policy(self) -> bool:
        """Completions are sampled from the parameters that the step has changed."""
        return True

    def next(self, state: step.TrainState, pause: Callable[[float], None]) -> loop.StepInput:
        """Returns a batch of new completions, scored."""
        parts, config = self._parts, self._parts.config
        version = int(state.step)
        policy = parts.policy(state.params, version)
        synced = time.perf_counter()
        with distributed.together(*_LEAVE):
            made = self._ahead.take(policy, self._position)
        groups, score_secs = made.content
        wait_secs = time.perf_counter() - synced
        groups = self._priced(self._with_patience(groups, pause))
        samples = self._samples(groups)
        record.write(config.output_dir, version + 1, jax.process_index(), samples)
        parts.writer.write_text(version + 1, "lessons", record.lessons_table(samples))
        values = self._measure(groups, samples, version) | parts.pushed()
        self._position = made.position  # where nothing was raised: a step repeated asks the same
        self._sync_reference(version, state.params)
        start = time.perf_counter()
        rows = self._rows(samples)
        num_tokens = int(distributed.gather(np.asarray((rows.segment_ids > 0).sum())).sum())
        batch = to_global(rows, parts.sharding, parts.layout.microbatches)
        if self._reference is not None:
            batch = batch._replace(ref_logprobs=parts.score(self._reference, batch))
        if config.num_iterations > 1:
            batch = batch._replace(old_logprobs=parts.score(state.params, batch))
        jax.block_until_ready(batch)
        values["perf/generate_secs"] = made.secs - score_secs, 1
        values["perf/wait_secs"] = wait_secs, 1
        values["perf/score_secs"] = score_secs, 1
        values["perf/logprobs_secs"] = time.perf_counter() - start, 1
        return loop.StepInput(batch, num_tokens * config.num_iterations, values)

    def get_state(self) -> dict[str, Any]:
        """Returns the position in the questions."""
        return {"position": self._position, "fingerprint": self._parts.order.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues behind the questions that were asked when `state` was taken.

        Raises:
            ValueError: if the state is from other questions.
        """
        fingerprint = self._parts.order.fingerprint
        if state["fingerprint"] != fingerprint:
            raise ValueError(
                f"the checkpoint is from questions {state['fingerprint']}, this run has "
                f"{fingerprint}: the dataset, the seed or data.shuffle differ; restore them, or "
                "start with a new output_dir and resume_from"
            )
        self._position = state["position"]

    def get_reference(self) -> Params | None:
        """Returns the reference if it follows the policy, so that checkpoints must hold it."""
        return self._reference if self._parts.config.sync_ref_model else None

    def close(self) -> None:
        """Leaves batches that are being made."""
        self._ahead.close()

    def _sync_reference(self, version: int, params: Params) -> None:
        config = self._parts.config
        due = config.sync_ref_model and version and version % config.ref_model_sync_steps == 0
        if due and self._reference is not None:
            self._reference = _mix(config.ref_model_mixup_alpha, self._reference, params)

    def _collect(self, policy: Speaker, position: int) -> tuple[tuple[Groups, float], int]:
        """Returns the groups of a step, the seconds that scoring took, and the next position.

        Groups that teach nothing are replaced by later ones while `refill_rounds` last.
        """
        wanted, process = self._parts.layout.questions, jax.process_index()
        shares = _shares(wanted)
        refills = self._parts.config.rollout.refill_rounds
        agree = distributed.together(*_LEAVE) if refills else contextlib.nullcontext()
        with agree:  # not in a thread, where there are no refills
            groups, secs = self._ask(policy, position + sum(shares[:process]), shares[process])
        position += wanted
        for _ in range(refills):
            idle = [
                i for i, group in enumerate(zip(*groups, strict=True)) if not self._teaches(*group)
            ]
            counts = distributed.gather(np.asarray(len(idle)))
            if not counts.any():
                break
            first = position + int(counts[:process].sum())
            with distributed.together(*_LEAVE):
                found, spent = self._ask(policy, first, len(idle))
            position += int(counts.sum())
            secs += spent
            for i, group, scores in zip(idle, *found, strict=True):
                groups.rollouts[i], groups.results[i] = group, scores
        return (groups, secs), position

    def _ask(self, policy: Speaker, first: int, count: int) -> tuple[Groups, float]:
        """Returns the groups of `count` questions from place `first` on, scored."""
        parts = self._parts
        places = range(first, first + count)
        config = parts.config
        sampling = Sampling(config.temperature, config.top_p, config.top_k, config.min_p)
        rollouts = teaching.run(
            [parts.order.at(i) for i in places],
            places,
            policy,
            parts.student,
            parts.protocol,
            teaching.Draws(sampling, config.seed),
        )
        start = time.perf_counter()
        results = parts.reward([r for group in rollouts for r in group])
        return _grouped(rollouts, results), time.perf_counter() - start

    def _with_patience(self, groups: Groups, pause: Callable[[float], None]) -> Groups:
        """Returns the groups, samples without a score asked for again where they are too many."""
        rollouts = [r for group in groups.rollouts for r in group]
        results = [r for group in groups.results for r in group]
        options = self._parts.config.reward
        return _grouped(
            groups.rollouts, ask_again(self._parts.reward, rollouts, results, options, pause)
        )

    def _priced(self, groups: Groups) -> Groups:
        """Returns the groups with what leaks are worth beside the honest lessons of their group."""
        penalty = self._parts.config.reward.answer_leak_penalty
        members = zip(groups.rollouts, groups.results, strict=True)
        return groups._replace(results=[priced(*group, penalty) for group in members])

    def _samples(self, groups: Groups) -> list[list[record.Sample]]:
        """Returns the rollouts with their advantages, and whether they train."""
        config = self._parts.config
        scores = [[math.nan if r.score is None else r.score for r in g] for g in groups.results]
        own = np.asarray(scores, np.float64).reshape(-1, config.num_generations)
        shares = _shares(self._parts.layout.questions)
        rewards = distributed.gather_rows(own, shares)  # [N, G], of all processes
        first = sum(shares[: jax.process_index()])
        advantages = losses.group_advantages(rewards, config.scale_rewards)
        advantages = advantages[first : first + len(own)]
        return [
            [
                record.Sample(rollout, result, float(advantage), self._trains(rollout, result))
                for rollout, result, advantage in zip(*members, strict=True)
            ]
            for members in zip(groups.rollouts, groups.results, advantages, strict=True)
        ]

    def _rows(self, samples: Sequence[Sequence[record.Sample]]) -> PolicyBatch:
        """Returns the rows that this process trains."""
        layout = self._parts.layout
        group = self._parts.config.num_generations // layout.per_row
        counts = [share * group for share in _shares(layout.questions)]
        return _exchanged(_rows(samples, layout), counts)

    def _trains(self, rollout: Rollout, result: RewardResult) -> bool:
        truncated = rollout.policy.finish_reason == "length"
        left_out = truncated and self._parts.config.mask_truncated_completions
        return result.score is not None and bool(rollout.policy.token_ids) and not left_out

    def _teaches(self, rollouts: Sequence[Rollout], results: Sequence[RewardResult]) -> bool:
        """Returns whether a group's rewards differ, and one of its members at least trains."""
        results = priced(rollouts, results, self._parts.config.reward.answer_leak_penalty)
        differs = len({r.score for r in results if r.score is not None}) > 1
        return differs and any(map(self._trains, rollouts, results))

    def _measure(
        self, groups: Groups, samples: Sequence[Sequence[record.Sample]], version: int
    ) -> Metrics:
        """Returns the metrics of a step over all processes.

        Raises:
            DependencyError: if an outage left too many samples without a score.
        """
        reward = self._parts.config.reward
        values = measures.of_rewards(groups.results, reward.parts)
        if "rim" in reward.parts:
            values |= measures.of_judges(groups.results, reward.rim.judge_names)
        values |= measures.of_generation(groups.rollouts, version)
        if self._parts.student:
            values |= measures.of_teaching(groups.rollouts)
            values |= measures.of_efficiency(groups.rollouts, groups.results)
        trains = [sample.trains for group in samples for sample in group]
        values["rollout/trained_frac"] = sum(trains), len(trains)
        values = metrics.sum_over_processes(values)
        (without, total), (skipped, _) = values["reward/failed_frac"], values["reward/skipped_frac"]
        failed, possible = without - skipped, total - skipped
        if failed > reward.max_failed_frac * possible:
            reasons = [why(r) for group in groups.results for r in group if r.is_outage]
            raise DependencyError(
                f"{failed:.0f} of {possible:.0f} samples could not be scored, more than "
                f"reward.max_failed_frac={reward.max_failed_frac}; the first: {reasons[:1]}; look "
                f"at {self._parts.config.output_dir}/rollouts"
            )
        if not values["rollout/trained_frac"][0] and distributed.is_main():
            reasons = [why(r) for group in groups.results for r in group if r.score is None]
            logging.warning(
                "step %d trains nothing: of %d samples %d have no score and the others are cut; "
                "the first: %s; look at %s/rollouts",
                *(version + 1, total, without, reasons[:1] or "out of tokens"),
                self._parts.config.output_dir,
            )
        return values


def _grouped(rollouts: list[list[Rollout]], results: Sequence[RewardResult]) -> Groups:
    """Returns the results as they belong to the rollouts of each group."""
    flat = iter(results)
    return Groups(rollouts, [[next(flat) for _ in group] for group in rollouts])


def _shares(total: int) -> list[int]:
    """Returns how many of so many things each process has: as many as the others, or one more."""
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


def _rows(samples: Sequence[Sequence[record.Sample]], layout: Layout) -> PolicyBatch:
    """Returns the rows of the groups that this process asked, of a length that all have."""
    groups = [[_scored(sample) for sample in group] for group in samples]
    longest = max(map(row_tokens, split_rows(groups, layout.per_row)), default=0)
    length = bucket_length(distributed.max_over_processes(longest), layout.buckets)
    return collate_policy(groups, layout.per_row, length)


def _scored(sample: record.Sample) -> Scored:
    return Scored(sample.rollout.policy, sample.advantage, sample.trains)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _mix(alpha: float, reference: Params, params: Params) -> Params:
    """Returns `(1 - alpha) reference + alpha params`."""

    def one(r: jax.Array, p: jax.Array) -> jax.Array:
        old, new = fetch(r), fetch(p).astype(r.dtype)
        return put_back(((1 - alpha) * old + alpha * new).astype(r.dtype), r)

    return jax.tree.map(one, reference, params)
