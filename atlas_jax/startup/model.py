"""A model of a run and its tokenizer: opened and checked before its parameters are loaded.

`export` writes it at the end of the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import logging
from tokenizers import Tokenizer

from atlas_jax import distributed
from atlas_jax.checkpoint import exports, hf, layout
from atlas_jax.data.chat_template import ChatTemplate, read_options
from atlas_jax.models.config import ModelConfig, from_hf, ignored
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.train import TrainConfig
from atlas_jax.startup import directory
from atlas_jax.startup.compute import Compute
from atlas_jax.types import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECK_TEXT = (
    "In 2024, 3 cats  saw 1,234.50 dogs.\nIt's naïve: café, Zürich — “déjà vu”.\n\n"
    "你好，世界 こんにちは 안녕\tdef f(x):\n    return x**2  # x² ≥ 0 🙂"
)
"""A text in which wrongly converted tokenizers differ: digits, spaces, line breaks, accents."""


class Model(NamedTuple):
    """A model on disk and how it is computed; its parameters are not loaded yet."""

    source: hf.Source
    decoder: Decoder
    files: hf.ModelFiles
    template: ChatTemplate

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return stop_ids(self.source, self.files.tokenizer)


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
        # What the run could not replace is better known at its start.
        exports.check(_folder(config, "final"), "model", _usual(config))
        if config.metric_for_best_model:
            exports.check(_folder(config, "best"), "model")
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
    # The headers of the files alone: what cannot be trained is refused before weights are read.
    source = hf.open_source(path)
    tokenizer = load_tokenizer(tokenizer_name or str(layout.tokenizer_place(pathlib.Path(path))))
    architecture = from_hf(source.config)
    if unknown := ignored(source.config):
        logging.info("%s: options of config.json without a meaning there: %s", name, unknown)
    check_size(tokenizer, architecture.vocab_size)
    decoder = make_decoder(architecture)
    template = ChatTemplate(tokenizer, template_options, directory.date(config.output_dir))
    return Model(
        source=source,
        decoder=decoder,
        files=hf.model_files(source, tokenizer),
        template=template,
    )


def export(config: TrainConfig, model: Model, params: Params, name: str = "final") -> str:
    """Writes the directory of this name in `output_dir`, and returns its path."""
    folder = _folder(config, name)
    lora = config.model.lora
    if lora.rank and lora.export == "adapter":
        from atlas_jax.checkpoint import adapters

        adapters.export(
            params,
            model.decoder,
            lora,
            model.files,
            folder,
            base=config.model_name_or_path,
            source=config.output_dir,
            unmarked=_usual(config),
        )
        return folder
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


def _folder(config: TrainConfig, name: str) -> str:
    return os.path.join(config.output_dir, name)


def _usual(config: TrainConfig) -> tuple[str, ...]:
    """Returns patterns of the files of a `final/` without a marker that a run has left.

    Where no run has been, the directory is the user's.
    """
    has_run = os.path.isdir(os.path.join(config.output_dir, "checkpoints"))
    return exports.UNMARKED_EXPORT if has_run else ()


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a model directory, `.gguf` file or hub id.

    Raises:
        ValueError: if there is none, or if transformers makes another tokenizer of its file than
            the file describes.
    """
    if path.endswith(".gguf"):
        from atlas_jax.checkpoint import gguf  # needs an extra, and no other model does

        return gguf.load_tokenizer(path)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = pathlib.Path(os.path.expanduser(path))
    if folder.is_dir():
        layout.check_tokenizer(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.exists() else path)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers loads no tokenizer from {path}: {reason}") from None
    file = folder / "tokenizer.json"
    pieces = folder / "tokenizer.model"
    if file.exists():
        expected = Tokenizer.from_file(str(file)).encode(CHECK_TEXT, add_special_tokens=False).ids
        _check_encoding(tokenizer, file, expected)
    elif pieces.exists() and (ids := _by_sentencepiece(pieces)):
        if _encoded(tokenizer) != ids:
            # The classes of some families rebuild the tokenizer otherwise than its file says.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        _check_encoding(tokenizer, pieces, ids)
    return tokenizer


def _by_sentencepiece(file: pathlib.Path) -> list[int]:
    """Returns how sentencepiece encodes the text; nothing for a file of another kind."""
    import sentencepiece

    try:
        ids = sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(CHECK_TEXT)
    except (OSError, RuntimeError):
        return []
    return list(ids)


def _encoded(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(CHECK_TEXT, add_special_tokens=False).input_ids)


def _check_encoding(
    tokenizer: PreTrainedTokenizerBase, file: pathlib.Path, expected: list[int]
) -> None:
    """Checks that transformers encodes a text as the library of the file does from the file itself.

    Some releases of transformers 5 rebuilt the tokenizers of some models from their class and lost
    spaces (transformers issues 45488 and 48206).
    """
    if (ids := _encoded(tokenizer)) != expected:
        import transformers

        raise ValueError(
            f"transformers {transformers.__version__} loads another tokenizer than {file} "
            f"describes: of {CHECK_TEXT[:20]!r}… it makes the ids {ids}, not {expected}; install "
            "another release of transformers"
        )


def check_size(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Checks that the model has a row for every token of the vocabulary proper.

    Tokens that were added to it may lie beyond: Gemma 3 has one for images, and fine-tunings often
    one for padding. What counts of these is whether a text contains one, see `check_ids`.

    Raises:
        ValueError: if the vocabulary is larger than the model's.
    """
    added = tokenizer.added_tokens_decoder.keys()
    highest = max((i for i in tokenizer.get_vocab().values() if i not in added), default=-1)
    if highest >= vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {highest}, but the model's vocab_size is {vocab_size}; "
            "set tokenizer_name_or_path to the tokenizer that the model was trained with"
        )


def check_ids(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int] | np.ndarray, vocab_size: int
) -> None:
    """Checks that the model has a row for each of the tokens.

    Raises:
        ValueError: names a token that is beyond the model's vocabulary.
    """
    highest = int(np.max(tokens, initial=0))
    if highest >= vocab_size:
        raise ValueError(
            f"the rows contain {tokenizer.convert_ids_to_tokens(highest)!r}, whose id {highest} "
            f"has no row in the model: its vocab_size is {vocab_size}; leave that token out, or "
            "set tokenizer_name_or_path to the tokenizer that the model was trained with"
        )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a short hash of a tokenizer's vocabulary and chat template."""
    # The vocabulary is a dict whose order may change between releases of the library.
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def stop_ids(source: hf.Source, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the tokens that end a text of a model, as its `generation_config.json` says.

    Without it they are what `config.json` says and the tokenizer's, which some fine-tunings changed
    alone.
    """
    if said := _eos(source.generation_config):
        return said
    eos = tokenizer.eos_token_id
    own = _eos(source.config)
    return own if eos is None or eos in own else (*own, eos)


def _eos(options: Mapping[str, Any]) -> tuple[int, ...]:
    ids = options.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(stop) is int for stop in ids):
        raise ValueError(f"eos_token_id={ids!r} of the model must be whole numbers; correct it")
    return tuple(ids)
