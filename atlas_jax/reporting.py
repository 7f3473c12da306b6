"""Services that a run reports its metrics to, beside `metrics.jsonl`. Imports no JAX.

A service is TensorBoard, Weights & Biases, trackio, standard output, or a function of the user's
own, which is called with the step and its metrics.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pathlib
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from atlas_jax import metric_docs, sockets
from atlas_jax.files import write_whole
from atlas_jax.options.descriptions import nearest
from atlas_jax.options.fields import is_reference
from atlas_jax.options.train import TrainConfig, masked
from atlas_jax.types import Service


class TensorBoard:
    """Event files in the run's directory."""

    def __init__(self, config: TrainConfig, start_step: int) -> None:
        """Opens a file; TensorBoard hides what an earlier one holds of later steps."""
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events = EventFileWriter(config.output_dir)
        self._described: set[str] = set()
        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._event(start_step + 1, session_log=log)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Shows scalars, with their meaning at the first value of each."""
        from tensorboard.compat.proto import summary_pb2

        scalars = []
        for name, value in values.items():
            scalar = summary_pb2.Summary.Value(tag=name, simple_value=value)
            if name not in self._described:  # TensorBoard reads what comes with the first value
                scalar.metadata.summary_description = metric_docs.describe(name)
                self._described.add(name)
            scalars.append(scalar)
        self._event(step, summary=summary_pb2.Summary(value=scalars))

    def write_text(self, step: int, name: str, text: str) -> None:
        """Shows Markdown in the text tab."""
        from tensorboard.compat.proto import summary_pb2
        from tensorboard.plugins.text import metadata

        described = metadata.create_summary_metadata(name, metric_docs.TEXTS.get(name, ""))
        value = summary_pb2.Summary.Value(tag=name, metadata=described)
        value.tensor.dtype = 7  # DT_STRING
        value.tensor.tensor_shape.dim.add(size=1)
        value.tensor.string_val.append(text.encode())
        self._event(step, summary=summary_pb2.Summary(value=[value]))

    def _event(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto import event_pb2

        self._events.add_event(event_pb2.Event(wall_time=time.time(), step=step, **content))
        self._events.flush()

    def close(self) -> None:
        """Closes the file."""
        self._events.close()


class Wandb:
    """A run of Weights & Biases, which a continued run goes on with.

    The service refuses values of a step below its own count, as those of steps that are done again
    after an older checkpoint. The step is therefore a metric, against which the others are drawn
    (`define_metric` of wandb); a step that was done twice has two values.

    The environment configures it: WANDB_PROJECT, WANDB_NAME, WANDB_MODE and so on.
    """

    def __init__(self, config: TrainConfig, start_step: int) -> None:
        """Opens the run.

        Raises:
            ValueError: if the service refuses, such as without a login.
        """
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "atlas_jax"),
                name=os.environ.get("WANDB_NAME", _name(config)),
                id=_identity(config, "wandb"),
                resume="allow",
                config=masked(config),
                dir=config.output_dir,
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"report_to=wandb: {said}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        logging.info("Weights & Biases: %s", self._run.url or f"offline, in {self._run.dir}")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs scalars."""
        self._run.log({**values, "step": step})

    def write_text(self, step: int, name: str, text: str) -> None:
        """Logs nothing: `rollouts/` holds the texts."""

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()


class Trackio:
    """A run of trackio, which a continued run goes on with.

    A step that was done twice, after an older checkpoint, has two values.

    TRACKIO_PROJECT and TRACKIO_SPACE_ID in the environment say where it lies.
    """

    def __init__(self, config: TrainConfig, start_step: int) -> None:
        """Opens the run."""
        import trackio

        self._finish = trackio.finish  # which ends it once; the run's own one leaves it to the exit
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "atlas_jax"),
            name=f"{_name(config)}-{_identity(config, 'trackio')}",
            resume="allow",
            config=masked(config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs scalars; it takes no NaN."""
        self._run.log({k: v for k, v in values.items() if math.isfinite(v)}, step=step)

    def write_text(self, step: int, name: str, text: str) -> None:
        """Logs nothing: `rollouts/` holds the texts."""

    def close(self) -> None:
        """Sends what is left."""
        self._finish()


class StandardOutput:
    """Standard output, with a line of JSON for each line of `metrics.jsonl`."""

    def __init__(self, config: TrainConfig, start_step: int) -> None:
        """Writes nothing yet."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a line; NaN is null."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        sys.stdout.write(json.dumps({"step": step} | finite) + "\n")
        sys.stdout.flush()

    def write_text(self, step: int, name: str, text: str) -> None:
        """Writes nothing: `rollouts/` holds the texts."""

    def close(self) -> None:
        """Does nothing."""


class Function:
    """A function of the user's own; a call that fails is logged, and the run goes on."""

    def __init__(self, name: str) -> None:
        """Imports the function.

        Raises:
            ValueError: says why it cannot be imported.
        """
        self._name = name
        self._function = sockets.resolve(name, "report_to")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Calls it with the step and its metrics."""
        _, error = sockets.attempt(self._function, step, dict(values))
        if error:
            logging.error("report_to=%s fails at step %d: %s", self._name, step, error)

    def write_text(self, step: int, name: str, text: str) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


_SERVICES: dict[str, Callable[[TrainConfig, int], Service]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "stdout": StandardOutput,
}


def check(report_to: Sequence[str]) -> None:
    """Checks that metrics can be reported there.

    Raises:
        ValueError: for an unknown service, a package that is missing, or a function that is.
    """
    for name in report_to:
        if is_reference(name):
            sockets.resolve(name, "report_to")
        elif name not in (*_SERVICES, "none"):
            raise ValueError(
                f"report_to has {name!r}; use some of {', '.join(_SERVICES)}, "
                f"package.module:function, or none{nearest(name, _SERVICES)}"
            )
        elif name != "none" and not _installed(name):
            raise ValueError(
                f"report_to={name} needs the package {name}; install it with pip install -e "
                f'".[report]" (or pip install {name}), or leave it out of report_to'
            )


def open_services(config: TrainConfig, start_step: int) -> list[Service]:
    """Returns what `report_to` names, ready for the steps after `start_step`.

    Raises:
        ValueError: for a service that cannot be used.
    """
    return [
        Function(name) if is_reference(name) else _SERVICES[name](config, start_step)
        for name in config.report_to
        if name != "none"
    ]


def _installed(package: str) -> bool:
    if package == "stdout":
        return True
    spec = importlib.util.find_spec(package)
    # A directory of that name, such as the one that wandb writes, is a package without a file.
    return spec is not None and spec.origin is not None


def _name(config: TrainConfig) -> str:
    return pathlib.Path(config.output_dir).absolute().name


def _identity(config: TrainConfig, service: str) -> str:
    """Returns the name under which a service knows the run of a directory."""
    path = pathlib.Path(config.output_dir) / f".{service}_run"
    if not path.exists():
        write_whole(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()
