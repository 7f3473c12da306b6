"""The tokenizer of a model: loaded, and checked against its own file and against the model."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from atlas_jax.checkpoint import hf, layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECK_TEXT = (
    "In 2024, 3 cats  saw 1,234.50 dogs.\nIt's naïve: café, Zürich — “déjà vu”.\n\n"
    "你好，世界 こんにちは 안녕\tdef f(x):\n    return x**2  # x² ≥ 0 🙂"
)
"""A text in which wrongly converted tokenizers differ: digits, spaces, line breaks, accents."""


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


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a short hash of a tokenizer's vocabulary and chat template."""
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
