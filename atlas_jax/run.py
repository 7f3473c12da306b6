"""A run as a value: everything that a config makes of a model, in the order in which it may fail.

    with Run.open(config) as run:                                # directory, devices, model
        training = run.begin(num_steps, fingerprint)             # weights, optimizer, position
        writer = training.committed()                            # nothing can refuse the run now
        outcome = training.train(loss, feed, writer)             # the loop
        run.export(outcome.state)                                # `final/`

A recipe adds its loss, its batches, its evaluation and its end.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging

from atlas_jax import distributed, loop, metrics, step
from atlas_jax.checkpoint import hf, manager
from atlas_jax.checkpoint.manager import Checkpoints
from atlas_jax.models import attention
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.train import TrainConfig
from atlas_jax.startup import directory
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.directory import Origin, Started
from atlas_jax.startup.model import Model, export, open_model, tokenizer_digest
from atlas_jax.types import Params


class Start(NamedTuple):
    """Where training begins."""

    state: step.TrainState
    data: dict[str, Any]  # what the checkpoint says of data and metrics; empty at the beginning
    started: Started


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run: its directory is locked, its model is read but for the parameters."""

    compute: Compute
    model: Model
    checkpoints: Checkpoints

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, config: TrainConfig, devices: Sequence[jax.Device] | None = None
    ) -> Iterator[Run]:
        """Holds `output_dir` and opens the model; nothing that a run has left there is changed.

        Args:
            config: of the run.
            devices: devices that train; None takes all.

        Raises:
            ValueError: for options, a directory or a model that cannot be used.
            OSError: for files that cannot be read or written.
        """
        compute = Compute.of(config, devices)
        with directory.opened(config):
            opened = open_model(compute)
            _log_attention(config, opened.decoder)
            limits = config.save_total_limit, config.save_only_model
            yield cls(compute, opened, Checkpoints(config.output_dir, *limits))

    @property
    def config(self) -> TrainConfig:
        """The options."""
        return self.compute.config

    @property
    def decoder(self) -> Decoder:
        """The decoder of the model that is trained."""
        return self.model.decoder

    def check_evaluates(self, held_out: Any) -> None:
        """Checks that there are rows to evaluate on, where the config chooses the best model.

        Raises:
            ValueError: if there are none.
        """
        name = self.config.metric_for_best_model
        if name and not held_out:
            raise ValueError(
                f"metric_for_best_model={name} needs rows to evaluate on; set data.eval_path or "
                "data.eval_split_ratio"
            )

    def begin(
        self,
        num_steps: int,
        fingerprint: str,
        student: Model | None = None,
        teacher: str = "",
    ) -> Training:
        """Loads the weights, and the position in the data where an earlier command stopped.

        Args:
            num_steps: steps of the whole run.
            fingerprint: hash of the data, which must be those of the checkpoint, but for
                `data.refresh`.
            student: GRPO's frozen student, where this process reads its weights.
            teacher: name or digest of another model whose distribution is learnt; "" for none.

        Raises:
            ValueError: if the run in `output_dir` was started with another model, optimizer or
                data, or if there are no weights to begin with.
        """
        # The optimizer first, since its state is restored into the shapes that it has.
        optimizer = self.compute.optimizer(self.decoder, num_steps)
        start = self._start(optimizer, student, teacher)
        _check_same_data(self.config, start, fingerprint)
        if self.decoder.lora:  # what LoRA adapts stays as it is and is no part of a checkpoint
            frozen = hf.load(self.model.source, self.decoder)
            start = start._replace(state=start.state._replace(frozen=frozen))
        return Training(
            run=self,
            num_steps=num_steps,
            optimizer=optimizer,
            start=start,
        )

    def _start(self, optimizer: step.Optimizer, student: Model | None, teacher: str) -> Start:
        """Returns the state to train from.

        A run that has a checkpoint continues from its newest one: parameters, optimizer, step and
        position in the data. A new run takes the parameters of `resume_from`, or of
        `model_name_or_path`, and nothing else.
        """
        config = self.config
        latest = self.checkpoints.latest()
        distributed.check_same(
            str(latest),
            f"sees {latest} as the newest checkpoint of {self.checkpoints.directory}, unlike "
            "process 0; look whether all hosts share that directory",
        )
        decoder = self.model.decoder
        now = Started(
            origin=Origin(config.model_name_or_path),
            weights=hf.digest(self.model.source),
            tokenizer=tokenizer_digest(self.model.files.tokenizer),
            student=hf.digest(student.source) if student else "",
            teacher=teacher,
            date=self.model.template.date.isoformat(),
        )
        before = directory.started(config.output_dir) if latest is not None else None
        if before is None and config.resume_from:
            from atlas_jax.startup import origins  # of other runs

            now = now._replace(origin=origins.find(config))
        if latest is None:
            params = self._first_params(now.origin)
            logging.info("training begins with %s", now.origin)
            return Start(self.compute.state(params, optimizer), {}, now)
        # A run of a version that wrote no `start.json` began as the options of this command say.
        before = before or now
        # Before Orbax reads: its errors would name arrays instead of the option that changed.
        _check_same_start(config, before, now)
        if decoder.lora:
            from atlas_jax.startup import origins

            origins.check_scale(config.output_dir, decoder.lora.scale)
        path = self.checkpoints.directory / str(latest)
        if manager.is_stripped(path):
            raise ValueError(
                f"{path} holds parameters only (save_only_model=true), and no newer checkpoint is "
                f"left to continue; name a new output_dir and resume_from={path}"
            )
        if not self.checkpoints.has_training_state(latest):  # made by atlas-convert
            trained = decoder.trained
            params = self.checkpoints.restore_params(
                latest, step.abstract(trained.shapes, trained.placements)
            )
            return Start(self.compute.state(params, optimizer), {}, before)
        restored = self.checkpoints.restore(latest, self.compute.abstract_state(decoder, optimizer))
        logging.info("continuing %s at step %d", self.checkpoints.directory, latest)
        return Start(restored.state, restored.data, before)

    def _first_params(self, origin: Origin) -> Params:
        """Returns the weights that a new run begins with."""
        if self.config.resume_from:
            from atlas_jax.startup import origins

            return origins.load(origin, self.decoder, base=self.model.source)
        if self.decoder.lora:
            from atlas_jax.models import lora

            return lora.init(self.decoder, self.config.seed)
        return hf.load(self.model.source, self.decoder)

    def weights(self, state: step.TrainState) -> Params:
        """Returns the weights that are exported: the state's, or with `ema_decay` their average."""
        if self.config.ema_decay:
            from atlas_jax import ema  # only this option keeps an average

            average = jax.device_put(ema.averaged(state.opt_state), self.decoder.trained.placements)
            state = state._replace(params=average)
        return state.whole

    def export(self, state: step.TrainState, name: str = "final") -> str:
        """Writes `final/`, or a directory of another name, and returns its path."""
        return export(self.config, self.model, self.weights(state), name)


@dataclasses.dataclass(frozen=True)
class Training:
    """A run whose weights are loaded."""

    run: Run
    num_steps: int
    optimizer: step.Optimizer
    start: Start

    @property
    def position(self) -> dict[str, Any]:
        """Position in the data to continue from; empty at the beginning."""
        return self.start.data

    @property
    def first_step(self) -> int:
        """Steps that earlier commands have done."""
        return int(self.start.state.step)

    def beside(self, **models: Params) -> Training:
        """Returns the run with more models that training reads and does not change, by key."""
        state = self.start.state
        state = state._replace(frozen=(state.frozen or {}) | models)
        return dataclasses.replace(self, start=self.start._replace(state=state))

    def reference(self, frozen: Decoder) -> Params:
        """Returns the weights that the run began with, see `origins.reference`.

        With LoRA they are those of the model without factors.
        """
        start = self.start
        if start.state.frozen is not None:
            return start.state.frozen  # what LoRA adapts: no second copy
        from atlas_jax.startup import origins  # SFT has no reference

        return origins.reference(frozen, self.run.checkpoints, start.started.origin, start.state)

    def committed(self) -> metrics.MetricWriter:
        """Writes what describes the run, and returns the writer of its metrics.

        It comes after every check, because it replaces the description of the run that is there.
        """
        config = self.run.config
        first = self.first_step
        writer = metrics.open_writer(config, first)  # a service of `report_to` may refuse
        directory.commit(config, self.run.model.files, self.start.started)
        return writer

    def train(
        self,
        loss: step.LossFn,
        feed: loop.BatchSource,
        writer: metrics.MetricWriter,
        evaluate: Callable[[step.TrainState], dict[str, float]] | None = None,
    ) -> loop.Outcome:
        """Trains to the last step, or until the run is to stop; see `loop.run`.

        Args:
            loss: of a microbatch.
            feed: gives the batches.
            writer: from `committed`.
            evaluate: metrics of a state; None evaluates nothing.
        """
        run = self.run
        compute = self.run.compute
        keep_best = None
        if run.config.metric_for_best_model:
            from atlas_jax.best import BestModel  # only this option keeps one

            best = BestModel(run.config, lambda state: run.export(state, "best"))
            best.resume(self.start.state)
            keep_best = best.offer
        if distributed.is_main():
            from atlas_jax.startup import header  # only the first process shows anything

            logging.info(
                "%s", header.describe(run.model, compute, self.start.state, self.num_steps)
            )
        job = loop.Job(
            config=run.config,
            num_steps=self.num_steps,
            flops_per_token=run.decoder.flops_per_token,
            train_step=compute.train_step(loss, run.decoder, self.optimizer),
            evaluate=evaluate,
            writer=writer,
            checkpoints=run.checkpoints,
            keep_best=keep_best,
            restored=self.start.data,
        )
        return loop.run(job, self.start.state, feed)


def _check_same_start(config: TrainConfig, before: Started, now: Started) -> None:
    """Checks that the run in `output_dir` was started with the models of this command."""
    for name, digest, other in (
        ("model_name_or_path", before.weights, now.weights),
        ("the tokenizer", before.tokenizer, now.tokenizer),
        ("student_model", before.student, now.student),
        ("teacher_model_name_or_path", before.teacher, now.teacher),
    ):
        if digest and other and digest != other:
            options = directory.changed(config)
            raise ValueError(
                f"output_dir={config.output_dir} holds a run of another model: {name} is not what "
                f"the run was started with{f' ({options})' if options else ''}; restore it, or "
                "name a new output_dir"
            )


def _check_same_data(config: TrainConfig, start: Start, fingerprint: str) -> None:
    """Checks that a run continues on the data that it was started with, or after `data.refresh`.

    Raises:
        ValueError: if the checkpoint is of other data; names the options that differ.
    """
    if not start.data or start.data["fingerprint"] == fingerprint or config.data.refresh:
        return
    options = directory.changed(config)
    cause = f"these options differ: {options}" if options else "the rows or the tokenizer differ"
    raise ValueError(
        f"output_dir={config.output_dir} holds a run on other data ({start.data['fingerprint']}, "
        f"now {fingerprint}): {cause}; restore them, or name a new output_dir and "
        f"resume_from={config.output_dir}, which takes the weights alone"
    )


def _log_attention(config: TrainConfig, decoder: Decoder) -> None:
    longest = max(config.longest_sequence, config.max_seq_length)
    logging.info("%s", attention.describe(decoder.attention, longest))
