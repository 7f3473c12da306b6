"""Metrics, kept as `(sum, weight)` until they are written, and the files of their values.

A metric whose name ends in `_max` is `(value, 1)`, or `(0, 0)` without a value. It is the maximum
over microbatches, processes and steps; other metrics are means.
"""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from atlas_jax import distributed
from atlas_jax.files import write_whole
from atlas_jax.types import Metrics

# Dense bfloat16 peak of one device in FLOP/s, from the manufacturers' data sheets.
_PEAK_FLOPS = {
    "A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "TPU v4": 275e12, "TPU v5 lite": 197e12,
    "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6": 918e12, "TPU7x": 2307e12,
}  # fmt: skip


def peak_flops(device: jax.Device) -> float | None:
    """Returns the bfloat16 peak of a device in FLOP/s; None if it is unknown."""
    return next((v for k, v in _PEAK_FLOPS.items() if k in device.device_kind), None)


def add(total: Metrics, metrics: Metrics) -> Metrics:
    """Returns the union of two sets of metrics, with equal names combined."""
    result = dict(total)
    for name, (value, weight) in metrics.items():
        before = result.get(name, (0.0, 0.0))
        result[name] = _combined(name, [before, (float(value), float(weight))])
    return result


def sum_over_processes(metrics: Metrics) -> Metrics:
    """Returns the metrics of all processes combined; every process has the same names."""
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
    """Writer of a run's `metrics.jsonl` and TensorBoard event files."""

    def __init__(self, directory: str, start_step: int, enabled: bool = True) -> None:
        """Opens the files, and drops lines of steps after `start_step` that a killed run wrote."""
        self._enabled = enabled
        self.last_evaluation = 0
        """The newest step with an evaluation in the file; 0 if there is none, or if not enabled."""
        if not enabled:
            return
        self._path = pathlib.Path(directory) / "metrics.jsonl"
        self.last_evaluation = _drop_after(self._path, start_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._events = EventFileWriter(str(directory))
        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._event(start_step + 1, session_log=log)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars of one step."""
        if not self._enabled:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step} | finite) + "\n")
        self._file.flush()
        scalars = [summary_pb2.Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._event(step, summary=summary_pb2.Summary(value=scalars))

    def write_text(self, step: int, name: str, text: str) -> None:
        """Shows Markdown in TensorBoard's text tab."""
        if not self._enabled:
            return
        value = summary_pb2.Summary.Value(
            tag=name, metadata=text_metadata.create_summary_metadata(name, "")
        )
        value.tensor.dtype = 7  # DT_STRING
        value.tensor.tensor_shape.dim.add(size=1)
        value.tensor.string_val.append(text.encode())
        self._event(step, summary=summary_pb2.Summary(value=[value]))

    def _event(self, step: int, **content: Any) -> None:
        self._events.add_event(event_pb2.Event(wall_time=time.time(), step=step, **content))
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._enabled:
            self._file.close()
            self._events.close()


def _drop_after(path: pathlib.Path, step: int) -> int:
    """Removes the lines of steps after `step`, and a line that a kill cut off.

    Returns:
        The newest step with the metrics of an evaluation; 0 if there is none.
    """
    if not path.exists():
        return 0
    lines = []
    evaluated = 0
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        values = json.loads(line) if line.endswith("\n") else {"step": step + 1}
        if values["step"] <= step:
            lines.append(line)
            if any(name.startswith("eval/") for name in values):
                evaluated = values["step"]
    write_whole(path, "".join(lines))
    return evaluated
