"""Hugging Face tokenizers built from the metadata of GGUF files, without torch.

A GGUF file holds the vocabulary, the merges and the kind of each token, but only the *name* of the
pre-tokenizer, so the regular expressions are here. They come from the published `tokenizer.json` of
the models, which llama.cpp follows too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

_NORMAL = 1
_CONTROL = 3
_USER_DEFINED = 4
_UNUSED = 5  # tokenizer.ggml.token_type

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _ByteLevel(NamedTuple):
    """A byte-level pre-tokenizer, which `tokenizer.ggml.pre` names."""

    splits: tuple[str, ...]  # regular expressions; each splits the pieces of the one before
    nfc: bool = False
    ignore_merges: bool = False  # whether a piece that is in the vocabulary is always one token
    add_bos: bool = False  # default if the file does not say


_LLAMA3_BPE = _ByteLevel((_LLAMA3,), ignore_merges=True, add_bos=True)
_DIGITS = _ByteLevel((r"\p{N}", _GPT2))

_BYTE_LEVEL = {
    "default": _ByteLevel((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _ByteLevel((_GPT2,)),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama3": _LLAMA3_BPE,
    "llama-v3": _LLAMA3_BPE,
    "llama-bpe": _LLAMA3_BPE,
    "tekken": _ByteLevel((_TEKKEN,), ignore_merges=True, add_bos=True),
    "qwen2": _ByteLevel((_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),), nfc=True),
}

_UNDERSTOOD = {
    "model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges",
    "add_bos_token", "add_eos_token", "add_space_prefix",
}  # fmt: skip


def build_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Returns the tokenizer that the `tokenizer.*` metadata of a GGUF file describes.

    Control tokens are special. User-defined tokens are matched whole but are not special. Entries
    that llama.cpp adds only to pad the embedding (`[PAD32000]`) are left out.

    Args:
        metadata: all metadata of the file, by name.

    Raises:
        ValueError: if the kind of tokenizer, its pre-tokenizer or an option is unsupported, or if
            the metadata is incomplete or contradicts itself.
    """
    kind = _required(metadata, "model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise ValueError(
            f"tokenizer.ggml.model = {kind!r} is not supported; supported are {', '.join(builders)}"
        )
    for key, value in metadata.items():
        option = key.removeprefix("tokenizer.ggml.")
        known = option == key or option in _UNDERSTOOD or option.endswith("_token_id")
        if value and not known:
            raise ValueError(f"option {key} is not supported; use another file")
    tokens = _required(metadata, "tokens")
    types = _required(metadata, "token_type")
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{len(tokens)} tokens, {len(set(tokens))} of them different, have {len(types)} types; "
            "these must be equal: the file is damaged"
        )
    tokenizer = builders[kind](metadata, tokens, types)
    by_type = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in by_type if k == _CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, k in by_type if k == _USER_DEFINED]
    )
    return _wrapped(tokenizer, metadata, tokens)


def _wrapped(
    tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str]
) -> PreTrainedTokenizerFast:
    options: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = _token(metadata, key, tokens)
        if token is not None:
            options[f"{role}_token"] = token
    others = [key for key in metadata if key.startswith("tokenizer.chat_template.")]
    if others:
        logging.warning("only the default chat template is taken, not %s", ", ".join(others))
    if "tokenizer.chat_template" in metadata:
        options["chat_template"] = metadata["tokenizer.chat_template"]
    length = f"{metadata.get('general.architecture')}.context_length"
    if length in metadata:
        options["model_max_length"] = metadata[length]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> Tokenizer:
    name = _required(metadata, "pre")
    if name not in _BYTE_LEVEL:
        raise ValueError(
            f"pre-tokenizer tokenizer.ggml.pre = {name!r} is not supported; supported are "
            f"{', '.join(_BYTE_LEVEL)}"
        )
    if _flag(metadata, "add_space_prefix", default=False):
        raise ValueError("option tokenizer.ggml.add_space_prefix is not supported with gpt2")
    pre = _BYTE_LEVEL[name]
    merges = _pairs(_required(metadata, "merges"))
    vocab = _vocabulary(tokens, types)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _template(metadata, tokens, add_bos=pre.add_bos)
    return tokenizer


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> Tokenizer:
    """Returns the tokenizer of a SentencePiece BPE model, with the prefix space of llama.cpp.

    The prefix space is added before the text and after every special token, as in the published
    `tokenizer.json` of Llama 2.
    """
    vocab = _vocabulary(tokens, types)
    if "tokenizer.ggml.merges" in metadata:
        merges = _pairs(metadata["tokenizer.ggml.merges"])
    else:
        scores = _required(metadata, "scores")
        pieces = zip(tokens, scores, types, strict=True)
        merges = _merges_from_scores({t: s for t, s, kind in pieces if kind == _NORMAL}, vocab)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=_token(metadata, "unknown", tokens),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = _flag(metadata, "add_space_prefix", default=True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), spaces] if prefix else [spaces]
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.post_processor = _template(metadata, tokens, add_bos=True)
    return tokenizer


def _merges_from_scores(
    scores: Mapping[str, float], vocab: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Returns every merge of two pieces into a third one, best score first.

    SentencePiece stores no merges: it joins the two neighbours whose union has the highest score.
    Equal scores are ordered as in the Hugging Face conversion, so that ids agree with it.
    """
    merges = []
    for piece, score in scores.items():
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(a, b) for a, b in cuts if a in scores and b in scores]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(score, pair) for pair in known]
    merges.sort(key=lambda m: (m[0], len(m[1][0]), len(m[1][1])), reverse=True)
    return [pair for _, pair in merges]


def _pairs(merges: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        left, separator, right = merge.partition(" ")
        if not separator or " " in right:
            raise ValueError(f"merge {merge!r} in tokenizer.ggml.merges is not two pieces")
        pairs.append((left, right))
    return pairs


def _vocabulary(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    return {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if not (kind == _UNUSED and token == f"[PAD{i}]")
    }


def _template(
    metadata: Mapping[str, Any], tokens: Sequence[str], *, add_bos: bool
) -> processors.TemplateProcessing:
    bos = _added_token(metadata, "bos", tokens, default=add_bos)
    eos = _added_token(metadata, "eos", tokens, default=False)
    first = [*bos, "$A", *eos]
    second = [*bos, "$B", *eos]
    return processors.TemplateProcessing(
        single=first,
        pair=[*first, *(f"{part}:1" for part in second)],
        special_tokens=[(token, tokens.index(token)) for token in bos + eos],
    )


def _added_token(
    metadata: Mapping[str, Any], role: str, tokens: Sequence[str], *, default: bool
) -> list[str]:
    """Returns the token that is added to each text's begin or end, as a list of at most one."""
    if not _flag(metadata, f"add_{role}_token", default=default):
        return []
    token = _token(metadata, role, tokens)
    if token is None:
        raise ValueError(
            f"the tokenizer adds {role.upper()}, but metadata tokenizer.ggml.{role}_token_id is "
            "missing; convert the model again"
        )
    return [token]


def _token(metadata: Mapping[str, Any], role: str, tokens: Sequence[str]) -> str | None:
    key = f"tokenizer.ggml.{role}_token_id"
    if key not in metadata:
        return None
    if metadata[key] >= len(tokens):
        raise ValueError(f"{key} = {metadata[key]} is not below the {len(tokens)} tokens")
    return tokens[metadata[key]]


def _flag(metadata: Mapping[str, Any], name: str, *, default: bool) -> bool:
    return bool(metadata.get(f"tokenizer.ggml.{name}", default))


def _required(metadata: Mapping[str, Any], name: str) -> Any:
    key = f"tokenizer.ggml.{name}"
    if key not in metadata:
        raise ValueError(f"metadata {key} is missing, so no tokenizer can be built from it")
    return metadata[key]
