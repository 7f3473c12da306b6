"""Checkpoints of a run, written in the background by Orbax, from which a run continues exactly.

`checkpoints/STEP/` holds `params`, `train` (step and optimizer), `data` (position, fingerprint and
metrics not yet logged), `config`, and `reference` if a reference model follows the policy. A
directory gets its name when everything in it is written.

Orbax casts silently when it restores an array into another dtype, so the stored shapes and dtypes
are compared with the expected ones first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from atlas_jax import distributed
from atlas_jax.checkpoint import layout
from atlas_jax.step import TrainState
from atlas_jax.types import Params

MODEL_FILES = "model"
"""Directory of a run with `config.json` and the tokenizer, for `atlas-convert`."""

_CONTINUES = ("train", "reference")
"""Items that only a run that continues needs, beside the parameters and small files."""
_ITEMS = ("params", *_CONTINUES, "data", "config")
_WRITE_SECS = 6 * 3600
"""Longest time of a write in the background, at which Orbax gives it up; its own 20 minutes are not
enough for a large model on a slow disk. A process that hangs is found by the watch."""
_MOMENT = re.compile(r"\.(mu|nu|average)\..*")  # of one parameter
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE)


class Restored(NamedTuple):
    """Content of a checkpoint."""

    state: TrainState
    data: dict[str, Any]


class ArraySpec(NamedTuple):
    """Shape and dtype of an array, stored or expected."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Checkpoints:
    """The checkpoints under one `output_dir`."""

    def __init__(
        self,
        output_dir: str,
        keep: int = 0,
        only_params: bool = False,
        create: bool = True,
    ) -> None:
        """Opens the directory.

        Args:
            output_dir: the run's directory.
            keep: the number of newest checkpoints that are kept; 0 keeps all.
            only_params: whether those before the newest one keep their parameters only.
            create: whether to make the directory; false opens the checkpoints of another run.
        """
        self._only_params = only_params
        self.directory = pathlib.Path(output_dir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep or None,
                create=create,
                cleanup_tmp_directories=create,  # left half written by a kill or a full disk
                async_options=ocp.AsyncOptions(timeout_secs=_WRITE_SECS),
            ),
            item_names=_ITEMS,
        )

    def latest(self) -> int | None:
        """Returns the newest complete step, or None if no checkpoint is complete."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        data: dict[str, Any],
        config: dict[str, Any],
        reference: Params | None = None,
    ) -> None:
        """Starts to write the state, and returns as soon as the devices may change it.

        Raises:
            OSError: if this checkpoint or the previous one cannot be written.
        """
        more = {} if reference is None else {"reference": ocp.args.StandardSave(reference)}
        rest = {"step": state.step, "opt_state": state.opt_state}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            train=ocp.args.StandardSave(rest),
            data=ocp.args.JsonSave(data),
            config=ocp.args.JsonSave(config),
            **more,
        )
        with self._named():
            self._strip()
            self._manager.save(int(state.step), args=items)

    def save_params(self, params: Params) -> None:
        """Writes parameters only, as step 0.

        Raises:
            ValueError: if the directory has a checkpoint, which Orbax would silently keep instead.
            OSError: if the checkpoint cannot be written.
        """
        items = ocp.args.Composite(params=ocp.args.StandardSave(params))
        with self._named():
            written = self._manager.save(0, args=items)
        if not written:
            raise ValueError(f"{self.directory} holds a checkpoint already; nothing was written")

    def restore(self, step: int, abstract: TrainState) -> Restored:
        """Returns the state saved at `step`, each array placed as in `abstract`.

        Raises:
            ValueError: if parameters or optimizer have another layout or dtype.
        """
        others = {"step": abstract.step, "opt_state": abstract.opt_state}
        # Parameters first: of a run of another model they name what differs, while its optimizer
        # state differs as a consequence.
        self.check(step, "params", abstract.params)
        self.check(step, "train", others)
        stored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                train=ocp.args.StandardRestore(others),
                data=ocp.args.JsonRestore(),
            ),
        )
        return Restored(TrainState(params=stored.params, **stored.train), stored.data)

    def restore_params(
        self, step: int, abstract: Params, item: str = "params", cast: bool = False
    ) -> Params:
        """Returns only the parameters, or the reference, that were saved at `step`.

        Args:
            step: the checkpoint.
            abstract: the expected shapes, dtypes and placements.
            item: `params` or `reference`.
            cast: whether another stored dtype is cast instead of refused.

        Raises:
            ValueError: if parameters have another layout, or without `cast` another dtype.
        """
        self.check(step, item, abstract, cast)
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
        return self._manager.restore(step, args=args)[item]

    def check(self, step: int, item: str, abstract: Any, cast: bool = False) -> None:
        """Checks that the stored arrays have the expected names, shapes and dtypes.

        Raises:
            ValueError: if they differ; the message names both, and what to change.
        """
        path = self.directory / str(step) / item
        stored = _stored(path)
        wanted = _wanted(abstract)
        if cast:
            stored = {name: array._replace(dtype="") for name, array in stored.items()}
            wanted = {name: array._replace(dtype="") for name, array in wanted.items()}
        if stored != wanted:
            raise ValueError(f"{path} does not fit this run: {_difference(item, stored, wanted)}")

    def has_reference(self, step: int) -> bool:
        """Returns whether a reference was saved at `step`."""
        return (self.directory / str(step) / "reference").exists()

    def has_training_state(self, step: int) -> bool:
        """Returns whether a run can continue from `step`."""
        return (self.directory / str(step) / "train").exists()

    def close(self) -> None:
        """Waits until everything is written, with the errors of `save`."""
        with self._named():
            self._strip()
            self._manager.wait_until_finished()
        self._manager.close()

    def _strip(self) -> None:
        """Removes all but the parameters of checkpoints before the newest one, if so chosen."""
        if not self._only_params:
            return
        self._manager.wait_until_finished()  # the newest one is whole then
        if distributed.is_main():
            for step in sorted(self._manager.all_steps())[:-1]:
                for item in _CONTINUES:
                    shutil.rmtree(self.directory / str(step) / item, ignore_errors=True)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Converts errors of the writing threads to an `OSError` of one line.

        TensorStore raises ValueError for a full disk, with the system's message inside the text.
        """
        try:
            yield
        except (OSError, ValueError) as error:
            causes = [os.strerror(n) for n in _DISK if os.strerror(n) in str(error)]
            latest = self.latest()
            there = (
                "none is complete"
                if latest is None
                else f"step {latest} is the newest whole one, from which the same command continues"
            )
            raise OSError(
                f"a checkpoint in {self.directory} could not be written: "
                f"{causes[0] if causes else error}; {there}"
            ) from error


def is_stripped(path: pathlib.Path) -> bool:
    """Returns whether a run left only the parameters in a checkpoint from which it could continue.

    Those that `atlas-convert` makes have had nothing else.
    """
    return (path / "data").exists() and not (path / "train").exists()


def _stored(path: pathlib.Path) -> dict[str, ArraySpec]:
    """Returns the arrays of one item of a checkpoint by name, such as `opt_state.0.mu.embed`."""
    metadata = ocp.StandardCheckpointHandler().metadata(path)
    found = jax.tree.leaves(metadata.tree, is_leaf=lambda x: hasattr(x, "storage"))
    return {x.name: ArraySpec(tuple(x.shape), str(x.dtype)) for x in found}


def _wanted(abstract: Any) -> dict[str, ArraySpec]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): ArraySpec(x.shape, str(x.dtype))
        for path, x in jax.tree.leaves_with_path(abstract)
    }


def _difference(item: str, stored: Mapping[str, ArraySpec], wanted: Mapping[str, ArraySpec]) -> str:
    dtypes = {name: (stored[name], wanted[name]) for name in stored.keys() & wanted.keys()}
    other_shapes = stored.keys() ^ wanted.keys() or any(
        s.shape != w.shape for s, w in dtypes.values()
    )
    if item == "train":
        return (
            f"its optimizer state is {_layout(stored)}; this run's is {_layout(wanted)}; restore "
            "optim, ema_decay, adam_mu_dtype, max_grad_norm and model.param_dtype, or start a new "
            "output_dir with resume_from, which takes the parameters alone"
        )
    if other_shapes:
        advice = "give the model that it was made with"
        if any(".lora_" in name for name in stored.keys() | wanted.keys()):
            advice = "set model.lora.rank and targets to its own, or take the final/ of its run"
        return f"it holds {_shown(stored, wanted)}; this run has {_shown(wanted, stored)}; {advice}"
    before = ", ".join(sorted({s.dtype for s, _ in dtypes.values()}))
    now = ", ".join(sorted({w.dtype for _, w in dtypes.values()}))
    return (
        f"its parameters are {before}; this run's are {now}; set model.param_dtype={before}, or "
        "start a new output_dir with model_name_or_path on that run's final/"
    )


def _shown(these: Mapping[str, ArraySpec], others: Mapping[str, ArraySpec]) -> str:
    """Returns the arrays that `others` do not have, or have in another shape, as a text."""
    different = [f"{n} {a}" for n, a in sorted(these.items()) if others.get(n) != a]
    return layout.some(different) if different else "nothing else"


def _layout(arrays: Mapping[str, ArraySpec]) -> str:
    """Returns the kinds of arrays in an optimizer's state; moments of all parameters are one."""
    kinds = {_MOMENT.sub(r".\1", name): array.dtype for name, array in sorted(arrays.items())}
    return "(" + ", ".join(f"{name} {dtype}" for name, dtype in kinds.items()) + ")"
