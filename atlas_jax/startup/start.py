"""The state that training begins with: of a checkpoint, of another run, or of a model."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import NamedSharding

from atlas_jax import distributed, step
from atlas_jax.checkpoint import hf, layout, manager
from atlas_jax.models.config import from_hf
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.train import TrainConfig
from atlas_jax.sharding import fetch
from atlas_jax.startup import directory, vocabulary
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.directory import Origin, Started
from atlas_jax.startup.model import Model
from atlas_jax.types import Params
from atlas_jax.wording import shorten


class Start(NamedTuple):
    """Where training begins."""

    state: step.TrainState
    data: dict[str, Any]  # what the checkpoint says of data and metrics; empty at the beginning
    started: Started


def begin(
    compute: Compute,
    model: Model,
    optimizer: step.Optimizer,
    checkpoints: manager.Checkpoints,
    student: Model | None = None,
) -> Start:
    """Returns the state to train from.

    A run that has a checkpoint continues from its newest one: parameters, optimizer, step and
    position in the data. A new run takes the parameters of `resume_from`, or of
    `model_name_or_path`, and nothing else.

    Args:
        compute: of the run.
        model: what is trained.
        optimizer: its optimizer.
        checkpoints: of this run.
        student: GRPO's frozen student, where this process reads its weights.

    Raises:
        ValueError: if `resume_from` has no weights of this model, or if the run in `output_dir`
            was started with another model, number format or optimizer.
    """
    config = compute.config
    latest = checkpoints.latest()
    distributed.check_same(
        str(latest),
        f"sees {latest} as the newest checkpoint of {checkpoints.directory}, unlike process 0; "
        "look whether all hosts share that directory",
    )
    decoder = model.decoder
    now = Started(
        origin=find_origin(config) if latest is None else Origin(config.model_name_or_path),
        weights=hf.digest(model.source),
        tokenizer=vocabulary.digest(model.files.tokenizer),
        student=hf.digest(student.source) if student else "",
        date=model.template.date.isoformat(),
    )
    if latest is None:
        params = load_origin(now.origin, config, model, decoder)
        logging.info("training begins with %s", _named(now.origin))
        return Start(compute.state(params, optimizer), {}, now)
    before = directory.started(config.output_dir) or now._replace(origin=find_origin(config))
    _check_same_start(config, before, now)
    if not checkpoints.has_training_state(latest):  # made by atlas-convert
        params = checkpoints.restore_params(latest, _abstract(decoder))
        return Start(compute.state(params, optimizer), {}, before)
    restored = checkpoints.restore(latest, compute.abstract_state(decoder, optimizer))
    logging.info("continuing %s at step %d", checkpoints.directory, latest)
    return Start(restored.state, restored.data, before)


def find_origin(config: TrainConfig) -> Origin:
    """Returns the weights that a new run begins with.

    Raises:
        ValueError: if `resume_from` is neither a run, nor a checkpoint, nor a model directory.
    """
    if not config.resume_from:
        return Origin(config.model_name_or_path)
    name = config.resume_from
    place = pathlib.Path(config.resume_from).expanduser()
    if not place.exists():
        raise ValueError(
            f"resume_from={name} does not exist; give the output_dir of another run, one of its "
            "checkpoints, or a model directory"
        )
    if layout.is_model(place):  # whatever it is called and holds beside
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


def load_origin(origin: Origin, config: TrainConfig, model: Model, decoder: Decoder) -> Params:
    """Returns the weights that a run begins with.

    Args:
        origin: from `find_origin`.
        config: of the run.
        model: what is trained, whose weights they must be.
        decoder: dtype and places of the result; that of `model`, or of its frozen reference.

    Raises:
        ValueError: for weights of another model, or if they are gone.
    """
    if origin.step is None:
        if origin.path == config.model_name_or_path:
            return hf.load(model.source, decoder)
        source = hf.open_source(origin.path)
        _check_same_model(origin, source.config, decoder)
        return hf.load(source, decoder)
    place = pathlib.Path(origin.path)
    if not (place / "checkpoints" / str(origin.step)).is_dir():
        raise ValueError(f"the weights that this run began with, {_named(origin)}, are gone")
    stored = place / manager.MODEL_FILES / "config.json"
    if stored.exists():
        _check_same_model(origin, json.loads(stored.read_text()), decoder)
    checkpoints = manager.Checkpoints(origin.path, create=False)
    frozen = decoder is not model.decoder
    params = checkpoints.restore_params(origin.step, _abstract(decoder), cast=frozen)
    checkpoints.close()
    return params


def reference(
    config: TrainConfig,
    model: Model,
    frozen: Decoder,
    checkpoints: manager.Checkpoints,
    start: Start,
) -> Params:
    """Returns the weights that the run began with, or what has become of them by syncing.

    Args:
        config: of the run.
        model: what is trained.
        frozen: dtype and places of the result.
        checkpoints: of this run.
        start: where training begins.

    Raises:
        ValueError: if they are not in the checkpoint and gone from where the run began.
    """
    latest = checkpoints.latest()
    if latest is None:
        places = frozen.placements()

        def copy(x: jax.Array, place: NamedSharding) -> jax.Array:
            # The training step gives its own buffers away, so the copy must be another array.
            return jax.device_put(jnp.copy(fetch(x).astype(frozen.param_dtype)), place)

        make = jax.jit(lambda p: jax.tree.map(copy, p, places), out_shardings=places)
        return make(start.state.params)
    if checkpoints.has_reference(latest):
        return checkpoints.restore_params(latest, _abstract(frozen), "reference")
    return load_origin(start.started.origin, config, model, frozen)


def _named(origin: Origin) -> str:
    return origin.path if origin.step is None else f"{origin.path}/checkpoints/{origin.step}"


def _abstract(decoder: Decoder) -> Any:
    return step.abstract(decoder.shapes, decoder.placements())


def _check_same_model(origin: Origin, stored: dict[str, Any], decoder: Decoder) -> None:
    theirs = dataclasses.asdict(from_hf(stored))
    ours = dataclasses.asdict(decoder.config)
    different = [f"{k} {theirs[k]} (here {ours[k]})" for k in ours if theirs[k] != ours[k]]
    if different:
        raise ValueError(
            f"{_named(origin)} is of another model than model_name_or_path: "
            f"{', '.join(shorten(different, 4))}; set model_name_or_path to the model that it was "
            "made with"
        )


def _check_same_start(config: TrainConfig, before: Started, now: Started) -> None:
    """Checks that the run in `output_dir` was started with the models of this command."""
    for name, digest, other in (
        ("model_name_or_path", before.weights, now.weights),
        ("the tokenizer", before.tokenizer, now.tokenizer),
        ("student_model", before.student, now.student),
    ):
        if digest and other and digest != other:
            options = directory.changed(config)
            raise ValueError(
                f"output_dir={config.output_dir} holds a run of another model: {name} is not what "
                f"the run was started with{f' ({options})' if options else ''}; restore it, or "
                "name a new output_dir"
            )


def check_same_data(config: TrainConfig, start: Start, fingerprint: str) -> None:
    """Checks that a run continues on the data that it was started with, or after `data.refresh`.

    Raises:
        ValueError: if the checkpoint is of other data; names the options that differ.
    """
    if not start.data or start.data["fingerprint"] == fingerprint or config.data.refresh:
        return
    options = directory.changed(config)
    cause = f"these options differ: {options}" if options else "the rows or the tokenizer differ"
    raise ValueError(
        f"output_dir={config.output_dir} holds a run on other data ({start.data['fingerprint']}, "
        f"now {fingerprint}): {cause}; restore them, or name a new output_dir and "
        f"resume_from={config.output_dir}, which takes the weights alone"
    )
