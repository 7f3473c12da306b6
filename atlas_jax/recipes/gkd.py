"""Distillation (GKD, arXiv:2306.13649): a policy learns a teacher's distribution of each token.

The completions whose tokens are compared are the policy's own, written in the step, and given ones.
The teacher may read more than the policy: with the lesson in its prompt alone, a student learns to
answer without the lesson as it answers with it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from atlas_jax import distributed, divergence, logprobs, loop, metrics, step
from atlas_jax.checkpoint import hf
from atlas_jax.data import chat, loader, sources, tokenized
from atlas_jax.data.packing import bucket_length, capped_buckets
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.gkd import GKDConfig
from atlas_jax.recipes import chat_models
from atlas_jax.rollout import continuations
from atlas_jax.rollout.continuations import Continuation, TextOrder, Texts
from atlas_jax.rollout.engine import ChatModel, Request
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.run import Run, Training
from atlas_jax.sharding import Sharding, to_global
from atlas_jax.startup import directory
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.model import Model, check_ids, open_frozen
from atlas_jax.types import (
    NOTHING_GIVEN,
    Batch,
    Given,
    LossSum,
    Metrics,
    Params,
    RowBounds,
    TeacherBatch,
)

_ROWS = RowBounds(segments=1)


def run(config: GKDConfig, given: Given = NOTHING_GIVEN) -> bool:
    """Distils a teacher into a model and writes `final/`; see configs/run/teacher_gkd.py.

    Returns:
        Whether the run came to its end; false if a signal stopped it before.
    """
    # 1. Options that contradict each other: an error must come before the directory is touched.
    layout = make_layout(config, Compute.of(config))
    with Run.open(config) as run, contextlib.ExitStack() as stack:
        # 2. The teacher, whose tokens must be the policy's, and the texts.
        teacher = open_teacher(config, run)
        frozen = teacher.decoder if teacher else run.compute.frozen_decoder(run.decoder.config)
        common = min(run.decoder.config.vocab_size, frozen.config.vocab_size)
        bind = chat_models.local(run.model, "", config.max_decode_rows) if config.lmbda else None
        train, held_out, token_paths = _data(config, run, given, common)
        run.check_evaluates(held_out)
        order = TextOrder(train, config.seed, config.data.shuffle, config.lmbda)
        distributed.check_same(order.fingerprint, "its texts differ from those of process 0")
        num_steps = config.max_steps
        if num_steps == -1:
            num_steps = math.ceil(config.num_train_epochs * train.number / layout.rows)
        # 3. The weights, and the position where an earlier command stopped.
        training = run.begin(num_steps, order.fingerprint, teacher=teacher)
        weights = _weights(training, teacher, frozen)
        # 4. Nothing can refuse the run any more.
        writer = training.committed()
        stack.callback(writer.close)
        if token_paths:
            tokenized.remove_others(directory.tokens(config), token_paths)
        # 5. Training, and its end.
        loss = make_loss(run.decoder, frozen, config)
        feed = TextFeed(config, layout, order, bind, weights)
        if training.position:
            feed.set_state(training.position)
        evaluate = make_evaluate(loss, feed, held_out, run.weights) if held_out else None
        outcome = training.train(loss, feed, writer, evaluate)
        stack.close()
        if not outcome.stopped:
            final = run.export(outcome.state)
            done = int(outcome.state.step)
            epoch = train.number / layout.rows
            metrics.write_trainer_state(config, final, done, num_steps, epoch)
    return not outcome.stopped


class TextLayout(NamedTuple):
    """Division of the texts of a step into rows."""

    rows: int
    """Rows of a step, over all processes."""
    microbatches: int
    buckets: tuple[int, ...]
    """Row lengths, one compilation each."""
    sharding: Sharding
    eval_rows: int
    """Rows of a batch of an evaluation, over all processes."""

    def length(self, longest: int) -> int:
        """Returns the tokens of rows whose longest in this process has so many."""
        return bucket_length(distributed.max_over_processes(longest), self.buckets)

    def share(self, rows: int) -> range:
        """Returns the places of this process's rows among so many."""
        size = rows // jax.process_count()
        return range(jax.process_index() * size, (jax.process_index() + 1) * size)


def make_layout(config: GKDConfig, compute: Compute) -> TextLayout:
    """Returns how the texts of a step are divided; raises as `Compute.plan` does."""
    plan = compute.plan
    return TextLayout(
        rows=plan.global_rows,
        microbatches=plan.microbatches,
        buckets=capped_buckets(config.data.length_buckets, config.max_seq_length),
        sharding=compute.sharding,
        eval_rows=compute.sharding.num_replicas * plan.device_rows,
    )


class TextFeed:
    """Source of each step's rows; its state is the number of the next text."""

    def __init__(
        self,
        config: GKDConfig,
        layout: TextLayout,
        order: TextOrder,
        bind: Callable[[Params, int], ChatModel] | None,
        teacher: Params,
    ) -> None:
        """Begins at the first text.

        Args:
            config: of the run.
            layout: of a step.
            order: the texts.
            bind: parameters and their version -> the policy; None where it writes nothing.
            teacher: the frozen parameters.
        """
        self.layout = layout
        self._config = config
        self._order = order
        self._bind = bind
        self._teacher = teacher
        self._position = 0

    @property
    def samples_policy(self) -> bool:
        """True if completions are sampled from the parameters that the step has changed."""
        return self._bind is not None

    def next(self, state: step.TrainState, pause: Callable[[float], None]) -> loop.StepInput:
        """Returns the next rows, some of them with completions of the policy as it is now."""
        layout = self.layout
        places = [self._position + i for i in layout.share(layout.rows)]
        texts = [self._order.at(place) for place in places]
        start = time.perf_counter()
        values: Metrics = {}
        if self._bind:
            policy = self._bind(state.whole, int(state.step))
            texts, values = self._written(texts, places, policy)
            values["perf/generate_secs"] = time.perf_counter() - start, 1
        self._position += layout.rows
        placed, num_tokens = self.placed(texts, layout.microbatches)
        values["perf/real_token_frac"] = num_tokens, placed.batch.tokens.size
        return loop.StepInput(placed, num_tokens, values)

    def placed(
        self, texts: Sequence[Continuation | None], microbatches: int
    ) -> tuple[step.Beside, int]:
        """Returns rows on the devices beside the teacher, and the policy's tokens in them."""
        apart = self._config.teacher_reads == "lesson"
        rows = continuations.collate(texts, apart, self.layout.length)
        count = int(distributed.gather(np.asarray((rows.segment_ids > 0).sum())).sum())
        batch = to_global(rows, self.layout.sharding, microbatches)
        return step.Beside(batch, self._teacher), count

    def get_state(self) -> dict[str, Any]:
        """Returns the position in the texts."""
        return {"position": self._position, "fingerprint": self._order.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the texts that were trained on when `state` was taken."""
        self._position = state["position"]

    def get_reference(self) -> None:
        """There is none: the teacher does not change, and is read where it lies."""

    def _written(
        self, texts: list[Continuation], places: list[int], policy: ChatModel
    ) -> tuple[list[Continuation], Metrics]:
        """Returns the texts, some with completions of the policy, and metrics of these."""
        config = self._config
        own = [i for i, place in enumerate(places) if self._order.is_own(place)]
        requests = [
            Request(
                prompt_ids=texts[i].prompt_ids,
                max_tokens=min(
                    config.max_new_tokens, config.max_seq_length - texts[i].longest_prompt
                ),
                seed=int(np.random.SeedSequence((config.seed, places[i])).generate_state(1)[0]),
            )
            for i in own
        ]
        written = policy.generate(requests, Sampling(config.temperature))
        texts = list(texts)
        for i, (completion,) in zip(own, written, strict=True):
            texts[i] = texts[i]._replace(token_ids=completion.token_ids)
        found = [completion for (completion,) in written]
        tokens = sum(c.num_tokens for c in found)
        cut = sum(c.finish_reason == "length" for c in found)
        return texts, metrics.sum_over_processes(
            {
                "distillation/own_frac": (len(found), len(texts)),
                "rollout/completion_tokens": (tokens, len(found)),
                "rollout/truncated_frac": (cut, len(found)),
            }
        )


def make_loss(decoder: Decoder, teacher: Decoder, config: GKDConfig) -> step.LossFn:
    """Returns the mean divergence of the compared tokens as a function of the parameters."""
    options = divergence.DivergenceOptions(
        head=logprobs.Head(decoder.sharding, config.loss_chunk_size, config.temperature),
        beta=config.beta,
        num_tokens=min(decoder.config.vocab_size, teacher.config.vocab_size),
    )

    def states(model: Decoder, params: Params, rows: Batch | TeacherBatch) -> jax.Array:
        return model.hidden(params, rows.tokens, rows.positions, rows.segment_ids, bounds=_ROWS)

    def loss(params: Params, given: step.Beside) -> tuple[LossSum, Metrics]:
        batch, frozen = given
        hidden = states(decoder, params, batch)
        theirs = states(teacher, frozen, batch.teacher or batch)
        if batch.sources is not None:
            theirs = jnp.take_along_axis(theirs, batch.sources[..., None], axis=1)
        table = decoder.output_table(params)
        other = divergence.fitted(teacher.output_table(frozen), table.shape[0])
        compared = logprobs.next_tokens(batch.loss_mask)
        total, facts = divergence.masked_divergence(
            hidden, table, divergence.TeacherSide(theirs, other), compared, options
        )
        weight = jnp.sum(batch.loss_mask).astype(jnp.float32)
        return (total, weight), {
            "policy/entropy": (facts.policy_entropy, weight),
            "distillation/teacher_entropy": (facts.teacher_entropy, weight),
            "distillation/agreement_frac": (facts.agreement, weight),
        }

    return loss


def make_evaluate(
    loss: step.LossFn,
    feed: TextFeed,
    held_out: Texts,
    weights: Callable[[step.TrainState], Params],
) -> Callable[[step.TrainState], dict[str, float]]:
    """Returns the mean divergence on held-out completions as a function of the state.

    Args:
        loss: of the training.
        feed: places the completions.
        held_out: the completions.
        weights: of the model that is evaluated.
    """
    eval_step = step.make_eval_step(loss)
    layout = feed.layout

    def evaluate(state: step.TrainState) -> dict[str, float]:
        total: Metrics = {}
        params = weights(state)
        for first in range(0, held_out.number, layout.eval_rows):
            places = (first + i for i in layout.share(layout.eval_rows))
            texts = [held_out.at(i) if i < held_out.number else None for i in places]
            placed, _ = feed.placed(texts, 1)
            total = metrics.add(total, jax.device_get(eval_step(params, placed)))
        means = metrics.means(total)
        return {
            "eval/loss": means["loss/total"],
            "eval/agreement_frac": means["distillation/agreement_frac"],
        }

    return evaluate


def open_teacher(config: GKDConfig, run: Run) -> Model | None:
    """Opens the model whose distribution is learnt; None if it is what the run began with.

    Raises:
        ValueError: if it cannot be opened, or is of another vocabulary.
    """
    if not config.teacher:
        return None
    teacher = open_frozen(run.compute, config.teacher)
    check_vocabularies(run.model, teacher)
    most = teacher.decoder.config.max_positions
    if config.max_seq_length > most:
        raise ValueError(
            f"max_seq_length={config.max_seq_length} is longer than the {most} positions of "
            f"teacher_model_name_or_path={config.teacher}; lower it"
        )
    return teacher


def check_vocabularies(policy: Model, teacher: Model) -> None:
    """Checks that each token means the same to both models.

    Raises:
        ValueError: names a token that does not.
    """
    ours, theirs = (m.files.tokenizer.get_vocab() for m in (policy, teacher))
    if ours == theirs:
        return
    different = sorted(ours.items() ^ theirs.items(), key=lambda pair: pair[1])
    token, number = different[0]
    names = {by_name.get(token) for by_name in (ours, theirs)} - {number}
    raise ValueError(
        f"teacher_model_name_or_path has another vocabulary than model_name_or_path: "
        f"{len(different)} of its tokens or ids differ, such as {token!r} with the id {number} in "
        f"one and {'with ' + str(names.pop()) if names - {None} else 'nowhere'} in the other, so "
        "the two distributions are not over the same tokens; take models of one family, or set "
        "tokenizer_name_or_path to a tokenizer that both were trained with"
    )


def _weights(training: Training, teacher: Model | None, decoder: Decoder) -> Params:
    """Returns the teacher's parameters: those of its files, or those that the run began with."""
    return hf.load(teacher.source, decoder) if teacher else training.reference(decoder)


class _TextData(NamedTuple):
    """The texts of a run, and the files that keep their tokens."""

    train: Texts
    held_out: Texts | None
    token_paths: tuple[pathlib.Path | None, ...] = ()


def _data(config: GKDConfig, run: Run, given: Given, vocab_size: int) -> _TextData:
    """Returns the texts; `vocab_size` is the number of tokens that both models know."""
    rows, held_out = sources.load_rows(
        config.data, config.seed, config.output_dir, distributed.is_main(), given
    )
    if config.teacher_reads == "lesson":
        parts = [
            _of_lessons(config, run.model, part, vocab_size) for part in (rows, held_out) if part
        ]
        logging.info(
            "%d answers that a lesson turned right, of %d samples", parts[0].number, len(rows.rows)
        )
        return _TextData(parts[0], parts[1] if held_out else None)
    examples = [_examples(config, run.model, part, vocab_size) for part in (rows, held_out) if part]
    texts = [continuations.of_examples(e, config.data.max_rejected_frac) for e in examples]
    tokenizer = run.model.files.tokenizer
    sample = chat.render_sample(tokenizer, examples[0].example(0))
    logging.info("first example, its completion is the last part in ⟦⟧:\n%s", sample)
    paths = tuple(e.token_path for e in examples)
    return _TextData(texts[0], texts[1] if held_out else None, paths)


def _examples(
    config: GKDConfig, model: Model, rows: sources.Rows, vocab_size: int
) -> loader.TokenDataset:
    """Returns rows as SFT reads them, in the order of the files."""
    examples = loader.build(
        rows,
        config,
        model.template,
        loader.HostRows(1),
        stop_ids=model.stop_ids,
        training=False,
        token_dir=directory.tokens(config),
    )
    check_ids(model.files.tokenizer, examples.tokens, vocab_size)
    return examples


def _of_lessons(config: GKDConfig, model: Model, rows: sources.Rows, vocab_size: int) -> Texts:
    texts = continuations.of_samples(rows, config.data.max_rejected_frac, config.max_seq_length)
    tokenizer = model.files.tokenizer
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    continuations.check_written_by(texts, decode, rows)
    ids = {i for text in texts for i in (*text.token_ids, *text.teacher_prompt_ids)}
    check_ids(tokenizer, sorted(ids), vocab_size)
    return Texts.of(texts)
