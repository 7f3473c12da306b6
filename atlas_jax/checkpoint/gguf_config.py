"""Translation of a GGUF file's metadata into a Hugging Face config.

Every option of the architecture is either translated here or refused by name.

References:
    Metadata keys: ggml, docs/gguf.md. Their origin: llama.cpp, convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Metadata = Mapping[str, Any]

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}

_UNDERSTOOD = {
    *_SIZES.values(),
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "vocab_size", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}  # fmt: skip

_UNDERSTOOD_IF = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}

_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def model_config(metadata: Metadata, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """Returns the Hugging Face config, except for the options that only tensors tell.

    Keys that the format lets a file omit take the format's defaults: as many key/value heads as
    query heads, a head dim of model dim over heads, and a rotary base of 10000.

    Args:
        metadata: all metadata of the file, by name.
        rope_factors: the tensor `rope_freqs.weight`, `[head_dim / 2]`, if the file has one.

    Raises:
        ValueError: if the architecture or an option is unsupported, or a key is missing or of the
            wrong type; the message names it.
    """
    arch = _architecture(metadata)
    config: dict[str, Any] = {"architectures": [_CLASSES[arch]], "model_type": arch}
    config |= {name: required(metadata, f"{arch}.{key}", int) for name, key in _SIZES.items()}
    heads = config["num_attention_heads"]
    epsilon = required(metadata, f"{arch}.attention.layer_norm_rms_epsilon", float)
    theta = _optional(metadata, f"{arch}.rope.freq_base", 10000.0)
    config |= {
        "hidden_act": "silu",
        "num_key_value_heads": _optional(metadata, f"{arch}.attention.head_count_kv", heads),
        "head_dim": _head_dim(metadata, arch, config["hidden_size"] // heads),
        "rms_norm_eps": _shortest(epsilon),
        "rope_theta": _shortest(theta),
    }
    if arch != "llama":
        config["use_sliding_window"] = False
    return config | {"rope_scaling": _rope_scaling(metadata, config, rope_factors)}


def generation_config(metadata: Metadata, vocab_size: int) -> dict[str, Any]:
    """Returns the ids that begin, end and pad a generation, as far as the file states them.

    `eos_token_id` is a list if the file has an end of turn or of message besides the end of text.

    Raises:
        ValueError: if an id is not below `vocab_size`.
    """
    ids = {}
    for role in ("bos", "eos", "eot", "eom", "padding"):
        key = f"tokenizer.ggml.{role}_token_id"
        if key not in metadata:
            continue
        ids[role] = required(metadata, key, int)
        if ids[role] >= vocab_size:
            raise ValueError(
                f"{key} = {ids[role]} is not below the vocabulary size {vocab_size}; the file is "
                "damaged"
            )
    ends = list(dict.fromkeys(ids[role] for role in ("eos", "eot", "eom") if role in ids))
    config: dict[str, Any] = {"bos_token_id": ids["bos"]} if "bos" in ids else {}
    if ends:
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if "padding" in ids:
        config["pad_token_id"] = ids["padding"]
    return config


def required(metadata: Metadata, key: str, kind: type) -> Any:
    """Returns one value of the metadata.

    Raises:
        ValueError: if the key is missing or not a single value of the type `kind`.
    """
    if key not in metadata:
        raise ValueError(f"metadata {key} is missing; convert the model again with llama.cpp")
    value = metadata[key]
    if type(value) is not kind:
        raise ValueError(
            f"metadata {key} = {value!r} is not supported; it must be a single {kind.__name__}"
        )
    return value


def _optional(metadata: Metadata, key: str, default: Any) -> Any:
    return required(metadata, key, type(default)) if key in metadata else default


def _architecture(metadata: Metadata) -> str:
    if (kind := _optional(metadata, "general.type", "model")) != "model":
        raise ValueError(f"general.type is {kind!r}; only the file of a whole 'model' can be read")
    if (parts := _optional(metadata, "split.count", 1)) > 1:
        raise ValueError(
            f"this is one of {parts} parts; join them with llama-gguf-split --merge and give the "
            "result"
        )
    arch = required(metadata, "general.architecture", str)
    if arch not in _CLASSES:
        raise ValueError(
            f"architecture {arch!r} is not supported; supported are {', '.join(_CLASSES)}"
        )
    for key, value in metadata.items():
        option = key.removeprefix(f"{arch}.")
        if option == key or option in _UNDERSTOOD:
            continue
        if option not in _UNDERSTOOD_IF or value != _UNDERSTOOD_IF[option]:
            raise ValueError(f"option {key} = {value!r} is not supported; use another model")
    return arch


def _head_dim(metadata: Metadata, arch: str, default: int) -> int:
    head_dim = _optional(metadata, f"{arch}.attention.key_length", default)
    for option in ("attention.value_length", "rope.dimension_count"):
        if (other := _optional(metadata, f"{arch}.{option}", head_dim)) != head_dim:
            raise ValueError(
                f"{arch}.{option} = {other} differs from the head dim {head_dim}, which is not "
                "supported; use another model"
            )
    return head_dim


def _shortest(value: float) -> float:
    """Returns the shortest decimal of the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value))) if np.float32(value) == value else value


def _rope_scaling(
    metadata: Metadata, config: Mapping[str, Any], factors: np.ndarray | None
) -> dict[str, Any] | None:
    prefix = f"{config['model_type']}.rope.scaling."
    kind = _optional(metadata, prefix + "type", "none")
    if factors is not None:
        if kind != "none":
            raise ValueError(
                f"{prefix}type = {kind!r} and the tensor rope_freqs.weight contradict each other; "
                "convert the model again"
            )
        return _llama3_scaling(factors, config)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{prefix}type = {kind!r} is not supported; supported are linear, yarn")
    scaling = {"rope_type": kind, "factor": required(metadata, prefix + "factor", float)}
    if kind == "yarn":
        key = prefix + "original_context_length"
        scaling["original_max_position_embeddings"] = required(metadata, key, int)
    return scaling


def _llama3_scaling(factors: np.ndarray, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the parameters of Llama 3 scaling that give these factors.

    The factors depend only on the ratios of the parameters in `_LLAMA3_ROPE`, so the parameters
    cannot be computed from them. The published ones are taken if they give exactly these factors.
    """
    if np.all(factors == 1):
        return None
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3_ROPE}
    expected = _llama3_factors(scaling, config["rope_theta"], config["head_dim"])
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4, atol=0):
        raise ValueError(
            "the tensor rope_freqs.weight is not Llama 3 scaling by any factor with "
            f"{_LLAMA3_ROPE}, and other parameters cannot be recovered from it; use the "
            "safetensors files of the model"
        )
    return scaling


def _llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """Returns the divisors of Llama 3 for the rotary frequencies, `[head_dim / 2]`.

    Reference: transformers, modeling_rope_utils.py, `_compute_llama3_parameters`.
    """
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)
