"""Weights of `resume_from`, and of the reference: what a run begins with besides its model."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from atlas_jax import step
from atlas_jax.checkpoint import hf, layout, manager
from atlas_jax.models.config import from_hf
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.train import TrainConfig
from atlas_jax.sharding import fetch
from atlas_jax.startup import directory
from atlas_jax.startup.directory import Origin
from atlas_jax.types import Params
from atlas_jax.wording import shorten


def find(config: TrainConfig) -> Origin:
    """Returns the weights that `resume_from` names.

    Raises:
        ValueError: if `resume_from` is neither a run, nor a checkpoint, nor a model directory.
    """
    name = config.resume_from
    place = pathlib.Path(config.resume_from).expanduser()
    if not place.exists():
        raise ValueError(
            f"resume_from={name} does not exist; give the output_dir of another run, one of its "
            "checkpoints, or a model directory"
        )
    if layout.is_model(place) or layout.is_adapter(place):  # whatever it is called and holds beside
        return Origin(str(place))
    if place.parent.name == "checkpoints" and place.name.isdigit():
        return Origin(str(place.parent.parent), int(place.name))
    if (place / "checkpoints").is_dir():
        latest = manager.Checkpoints(str(place), create=False).latest()
        if latest is not None:
            return Origin(str(place), latest)
    final = f"; its {place / 'final'} is one" if layout.is_model(place / "final") else ""
    raise ValueError(
        f"resume_from={name} has no complete checkpoint and is no model directory{final}"
    )


def load(
    origin: Origin, decoder: Decoder, cast: bool = False, base: hf.Source | None = None
) -> Params:
    """Returns the weights that a run begins with; with LoRA the factors.

    Args:
        origin: from `find`, or what an earlier command of the run began with.
        decoder: architecture, dtype and places of the result.
        cast: whether another stored dtype is cast, as for a reference that rests in another one.
        base: the model that factors belong to.

    Raises:
        ValueError: for weights of another model, or if they are gone.
    """
    if origin.step is None:
        path = hf.resolve(origin.path)
        if decoder.lora is not None:
            return _load_factors(path, decoder, base)
        source = hf.open_source(path)
        _check_same_model(origin, source.config, decoder)
        return hf.load(source, decoder)
    place = pathlib.Path(origin.path)
    if not (place / "checkpoints" / str(origin.step)).is_dir():
        raise ValueError(f"the weights that this run began with, {origin}, are gone")
    stored = place / manager.MODEL_FILES / "config.json"
    if stored.exists():
        _check_same_model(origin, json.loads(stored.read_text()), decoder)
    if base is not None and decoder.lora is not None:
        check_same_base(origin, hf.digest(base))
        check_scale(origin.path, decoder.lora.scale)
    checkpoints = manager.Checkpoints(origin.path, create=False)
    trained = decoder.trained
    params = checkpoints.restore_params(
        origin.step, step.abstract(trained.shapes, trained.placements), cast=cast
    )
    checkpoints.close()
    return params


def _load_factors(path: str, decoder: Decoder, base: hf.Source | None) -> Params:
    """Returns the factors of an adapter directory."""
    if not layout.is_adapter(pathlib.Path(path)):
        raise ValueError(
            f"resume_from={path} is a whole model, and model.lora.rank trains factors; set "
            "model_name_or_path to it, or resume_from to an adapter"
        )
    from atlas_jax.checkpoint import adapters  # most runs train whole models

    assert base is not None, "factors belong to a model"
    return adapters.load(path, decoder, base)


def check_scale(run: str, scale: float) -> None:
    """Checks that the factors of a run were trained with this scale, which is in no array.

    Raises:
        ValueError: names the options of that run.
    """
    path = pathlib.Path(run) / "config.json"
    said = json.loads(path.read_text())["model"].get("lora", {}) if path.exists() else {}
    if not said.get("rank"):
        return
    from atlas_jax.checkpoint import adapters  # most runs train whole models

    if adapters.scale_of(said["rank"], said["alpha"], said["rslora"]) != scale:
        raise ValueError(
            f"{run} has factors of model.lora.alpha={said['alpha']} and "
            f"rslora={str(said['rslora']).lower()}; set these again"
        )


def check_same_base(origin: Origin, digest: str) -> None:
    """Checks that the factors of another run were trained on the model of this one.

    Raises:
        ValueError: if they were not.
    """
    before = directory.started(origin.path)
    if before is not None and before.weights != digest:
        raise ValueError(
            f"{origin} has factors of another model than model_name_or_path; set that to the model "
            "that they were trained on"
        )


def reference(
    frozen: Decoder,
    checkpoints: manager.Checkpoints,
    origin: Origin,
    state: step.TrainState,
) -> Params:
    """Returns the weights that the run began with, or what has become of them by syncing.

    Args:
        frozen: dtype and places of the result.
        checkpoints: of this run.
        origin: weights that the run began with.
        state: where training continues, if there is a checkpoint of its step, or begins.

    Raises:
        ValueError: if they are not in the checkpoint and gone from where the run began.
    """
    number = int(state.step)
    if not (checkpoints.directory / str(number)).is_dir():
        places = frozen.placements()

        def copy(x: jax.Array, place: NamedSharding) -> jax.Array:
            # The training step gives its own buffers away, so the copy must be another array.
            return jax.device_put(jnp.copy(fetch(x).astype(frozen.param_dtype)), place)

        make = jax.jit(lambda p: jax.tree.map(copy, p, places), out_shardings=places)
        return make(state.params)
    if checkpoints.has_reference(number):
        return checkpoints.restore_params(
            number, step.abstract(frozen.shapes, frozen.placements()), "reference"
        )
    return load(origin, frozen, cast=True)


def _check_same_model(origin: Origin, stored: dict[str, Any], decoder: Decoder) -> None:
    theirs = dataclasses.asdict(from_hf(stored))
    ours = dataclasses.asdict(decoder.config)
    different = [f"{k} {theirs[k]} (here {ours[k]})" for k in ours if theirs[k] != ours[k]]
    if different:
        raise ValueError(
            f"{origin} is of another model than model_name_or_path: "
            f"{', '.join(shorten(different, 4))}; set model_name_or_path to the model that it was "
            "made with"
        )
