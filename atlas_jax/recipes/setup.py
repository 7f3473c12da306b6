"""What all recipes share: the model, the optimizer, and the weights that training begins with."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from atlas_jax import distributed, optim, step
from atlas_jax.checkpoint import exports, hf, layout, manager
from atlas_jax.config import GRPOConfig, TrainConfig
from atlas_jax.data.chat_template import ChatTemplate, read_options
from atlas_jax.models import attention
from atlas_jax.models.config import ModelConfig, from_hf, ignored
from atlas_jax.models.transformer import Decoder
from atlas_jax.recipes import run_dir, vocabulary
from atlas_jax.recipes.run_dir import Origin, Started
from atlas_jax.sharding import Sharding, make_mesh, platform
from atlas_jax.types import Params


class Model(NamedTuple):
    """A model on disk and how it is computed; its parameters are not loaded yet."""

    source: hf.Source
    decoder: Decoder
    files: hf.ModelFiles
    template: ChatTemplate

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return vocabulary.stop_ids(self.source, self.files.tokenizer)


class Start(NamedTuple):
    """Where training begins."""

    state: step.TrainState
    data: dict[str, Any]  # what the checkpoint says of data and metrics; empty at the beginning
    started: Started


def make_sharding(config: TrainConfig) -> Sharding:
    """Returns the mesh over all devices and the rules of `config.sharding`."""
    return Sharding(make_mesh(config.mesh), config.sharding, config.offload)


def open_model(config: TrainConfig, sharding: Sharding, longest: int) -> Model:
    """Opens the model that is trained.

    Args:
        config: of the run.
        sharding: where its parameters live.
        longest: tokens of the longest sequence.

    Raises:
        ValueError: for files that are missing, broken or not supported.
    """
    dtype = jnp.dtype(config.model.param_dtype)
    tokenizer = config.tokenizer_name_or_path
    kwargs = read_options(config.chat_template_kwargs)
    model = _open(config, config.model_name_or_path, sharding, dtype, kwargs, tokenizer)
    most = model.decoder.config.max_positions
    if longest > most:
        raise ValueError(
            f"sequences of {longest} tokens are longer than the {most} positions of "
            f"{config.model_name_or_path}; lower max_seq_length, or max_prompt_length and "
            "max_new_tokens"
        )
    if distributed.is_main():
        # What the end of the run could not replace is better known at its start.
        exports.check(_final(config), "model", _usual(config))
    return model


def open_frozen(config: TrainConfig, path: str, sharding: Sharding) -> Model:
    """Opens a model that is not trained: its parameters rest in the compute dtype, on the devices.

    Generation would fetch what rests in host memory again for every token.

    Raises:
        ValueError: for files that are missing, broken or not supported.
    """
    sharding = dataclasses.replace(sharding, offload="none")
    text = config.chat_template_kwargs
    if isinstance(config, GRPOConfig) and path == config.student_model:
        text = config.teaching.student_chat_template_kwargs or text
    return _open(config, path, sharding, compute_dtype(config, sharding), read_options(text))


def compute_dtype(config: TrainConfig, sharding: Sharding) -> jnp.dtype:
    """Returns the dtype of activations that `model.compute_dtype` means on these devices."""
    on_cpu = platform(sharding.mesh) == "cpu"
    wanted = config.model.compute_dtype
    return jnp.dtype(("float32" if on_cpu else "bfloat16") if wanted == "auto" else wanted)


def _open(
    config: TrainConfig,
    name: str,
    sharding: Sharding,
    param_dtype: jnp.dtype,
    template_options: Mapping[str, Any],
    tokenizer_name: str = "",
) -> Model:
    path = hf.resolve(name)
    source = hf.open_source(path)
    tokenizer = vocabulary.load_tokenizer(tokenizer_name or path)
    architecture = from_hf(source.config)
    if unknown := ignored(source.config):
        logging.info("%s: options of config.json without a meaning there: %s", name, unknown)
    vocabulary.check_size(tokenizer, architecture.vocab_size)
    decoder = make_decoder(config, architecture, sharding, param_dtype)
    template = ChatTemplate(tokenizer, template_options, run_dir.date(config.output_dir))
    return Model(source, decoder, hf.model_files(source, tokenizer), template)


def make_decoder(
    config: TrainConfig, architecture: ModelConfig, sharding: Sharding, param_dtype: jnp.dtype
) -> Decoder:
    """Returns how a model of `architecture` is computed in this run.

    Raises:
        ValueError: for attention that the devices lack, or parameters that do not divide over them.
    """
    dtype = compute_dtype(config, sharding)
    # For float32 operands JAX's default is TF32 on NVIDIA GPUs and one bfloat16 pass on TPUs.
    precision = "highest" if dtype == jnp.float32 else None
    jax.config.update("jax_default_matmul_precision", precision)
    decoder = Decoder(
        architecture,
        sharding,
        attention.select(config.attn_implementation, sharding.mesh, config.packing, dtype),
        param_dtype=param_dtype,
        compute_dtype=dtype,
        remat=config.gradient_checkpointing,
    )
    decoder.placements()
    return decoder


def make_optimizer(config: TrainConfig, decoder: Decoder, num_steps: int) -> step.Optimizer:
    """Returns AdamW with the schedule of a run of `num_steps`."""
    learning_rate = optim.schedule(config, num_steps)
    transform = optim.adamw(config, learning_rate)
    return step.place_optimizer(
        transform, learning_rate, decoder.shapes, decoder.dims, decoder.sharding
    )


def begin(
    config: TrainConfig,
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
        config: of the run.
        model: what is trained.
        optimizer: its optimizer.
        checkpoints: of this run.
        student: GRPO's frozen student, where this process reads its weights.

    Raises:
        ValueError: if `resume_from` has no weights of this model, or if the run in `output_dir`
            was started with another model, number format or optimizer.
    """
    latest = checkpoints.latest()
    distributed.check_same(
        str(latest),
        f"sees {latest} as the newest checkpoint of {checkpoints.directory}, unlike process 0; "
        "look whether all hosts share that directory",
    )
    decoder = model.decoder
    now = Started(
        find_origin(config) if latest is None else Origin(config.model_name_or_path),
        hf.digest(model.source),
        vocabulary.digest(model.files.tokenizer),
        hf.digest(student.source) if student else "",
        model.template.date.isoformat(),
    )
    if latest is None:
        params = load_origin(now.origin, config, model, decoder)
        logging.info("training begins with %s", _named(now.origin))
        return Start(step.init_state(params, optimizer, decoder.sharding), {}, now)
    before = run_dir.started(config.output_dir) or now._replace(origin=find_origin(config))
    _check_same_start(config, before, now)
    if not checkpoints.has_training_state(latest):  # made by tools/convert_checkpoint.py
        params = checkpoints.restore_params(latest, _abstract(decoder))
        return Start(step.init_state(params, optimizer, decoder.sharding), {}, before)
    abstract = step.abstract_state(
        decoder.shapes, decoder.placements(), optimizer, decoder.sharding
    )
    restored = checkpoints.restore(latest, abstract)
    logging.info("continuing %s at step %d", checkpoints.directory, latest)
    return Start(restored.state, restored.data, before)


def find_origin(config: TrainConfig) -> Origin:
    """Returns the weights that a new run begins with.

    Raises:
        ValueError: if `resume_from` is neither a run, nor a checkpoint, nor a model directory.
    """
    if not config.resume_from:
        return Origin(config.model_name_or_path)
    name, place = config.resume_from, pathlib.Path(config.resume_from).expanduser()
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


def _named(origin: Origin) -> str:
    return origin.path if origin.step is None else f"{origin.path}/checkpoints/{origin.step}"


def _abstract(decoder: Decoder) -> Any:
    return step.abstract(decoder.shapes, decoder.placements())


def _check_same_model(origin: Origin, stored: dict[str, Any], decoder: Decoder) -> None:
    theirs, ours = dataclasses.asdict(from_hf(stored)), dataclasses.asdict(decoder.config)
    different = [f"{k} {theirs[k]} (here {ours[k]})" for k in ours if theirs[k] != ours[k]]
    if different:
        raise ValueError(
            f"{_named(origin)} is of another model than model_name_or_path: "
            f"{', '.join(different[:4])}; set model_name_or_path to the model that it was made with"
        )


def _check_same_start(config: TrainConfig, before: Started, now: Started) -> None:
    """Checks that the run in `output_dir` was started with the models of this command."""
    for name, digest, other in (
        ("model_name_or_path", before.weights, now.weights),
        ("the tokenizer", before.tokenizer, now.tokenizer),
        ("student_model", before.student, now.student),
    ):
        if digest and other and digest != other:
            options = run_dir.changed(config)
            raise ValueError(
                f"output_dir={config.output_dir} holds a run of another model: {name} is not what "
                f"the run was started with{f' ({options})' if options else ''}; restore it, or "
                "name a new output_dir"
            )


def data_state(config: TrainConfig, start: Start, fingerprint: str) -> dict[str, Any]:
    """Returns the position in the data to continue from; empty at the beginning.

    After `data.refresh` the data may differ; the position is kept anyway, under the fingerprint of
    the data as they are.

    Raises:
        ValueError: if the checkpoint is of other data; names the options that differ.
    """
    if not start.data or start.data["fingerprint"] == fingerprint or config.data.refresh:
        return start.data and start.data | {"fingerprint": fingerprint}
    options = run_dir.changed(config)
    cause = f"these options differ: {options}" if options else "the rows or the tokenizer differ"
    raise ValueError(
        f"output_dir={config.output_dir} holds a run on other data ({start.data['fingerprint']}, "
        f"now {fingerprint}): {cause}; restore them, or name a new output_dir and "
        f"resume_from={config.output_dir}, which takes the weights alone"
    )


def export(config: TrainConfig, model: Model, params: Any) -> str:
    """Writes `final/` and returns its path."""
    directory = _final(config)
    hf.export(
        params,
        model.decoder,
        model.files,
        directory,
        dtype=config.model.export_dtype,
        max_shard_size=config.model.max_shard_size,
        source=config.output_dir,
        unmarked=_usual(config),
    )
    return directory


def _final(config: TrainConfig) -> str:
    return os.path.join(config.output_dir, "final")


def _usual(config: TrainConfig) -> tuple[str, ...]:
    """Returns patterns of the files of a `final/` without a marker that a run has left.

    Where no run has been, the directory is the user's.
    """
    has_run = os.path.isdir(os.path.join(config.output_dir, "checkpoints"))
    return exports.UNMARKED_EXPORT if has_run else ()
