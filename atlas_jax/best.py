"""The best model of a run by a metric of its evaluations, kept in `best/`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping

import numpy as np
from absl import logging

from atlas_jax import distributed, metrics
from atlas_jax.options.train import TrainConfig
from atlas_jax.step import TrainState


class BestModel:
    """Exports each state whose evaluation is better than all before, of earlier commands too."""

    def __init__(self, config: TrainConfig, export: Callable[[TrainState], str]) -> None:
        """Reads the evaluations in `metrics.jsonl`.

        Args:
            config: options of the run.
            export: writes a state and returns the directory; every process calls it.
        """
        self._config = config
        self._export = export
        there = distributed.is_main() and os.path.isdir(os.path.join(config.output_dir, "best"))
        found = metrics.best(config) if there else None
        # Process 0 alone has the file, and all must export together.
        value = math.nan if found is None else found.value
        self._value = float(distributed.from_main(np.asarray([value]))[0])

    def offer(self, state: TrainState, values: Mapping[str, float]) -> None:
        """Exports the state if the values of its evaluation, the same in each process, are best."""
        name = self._config.metric_for_best_model
        value = values.get(name, math.nan)
        if math.isnan(value):
            given = ", ".join(sorted(values))
            logging.warning("%s has no value in this evaluation, which gives %s", name, given)
        elif math.isnan(self._value) or metrics.is_better(self._config, value, self._value):
            self._value = value
            logging.info("%s=%.4g is the best; model: %s", name, value, self._export(state))
