"""A run as a value: everything that a config makes of a model, in the order in which it may fail.

    with Run.open(config) as run:                                # directory, devices, model
        training = run.begin(num_steps, fingerprint)             # weights, optimizer, position
        writer = training.committed()                            # nothing can refuse the run now
        outcome = training.train(loss, feed, writer)             # the loop
        run.export(outcome.state.params)                         # `final/`

A recipe adds its loss, its batches, its evaluation and its end.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax

from atlas_jax import loop, metrics, step
from atlas_jax.checkpoint.manager import Checkpoints
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.train import TrainConfig
from atlas_jax.startup import directory, start
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.model import Model, export, open_model
from atlas_jax.startup.start import Start
from atlas_jax.types import Params


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
            yield cls(compute, opened, Checkpoints(config.output_dir, config.save_total_limit))

    @property
    def config(self) -> TrainConfig:
        """The options."""
        return self.compute.config

    @property
    def decoder(self) -> Decoder:
        """The decoder of the model that is trained."""
        return self.model.decoder

    def begin(
        self,
        num_steps: int,
        fingerprint: str,
        updates_per_step: int = 1,
        student: Model | None = None,
    ) -> Training:
        """Loads the weights, and the position in the data where an earlier command stopped.

        Args:
            num_steps: steps of the whole run.
            fingerprint: hash of the data, which must be those of the checkpoint, but for
                `data.refresh`.
            updates_per_step: updates of the optimizer in one step.
            student: GRPO's frozen student, where this process reads its weights.

        Raises:
            ValueError: if the run in `output_dir` was started with another model, optimizer or
                data, or if there are no weights to begin with.
        """
        optimizer = self.compute.optimizer(self.decoder, num_steps * updates_per_step)
        begun = start.begin(self.compute, self.model, optimizer, self.checkpoints, student)
        start.check_same_data(self.config, begun, fingerprint)
        return Training(
            run=self,
            num_steps=num_steps,
            updates_per_step=updates_per_step,
            optimizer=optimizer,
            start=begun,
        )

    def export(self, params: Params) -> str:
        """Writes `final/` and returns its path."""
        return export(self.config, self.model, params)


@dataclasses.dataclass(frozen=True)
class Training:
    """A run whose weights are loaded."""

    run: Run
    num_steps: int
    updates_per_step: int
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

    def reference(self, frozen: Decoder) -> Params:
        """Returns the weights that the run began with, see `start.reference`."""
        run = self.run
        return start.reference(run.config, run.model, frozen, run.checkpoints, self.start)

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
        healthy: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    ) -> loop.Outcome:
        """Trains to the last step, or until the run is to stop; see `loop.run`.

        Args:
            loss: of a microbatch.
            feed: gives the batches.
            writer: from `committed`.
            evaluate: metrics of a state; None evaluates nothing.
            healthy: range of each metric outside of which the log warns.
        """
        run = self.run
        compute = self.run.compute
        job = loop.Job(
            config=run.config,
            num_steps=self.num_steps,
            flops_per_token=run.decoder.config.flops_per_token,
            train_step=compute.train_step(loss, run.decoder, self.optimizer, self.updates_per_step),
            evaluate=evaluate,
            writer=writer,
            checkpoints=run.checkpoints,
            healthy=healthy,
            restored=self.start.data,
        )
        return loop.run(job, self.start.state, feed)
