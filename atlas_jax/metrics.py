"""Metrics, kept as `(sum, weight)` until they are written, and the files of their values.

A metric whose name ends in `_max` is `(value, 1)`, or `(0, 0)` without a value. It is the maximum
over microbatches, processes and steps; other metrics are means.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from atlas_jax import distributed
from atlas_jax.files import write_whole
from atlas_jax.options.train import TrainConfig
from atlas_jax.types import Metrics, Service

# Dense bfloat16 peak of one device in FLOP/s, from the manufacturers' data sheets.
_PEAK_FLOPS = {
    "A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "TPU v4": 275e12, "TPU v5 lite": 197e12,
    "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6": 918e12, "TPU7x": 2307e12,
}  # fmt: skip

_THEIR_NAMES = {
    "loss/total": "loss", "optim/grad_norm": "grad_norm", "optim/learning_rate": "learning_rate",
    "eval/loss": "eval_loss", "reward/mean": "reward", "reward/std": "reward_std",
    "policy/kl": "kl", "policy/entropy": "entropy",
}  # fmt: skip
"""Names of transformers and TRL for the same."""

BEST = "best.json"
"""File of a run with step and metric of the model in `best/`, by transformers' names."""


def peak_flops(device: jax.Device) -> float | None:
    """Returns the bfloat16 peak of a device in FLOP/s; None if it is unknown."""
    return next((v for k, v in _PEAK_FLOPS.items() if k in device.device_kind), None)


def peak_bytes(device: jax.Device) -> int | None:
    """Returns the most memory that this process has used on a device; None where it is unknown."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def add(total: Metrics, metrics: Metrics) -> Metrics:
    """Returns the union of two sets of metrics, with equal names combined."""
    result = dict(total)
    for name, (value, weight) in metrics.items():
        before = result.get(name, (0.0, 0.0))
        result[name] = _combined(name, [before, (float(value), float(weight))])
    return result


def sum_over_processes(metrics: Metrics) -> Metrics:
    """Returns the metrics of all processes combined; every process has the same names."""
    # The numbers travel without names, so every process must have the same order.
    names = sorted(metrics)
    found = distributed.gather(np.asarray([metrics[name] for name in names], np.float64))
    return {name: _combined(name, found[:, i].tolist()) for i, name in enumerate(names)}


def _combined(name: str, parts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Returns the sum of several `(sum, weight)`, or for `_max` the largest with a weight."""
    if name.endswith("_max"):
        return max(((value, weight) for value, weight in parts if weight), default=(0.0, 0.0))
    return sum(value for value, _ in parts), sum(weight for _, weight in parts)


def means(total: Metrics) -> dict[str, float]:
    """Returns `sum / weight` of each metric; NaN if the weight is 0."""
    return {k: value / weight if weight else math.nan for k, (value, weight) in total.items()}


class MetricWriter:
    """Appends to `metrics.jsonl` of one run, and reports to services."""

    def __init__(
        self,
        directory: str,
        start_step: int,
        enabled: bool = True,
        services: Sequence[Service] = (),
    ) -> None:
        """Opens the file; what a run wrote after `start_step` before it was killed is dropped."""
        self._enabled = enabled
        self._services = services
        self.last_evaluation = -1
        """The newest step with an evaluation in the file; -1 without one, or if not enabled."""
        if not enabled:
            return
        self._path = pathlib.Path(directory) / "metrics.jsonl"
        self.last_evaluation = _drop_after(self._path, start_step)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars of one step."""
        if not self._enabled:
            return
        # JSON has no NaN, which stands for a metric without any sample.
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step} | finite) + "\n")
        # A killed run keeps every line that it has logged.
        self._file.flush()
        for service in self._services:
            service.write(step, values)

    def write_text(self, step: int, name: str, text: str) -> None:
        """Reports Markdown to the services that show it."""
        for service in self._services:
            service.write_text(step, name, text)

    def close(self) -> None:
        """Closes the file, and ends the reports."""
        if self._enabled:
            self._file.close()
        for service in self._services:
            service.close()


def open_writer(config: TrainConfig, start_step: int) -> MetricWriter:
    """Returns the writer of a run, which writes in the first process only.

    Raises:
        ValueError: for a service of `report_to` that cannot be used.
    """
    main = distributed.is_main()
    services: Sequence[Service] = []
    if main and config.report_to:
        from atlas_jax import reporting  # metrics.jsonl is written without it

        services = reporting.open_services(config, start_step)
    return MetricWriter(config.output_dir, start_step, main, services)


def logged(output_dir: str) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`."""
    text = (pathlib.Path(output_dir) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def write_trainer_state(
    config: TrainConfig, directory: str, step: int, max_steps: int, steps_per_epoch: float
) -> None:
    """Writes `trainer_state.json` beside a model, in the first process.

    It has the form of transformers' `TrainerState`. `log_history` is `metrics.jsonl`, with
    transformers' names beside ours.

    Args:
        config: options of the run.
        directory: directory of the model.
        step: number of steps that were done.
        max_steps: number of steps of the whole run.
        steps_per_epoch: number of steps that a pass over the data takes.
    """
    if not distributed.is_main():
        return
    history = []
    for values in logged(config.output_dir):
        names = {theirs: values[ours] for ours, theirs in _THEIR_NAMES.items() if ours in values}
        history.append(values | names | {"epoch": values["step"] / steps_per_epoch})
    state = {
        "global_step": step,
        "max_steps": max_steps,
        "epoch": step / steps_per_epoch,
        "num_train_epochs": math.ceil(max_steps / steps_per_epoch),
        "train_batch_size": config.per_device_train_batch_size,
        "logging_steps": config.logging_steps,
        "save_steps": config.save_steps,
        "eval_steps": config.eval_steps,
        "log_history": history,
    }
    best = pathlib.Path(config.output_dir) / BEST
    if best.exists():
        kept = {"best_model_checkpoint": str(best.with_suffix(""))}
        state |= json.loads(best.read_text()) | kept
    path = pathlib.Path(directory) / "trainer_state.json"
    write_whole(path, json.dumps(state, indent=2) + "\n")


def _drop_after(path: pathlib.Path, step: int) -> int:
    """Removes the lines of steps after `step`, and a line that a kill cut off.

    Returns:
        The newest step with the metrics of an evaluation; -1 if there is none.
    """
    if not path.exists():
        return -1
    lines = []
    evaluated = -1
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        values = json.loads(line) if line.endswith("\n") else {"step": step + 1}
        if values["step"] <= step:
            lines.append(line)
            if any(name.startswith("eval/") for name in values):
                evaluated = values["step"]
    write_whole(path, "".join(lines))
    return evaluated
