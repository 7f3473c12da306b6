"""A trace of some steps, as `jax.profiler` makes it."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
from absl import logging

from atlas_jax.options.train import TrainConfig


class Profile:
    """Traces the steps of `profile_steps`, first and last, into `output_dir/profile`."""

    def __init__(self, config: TrainConfig) -> None:
        """Starts nothing yet."""
        first, last = config.profile_steps
        self._steps = range(first, last + 1)
        self._directory = str(pathlib.Path(config.output_dir) / "profile")
        self._running = False

    def before(self, step: int) -> None:
        """Starts the trace where it is time, also in the middle of a continued run."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, state: Any) -> None:
        """Ends the trace after its last step, of which `state` is the result."""
        if self._running and step >= self._steps[-1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends the trace, if one is running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            first = self._steps[0]
            last = self._steps[-1]
            logging.info("profile of steps %d to %d: %s", first, last, self._directory)
