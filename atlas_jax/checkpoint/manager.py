"""Checkpoints of a run: what it takes to continue exactly, written in the background by Orbax.

`checkpoints/STEP/` holds `params`, `train` (step, optimizer, random key), `data` (position and
fingerprint), `config`, and `reference` where a reference model follows the policy. A directory
gets its name when everything in it is written.
"""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

from atlas_jax.step import TrainState
from atlas_jax.types import Params

MODEL_FILES = "model"
"""Directory of a run with `config.json` and the tokenizer, for `tools/convert_checkpoint.py`."""


class Restored(NamedTuple):
    """Content of a checkpoint; `state` lacks where only parameters were saved."""

    state: TrainState
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints under one `output_dir`."""

    def __init__(self, output_dir: str, keep: int = 0) -> None:
        """Opens the directory; `keep` newest checkpoints stay, 0 keeps all."""
        self.directory = pathlib.Path(output_dir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep or None, create=True),
            item_names=("params", "train", "data", "config", "reference"),
        )

    def latest(self) -> int | None:
        """Returns the newest complete step, None where there is none."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        data: dict[str, Any],
        config: dict[str, Any],
        reference: Params | None = None,
    ) -> None:
        """Starts to write the state; returns when the devices may change it."""
        more = {} if reference is None else {"reference": ocp.args.StandardSave(reference)}
        rest = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                train=ocp.args.StandardSave(rest),
                data=ocp.args.JsonSave(data),
                config=ocp.args.JsonSave(config),
                **more,
            ),
        )

    def save_params(self, params: Params) -> None:
        """Writes parameters only, as step 0.

        Raises:
            ValueError: if there is a checkpoint already, which Orbax would keep in silence.
        """
        args = ocp.args.Composite(params=ocp.args.StandardSave(params))
        if not self._manager.save(0, args=args):
            raise ValueError(f"{self.directory} holds a checkpoint already; nothing was written")

    def restore(self, step: int, abstract: TrainState) -> Restored:
        """Returns what was saved at `step`, each array on the place that `abstract` says."""
        rest = {"step": abstract.step, "opt_state": abstract.opt_state, "rng": abstract.rng}
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                train=ocp.args.StandardRestore(rest),
                data=ocp.args.JsonRestore(),
            ),
        )
        return Restored(TrainState(params=found.params, **found.train), found.data)

    def restore_params(self, step: int, abstract: Params, item: str = "params") -> Params:
        """Returns only the parameters, or the reference, that were saved at `step`."""
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
        return self._manager.restore(step, args=args)[item]

    def has_reference(self, step: int) -> bool:
        """Returns whether a reference was saved at `step`."""
        return (self.directory / str(step) / "reference").exists()

    def has_training_state(self, step: int) -> bool:
        """Returns whether `step` holds more than parameters."""
        return (self.directory / str(step) / "train").exists()

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()
