"""What all recipes share: the run's files, the model, and where its weights come from."""

from __future__ import annotations

import json
import logging as python_logging
import os
import pathlib
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from atlas_jax import distributed, optim, step
from atlas_jax.checkpoint import exports, gguf, hf, manager
from atlas_jax.config import TrainConfig, masked
from atlas_jax.data import snapshot
from atlas_jax.files import write_whole
from atlas_jax.models import attention
from atlas_jax.models.config import ModelConfig, from_hf
from atlas_jax.models.transformer import Decoder
from atlas_jax.sharding import Sharding, make_mesh, platform

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Model(NamedTuple):
    """A model on disk and how it is computed; its parameters are not loaded yet."""

    source: hf.Source
    decoder: Decoder
    files: hf.ModelFiles

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, as `generation_config.json` says."""
        ids = self.files.generation_config.get("eos_token_id")
        return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


class Start(NamedTuple):
    """Where training begins."""

    state: step.TrainState
    data: dict[str, Any]  # position in the data; empty at the beginning


def open_run(config: TrainConfig) -> None:
    """Makes `output_dir`, with the resolved config and the database's snapshot in it.

    The log goes to `training.log` from here on.

    Raises:
        ValueError: for a database that cannot be trained on.
        OSError: if the database is lost.
    """
    directory = pathlib.Path(config.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", _compilation_cache(config))
    _share(directory, json.dumps(masked(config), indent=2) + "\n")
    _open_log(directory)
    if config.data.db_url and distributed.is_main():
        snapshot.take(config.data, config.output_dir)
    distributed.barrier("the data's snapshot")


def _compilation_cache(config: TrainConfig) -> str | None:
    """Returns where compiled programs are kept, if they are.

    XLA's CPU programs lose the order of their collectives in the cache: processes that run them in
    different orders wait for each other for ever, or take one sum for another.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        return None
    return os.path.expanduser(config.compilation_cache_dir) or None


def _open_log(directory: pathlib.Path) -> None:
    logging.get_absl_handler().addFilter(_own_or_serious)
    if not distributed.is_main():
        logging.set_verbosity(logging.WARNING)
        return
    handler = python_logging.FileHandler(directory / "training.log")
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(_own_or_serious)
    logging.get_absl_logger().addHandler(handler)
    logging.info("jax %s, %d x %s", jax.__version__, jax.device_count(), jax.devices()[0])


def _share(directory: pathlib.Path, text: str) -> None:
    """Writes `config.json`, and checks that all processes have the same config and directory."""
    distributed.check_same(text, "its options differ from those of process 0; give all the same")
    if distributed.is_main():
        write_whole(directory / "config.json", text)
    distributed.barrier("the run's directory")
    path = directory / "config.json"
    distributed.check_all(
        path.exists() and path.read_text() == text,
        f"output_dir={directory} is not the directory that process 0 writes to; use one on a file "
        "system that all hosts share",
    )


def _own_or_serious(record: python_logging.LogRecord) -> bool:
    """Lets through what this package logs, and the warnings of others (Orbax logs every file)."""
    package = pathlib.Path(__file__).parent.parent
    return (
        record.levelno >= python_logging.WARNING or package in pathlib.Path(record.pathname).parents
    )


def make_sharding(config: TrainConfig) -> Sharding:
    """Returns the mesh over all devices and the rules of `config.sharding`."""
    return Sharding(make_mesh(config.mesh), config.sharding, config.offload)


def open_model(config: TrainConfig, sharding: Sharding, longest: int) -> Model:
    """Opens the model that is trained, and writes its config and tokenizer beside the checkpoints.

    Args:
        config: of the run.
        sharding: where its parameters live.
        longest: tokens of the longest sequence.

    Raises:
        ValueError: for files that are missing, broken or not supported.
    """
    dtype = jnp.dtype(config.model.param_dtype)
    tokenizer = config.tokenizer_name_or_path
    model = _open(config, config.model_name_or_path, sharding, dtype, tokenizer)
    most = model.decoder.config.max_positions
    if longest > most:
        raise ValueError(
            f"sequences of {longest} tokens are longer than the {most} positions of "
            f"{config.model_name_or_path}; lower max_seq_length, or max_prompt_length and "
            "max_new_tokens"
        )
    if distributed.is_main():
        # What the end of the run could not replace is better known at its start.
        exports.check(_final(config), "model", exports.UNMARKED_EXPORT)
        hf.write_run_files(os.path.join(config.output_dir, manager.MODEL_FILES), model.files)
    return model


def open_frozen(config: TrainConfig, path: str, sharding: Sharding) -> Model:
    """Opens a model that is not trained: its parameters rest in the compute dtype.

    Raises:
        ValueError: for files that are missing, broken or not supported.
    """
    return _open(config, path, sharding, compute_dtype(config, sharding), "")


def compute_dtype(config: TrainConfig, sharding: Sharding) -> jnp.dtype:
    """Returns the dtype of activations that `model.compute_dtype` means on these devices."""
    on_cpu = platform(sharding.mesh) == "cpu"
    wanted = config.model.compute_dtype
    return jnp.dtype(("float32" if on_cpu else "bfloat16") if wanted == "auto" else wanted)


def _open(
    config: TrainConfig, name: str, sharding: Sharding, param_dtype: jnp.dtype, tokenizer_name: str
) -> Model:
    path = hf.resolve(name)
    source = hf.open_source(path)
    tokenizer = load_tokenizer(tokenizer_name or path)
    architecture = from_hf(source.config)
    check_vocabulary(tokenizer, architecture.vocab_size)
    decoder = make_decoder(config, architecture, sharding, param_dtype)
    return Model(source, decoder, hf.model_files(source, tokenizer))


def make_decoder(
    config: TrainConfig, architecture: ModelConfig, sharding: Sharding, param_dtype: jnp.dtype
) -> Decoder:
    """Returns how a model of `architecture` is computed in this run.

    Raises:
        ValueError: for attention that the devices lack, or parameters that do not divide over them.
    """
    dtype = compute_dtype(config, sharding)
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


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a model directory, `.gguf` file or hub id.

    Raises:
        ValueError: if there is none.
    """
    if path.endswith(".gguf"):
        return gguf.load_tokenizer(path)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"{path} has no tokenizer: {error}") from None


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Checks that the model has a row for every token.

    Raises:
        ValueError: if the tokenizer has more tokens than the model; fewer are usual (padding).
    """
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {highest}, but the model's vocab_size is {vocab_size}; "
            "set tokenizer_name_or_path to the tokenizer that the model was trained with"
        )


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
) -> Start:
    """Returns the state to train from.

    It is the first that there is of:

    1. the newest checkpoint of this run,
    2. the newest checkpoint of `resume_from`,
    3. the weights of `model_name_or_path`.

    Raises:
        ValueError: if `resume_from` has no checkpoint.
    """
    distributed.check_same(
        str(checkpoints.latest()),
        f"sees {checkpoints.latest()} as the newest checkpoint of {checkpoints.directory}, unlike "
        "process 0; look whether all hosts share that directory",
    )
    if checkpoints.latest() is not None:
        return _restore(checkpoints, model, optimizer)
    if config.resume_from:
        other = manager.Checkpoints(config.resume_from)
        if other.latest() is None:
            raise ValueError(f"resume_from={config.resume_from} has no checkpoint; leave it empty")
        start = _restore(other, model, optimizer)
        other.close()
        return start
    params = hf.load(model.source, model.decoder)
    logging.info("loaded %s", config.model_name_or_path)
    return Start(step.init_state(params, optimizer, model.decoder.sharding, config.seed), {})


def data_state(config: TrainConfig, start: Start, fingerprint: str) -> dict[str, Any]:
    """Returns the position in the data; data that was refreshed takes it over as it is."""
    return start.data | ({"fingerprint": fingerprint} if config.data.refresh else {})


def _restore(checkpoints: manager.Checkpoints, model: Model, optimizer: step.Optimizer) -> Start:
    number, decoder = checkpoints.latest(), model.decoder
    assert number is not None
    placements, sharding = decoder.placements(), decoder.sharding
    if not checkpoints.has_training_state(number):
        abstract = step.abstract(decoder.shapes, placements)
        params = checkpoints.restore_params(number, abstract)
        return Start(step.init_state(params, optimizer, sharding, 0), {})
    abstract_state = step.abstract_state(decoder.shapes, placements, optimizer, sharding)
    restored = checkpoints.restore(number, abstract_state)
    logging.info("continuing %s at step %d", checkpoints.directory, number)
    return Start(restored.state, restored.data)


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
        unmarked=exports.UNMARKED_EXPORT,
    )
    return directory


def _final(config: TrainConfig) -> str:
    return os.path.join(config.output_dir, "final")
