"""Supervised fine-tuning: conversations in, cross entropy on what the assistant writes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from absl import logging

from atlas_jax import distributed, logprobs, loop, metrics, step
from atlas_jax.data import chat, loader, sources, tokenized
from atlas_jax.data.packing import split_rows
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.train import SFTConfig
from atlas_jax.run import Run
from atlas_jax.sharding import Sharding, to_global
from atlas_jax.startup import directory
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.model import check_ids
from atlas_jax.types import (
    NOTHING_GIVEN,
    UNKNOWN,
    Batch,
    Given,
    LossSum,
    Metrics,
    Params,
    RowBounds,
)


def run(config: SFTConfig, given: Given = NOTHING_GIVEN) -> bool:
    """Fine-tunes a model and writes `final/`; see configs/run/teacher_sft.py for an example.

    Returns:
        Whether the run came to its end; false if a signal stopped it before.
    """
    # 1. Options that contradict each other: an error must come before the directory is touched.
    plan = Compute.of(config).plan
    with Run.open(config) as run, contextlib.ExitStack() as stack:
        config = dataclasses.replace(config, packing=run.compute.packs(run.decoder.config))
        # 2. The rows: read and tokenized, and compared with those of the other processes.
        train, held_out = _datasets(config, run, given)
        num_steps = config.max_steps
        if num_steps == -1:
            num_steps = train.num_steps(config.num_train_epochs)
        run.check_evaluates(held_out)
        # 3. The weights, and the position where an earlier command stopped.
        training = run.begin(num_steps, train.fingerprint)
        batches = train.batches(training.first_step)
        stack.callback(batches.close)
        if training.position:
            batches.set_state(training.position, allow_other_data=config.data.refresh)
        # 4. Nothing can refuse the run any more: what is in the directory may be replaced.
        writer = training.committed()
        stack.callback(writer.close)
        datasets = [d for d in (train, held_out) if d is not None]
        # Not earlier: a refused command must leave the tokens of the run that is there.
        tokenized.remove_others(directory.tokens(config), [d.token_path for d in datasets])
        # 5. Training, and its end.
        bounds = RowBounds(segments=max(d.max_segments for d in datasets))
        loss = make_loss(run.decoder, config.loss_chunk_size, bounds)
        outcome = training.train(
            loss,
            _RowFeed(batches, run.compute.sharding, plan.microbatches),
            writer,
            make_evaluate(loss, held_out, run) if held_out else None,
        )
        stack.close()
        if not outcome.stopped:
            final = run.export(outcome.state)
            done = int(outcome.state.step)
            metrics.write_trainer_state(config, final, done, num_steps, float(train.num_steps(1)))
    return not outcome.stopped


class _RowFeed(NamedTuple):
    """Puts the loader's batches on the devices."""

    batches: loader.Batches
    sharding: Sharding
    microbatches: int

    @property
    def samples_policy(self) -> bool:
        """Rows come from files."""
        return False

    def next(self, state: step.TrainState, pause: Callable[[float], None]) -> loop.StepInput:
        """Returns the next batch; it does not depend on the state."""
        batch = next(self.batches)
        lengths = self.batches.row_lengths
        num_tokens = self.batches.num_tokens
        if len(lengths) == 1:
            placed = [to_global(batch, self.sharding, self.microbatches)]
        else:
            parts = split_rows(batch, lengths)
            placed = [to_global(part, self.sharding, 1) for part in parts]
        share: Metrics = {"perf/real_token_frac": (num_tokens, sum(p.tokens.size for p in placed))}
        return loop.StepInput(placed if len(lengths) > 1 else placed[0], num_tokens, share)

    def get_state(self) -> dict[str, Any]:
        """Returns the position in the data."""
        return self.batches.get_state()

    def get_reference(self) -> None:
        """There is no reference model."""


def make_loss(decoder: Decoder, chunk_size: int, bounds: RowBounds = UNKNOWN) -> step.LossFn:
    """Returns the cross entropy of a batch as a function of the parameters."""

    def loss(params: Params, batch: Batch) -> tuple[LossSum, Metrics]:
        rows = batch.tokens, batch.positions, batch.segment_ids
        hidden = decoder.hidden(params, *rows, bounds=bounds)
        table = decoder.output_table(params)
        head = logprobs.Head(decoder.sharding, chunk_size)
        return logprobs.cross_entropy(hidden, table, batch, head), {}

    return loss


def make_evaluate(
    loss_fn: step.LossFn, held_out: loader.TokenDataset, run: Run
) -> Callable[[step.TrainState], dict[str, float]]:
    """Returns the mean loss over all held-out tokens as a function of the state."""
    eval_step = step.make_eval_step(loss_fn)

    def evaluate(state: step.TrainState) -> dict[str, float]:
        total: Metrics = {}
        params = run.weights(state)
        batches = held_out.batches(0, held_out.num_steps(1))
        for batch in batches:
            placed = to_global(batch, run.compute.sharding, 1)
            total = metrics.add(total, jax.device_get(eval_step(params, placed)))
        batches.close()
        return {"eval/loss": metrics.means(total)["loss/total"]}

    return evaluate


def _datasets(
    config: SFTConfig, run: Run, given: Given
) -> tuple[loader.TokenDataset, loader.TokenDataset | None]:
    rows, held_out = sources.load_rows(
        config.data, config.seed, config.output_dir, distributed.is_main(), given
    )
    model = run.model
    plan = run.compute.plan
    tokenizer = model.files.tokenizer
    process = (jax.process_index(), jax.process_count())
    layout = loader.HostRows(plan.global_rows, *process, plan.microbatches)
    build = functools.partial(
        loader.build,
        config=config,
        template=model.template,
        stop_ids=model.stop_ids,
        token_dir=directory.tokens(config),
    )
    train = build(rows, layout=layout)
    vocab_size = model.decoder.config.vocab_size
    check_ids(tokenizer, train.tokens, vocab_size)
    distributed.check_same(train.fingerprint, "its training rows differ from those of process 0")
    sample = chat.render_sample(tokenizer, train.example(0))
    logging.info("first example, trained parts in ⟦⟧:\n%s", sample)
    if held_out is None:
        return train, None
    eval_rows = run.compute.sharding.num_replicas * plan.device_rows
    layout = loader.HostRows(eval_rows, *process)
    other = build(held_out, layout=layout, training=False)
    check_ids(tokenizer, other.tokens, vocab_size)
    return train, other
