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
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from atlas_jax import distributed, divergence, logprobs, metrics, step
from atlas_jax.checkpoint import hf
from atlas_jax.data import chat, loader, sources, tokenized
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.gkd import GKDConfig
from atlas_jax.recipes import chat_models
from atlas_jax.recipes.text_feed import TextFeed, make_layout
from atlas_jax.rollout import continuations
from atlas_jax.rollout.continuations import TextOrder, Texts
from atlas_jax.run import Run, Training
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
    TopTokens,
)

if TYPE_CHECKING:
    from atlas_jax.recipes.served_teacher import ServedTeacher

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
        teacher = _open_teacher(config, run, stack)
        common = min(run.decoder.config.vocab_size, teacher.vocab_size)
        bind = chat_models.local(run.model, "", config.max_decode_rows) if config.lmbda else None
        train, held_out, token_paths = _data(config, run, given, common)
        run.check_evaluates(held_out)
        if teacher.served:
            teacher.served.check(train.at(0))
        order = TextOrder(train, config.seed, config.data.shuffle, config.lmbda)
        distributed.check_same(order.fingerprint, "its texts differ from those of process 0")
        num_steps = config.max_steps
        if num_steps == -1:
            num_steps = math.ceil(config.num_train_epochs * train.number / layout.rows)
        # 3. The weights, and the position where an earlier command stopped.
        training = run.begin(num_steps, order.fingerprint, teacher=teacher.identity)
        if teacher.decoder:
            training = training.beside(teacher=teacher.load(training))
        # 4. Nothing can refuse the run any more.
        writer = training.committed()
        stack.callback(writer.close)
        if token_paths:
            tokenized.remove_others(directory.tokens(config), token_paths)
        # 5. Training, and its end.
        loss = make_loss(run.decoder, teacher.decoder, config)
        feed = TextFeed(config, layout, order, bind, teacher.served)
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


def make_loss(decoder: Decoder, teacher: Decoder | None, config: GKDConfig) -> step.LossFn:
    """Returns the mean divergence of the compared tokens as a function of the parameters.

    Args:
        decoder: the policy.
        teacher: its parameters are the key `teacher` of the policy's; None where the batch has what
            servers say of the teacher.
        config: of the run.
    """
    own_size = decoder.config.vocab_size
    options = divergence.DivergenceOptions(
        head=logprobs.Head(decoder.sharding, config.loss_chunk_size, config.temperature),
        beta=config.beta,
        num_tokens=min(own_size, teacher.config.vocab_size if teacher else own_size),
    )

    def states(model: Decoder, params: Params, rows: Batch | TeacherBatch) -> jax.Array:
        return model.hidden(params, rows.tokens, rows.positions, rows.segment_ids, bounds=_ROWS)

    def side(params: Params, batch: TeacherBatch) -> divergence.TeacherSide | TopTokens:
        if teacher is None:
            assert batch.top is not None, "rows without scores"
            return batch.top
        frozen = params["teacher"]
        hidden = states(teacher, frozen, batch.teacher or batch)
        if batch.sources is not None:
            hidden = jnp.take_along_axis(hidden, batch.sources[..., None], axis=1)
        height = decoder.output_table(params).shape[0]
        table = divergence.fitted(teacher.output_table(frozen), height)
        return divergence.TeacherSide(hidden, table)

    def loss(params: Params, batch: TeacherBatch) -> tuple[LossSum, Metrics]:
        total, facts = divergence.masked_divergence(
            states(decoder, params, batch),
            decoder.output_table(params),
            side(params, batch),
            logprobs.next_tokens(batch.loss_mask),
            options,
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
            batch = feed.placed(texts, 1).batch
            total = metrics.add(total, jax.device_get(eval_step(params, batch)))
        means = metrics.means(total)
        return {
            "eval/loss": means["loss/total"],
            "eval/agreement_frac": means["distillation/agreement_frac"],
        }

    return evaluate


class _Teacher(NamedTuple):
    """The model whose distribution is learnt: in this process, or on servers."""

    vocab_size: int
    identity: str
    """Name or digest that a run compares when it continues; empty for its own beginning."""
    decoder: Decoder | None = None
    """None for a teacher on servers."""
    source: hf.Source | None = None
    """None for the weights that the run began with."""
    served: ServedTeacher | None = None

    def load(self, training: Training) -> Params:
        """Returns the parameters of a teacher in this process."""
        assert self.decoder, "a teacher on servers has its parameters there"
        return (
            hf.load(self.source, self.decoder) if self.source else training.reference(self.decoder)
        )


def _open_teacher(config: GKDConfig, run: Run, stack: contextlib.ExitStack) -> _Teacher:
    """Opens the teacher; its connections are closed with `stack`.

    Raises:
        ValueError: if it cannot be opened or asked, or is of another vocabulary.
    """
    size = run.decoder.config.vocab_size
    if config.servers_option:
        from atlas_jax.recipes import served_teacher  # a teacher in this process needs no client

        served = served_teacher.open_teacher(config, run.model, stack)
        return _Teacher(vocab_size=size, identity=served.name, served=served)
    if not config.teacher:
        decoder = run.compute.frozen_decoder(run.decoder.config)
        return _Teacher(vocab_size=size, identity="", decoder=decoder)
    teacher = open_frozen(run.compute, config.teacher)
    check_vocabularies(run.model, teacher)
    most = teacher.decoder.config.max_positions
    if config.max_seq_length > most:
        raise ValueError(
            f"max_seq_length={config.max_seq_length} is longer than the {most} positions of "
            f"teacher_model_name_or_path={config.teacher}; lower it"
        )
    return _Teacher(
        vocab_size=teacher.decoder.config.vocab_size,
        identity=hf.digest(teacher.source),
        decoder=teacher.decoder,
        source=teacher.source,
    )


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
