"""A model of a run: opened before its parameters are loaded, and exported at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from absl import logging

from atlas_jax import distributed
from atlas_jax.checkpoint import exports, hf
from atlas_jax.data.chat_template import ChatTemplate, read_options
from atlas_jax.models.config import ModelConfig, from_hf, ignored
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.train import TrainConfig
from atlas_jax.startup import directory, vocabulary
from atlas_jax.startup.compute import Compute
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


def open_model(compute: Compute) -> Model:
    """Opens the model that is trained.

    Raises:
        ValueError: for files that are missing, broken or not supported, and for a model with fewer
            positions than the longest sequence of the config.
    """
    config = compute.config
    model = _open(
        config,
        config.model_name_or_path,
        compute.decoder,
        read_options(config.chat_template_kwargs),
        config.tokenizer_name_or_path,
    )
    longest = config.longest_sequence
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


def open_frozen(compute: Compute, path: str, template_options: str = "") -> Model:
    """Opens a model that is not trained, see `Compute.frozen_decoder`.

    Args:
        compute: of the run.
        path: Hugging Face directory, `.gguf` file or hub id.
        template_options: variables of its chat template as JSON; empty takes
            `chat_template_kwargs`.

    Raises:
        ValueError: for files that are missing, broken or not supported.
    """
    config = compute.config
    options = read_options(template_options or config.chat_template_kwargs)
    return _open(config, path, compute.frozen_decoder, options)


def _open(
    config: TrainConfig,
    name: str,
    make_decoder: Callable[[ModelConfig], Decoder],
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
    decoder = make_decoder(architecture)
    template = ChatTemplate(tokenizer, template_options, directory.date(config.output_dir))
    return Model(
        source=source,
        decoder=decoder,
        files=hf.model_files(source, tokenizer),
        template=template,
    )


def export(config: TrainConfig, model: Model, params: Params) -> str:
    """Writes `final/` and returns its path."""
    folder = _final(config)
    hf.export(
        params,
        model.decoder,
        model.files,
        folder,
        dtype=config.model.export_dtype,
        max_shard_size=config.model.max_shard_size,
        source=config.output_dir,
        unmarked=_usual(config),
    )
    return folder


def _final(config: TrainConfig) -> str:
    return os.path.join(config.output_dir, "final")


def _usual(config: TrainConfig) -> tuple[str, ...]:
    """Returns patterns of the files of a `final/` without a marker that a run has left.

    Where no run has been, the directory is the user's.
    """
    has_run = os.path.isdir(os.path.join(config.output_dir, "checkpoints"))
    return exports.UNMARKED_EXPORT if has_run else ()
