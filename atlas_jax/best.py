"""The best model of a run by a metric of its evaluations, kept in `best/`.

`best.json` says of which step it is. A run that goes on from an earlier checkpoint, as after a loss
that is not finite, has not done that step: its model is then no longer the one to beat.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from absl import logging

from atlas_jax import distributed, metrics
from atlas_jax.files import write_whole
from atlas_jax.options.train import TrainConfig
from atlas_jax.step import TrainState


class Best(NamedTuple):
    """An evaluation, under the names that transformers has for the best one."""

    best_global_step: int
    best_metric: float


class BestModel:
    """Exports each state whose evaluation is better than that of the model in `best/`."""

    def __init__(self, config: TrainConfig, export: Callable[[TrainState], str]) -> None:
        """Knows no model yet; see `resume`.

        Args:
            config: options of the run.
            export: writes a state and returns the directory; every process calls it.
        """
        self._config = config
        self._export = export
        self._record = pathlib.Path(config.output_dir) / metrics.BEST
        self._value = math.nan

    def resume(self, state: TrainState) -> None:
        """Takes up the model that earlier commands have kept.

        If it is of a step after the one that training begins with, it is replaced: by the state
        itself if that has the best evaluation of all in the log, else by the next one evaluated.
        """
        step = int(state.step)
        kept = self._kept() if distributed.is_main() else None
        again = math.nan
        if kept and kept.best_global_step > step:
            kept = None
            self._record.unlink()
            logged = best_logged(self._config)
            if logged and logged.best_global_step == step:
                again = logged.best_metric
        # Process 0 alone has the files, and all must export together.
        value = kept.best_metric if kept else math.nan
        self._value, again = distributed.from_main(np.asarray([value, again])).tolist()
        if not math.isnan(again):
            self._keep(state, again)

    def offer(self, state: TrainState, values: Mapping[str, float]) -> None:
        """Exports the state if the values of its evaluation, the same in each process, are best."""
        name = self._config.metric_for_best_model
        value = values.get(name, math.nan)
        if math.isnan(value):
            given = ", ".join(sorted(values))
            logging.warning("%s has no value in this evaluation, which gives %s", name, given)
        elif math.isnan(self._value) or is_better(self._config, value, self._value):
            self._keep(state, value)

    def _kept(self) -> Best | None:
        if not self._record.exists() or not self._record.with_suffix("").is_dir():
            return None
        return Best(**json.loads(self._record.read_text()))

    def _keep(self, state: TrainState, value: float) -> None:
        if distributed.is_main():  # a kill must not leave the record of another model
            self._record.unlink(missing_ok=True)
        name = self._config.metric_for_best_model
        logging.info("%s=%.4g is the best; model: %s", name, value, self._export(state))
        if distributed.is_main():
            write_whole(self._record, json.dumps(Best(int(state.step), value)._asdict()) + "\n")
        self._value = value


def is_better(config: TrainConfig, value: float, other: float) -> bool:
    """Returns whether a value of `metric_for_best_model` is better than another one."""
    greater = config.greater_is_better
    if greater == "auto":
        greater = not config.metric_for_best_model.endswith("loss")
    return value > other if greater else value < other


def best_logged(config: TrainConfig) -> Best | None:
    """Returns the best evaluation in `metrics.jsonl`, the first of equals, or None without one."""
    found = None
    for values in metrics.logged(config.output_dir):
        value = values.get(config.metric_for_best_model)
        if value is not None and (found is None or is_better(config, value, found.best_metric)):
            found = Best(values["step"], value)
    return found
