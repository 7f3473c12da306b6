"""Architecture of a decoder, read from a Hugging Face `config.json`.

The config class that transformers has for the `model_type` decides what an option means: it fills
in defaults and converts former spellings. An option of that class is either computed by the
decoder, or known not to change the forward pass, or refused by name unless it has the class's
default. An option that the class does not have cannot change what transformers computes, so it is
accepted (see `ignored`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv:2104.09864): its base, and its extension to long texts."""

    theta: float = 10000.0
    kind: str = "default"  # default | linear | llama3 | yarn | longrope
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0  # yarn: number of turns above which a frequency is kept
    beta_slow: float = 1.0  # yarn: number of turns below which a frequency is divided by the factor
    truncate: bool = True  # yarn: whether the range between the two is rounded to whole pairs
    attention_factor: float = 1.0  # factor on cosine and sine
    divisors: tuple[float, ...] = ()  # longrope: divisor of each frequency
    partial: float = 1.0  # fraction of each head's dims that is rotated, counted from its first


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of one decoder. Sizes are named as in the legend of `types`."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    max_positions: int
    norm_eps: float
    tie_embeddings: bool
    rope: Rope
    local_rope: Rope | None = None  # rotary embedding of layers with a window; None is `rope`
    window: int = 0  # positions that a local layer sees, itself included; 0 is all
    local_layers: tuple[bool, ...] = ()  # which layers are local; () is none
    rope_layers: tuple[bool, ...] = ()  # which layers rotate (arXiv:2501.18795); () is all
    activation: str = "silu"  # silu | gelu_tanh
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"  # none | head: of each head | projection: of all heads together
    norms: str = "before"  # before attention and MLP | after: on their outputs | both
    norm_offset: float = 0.0  # added to norm scales (Gemma: 1)
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # factor on the outputs of attention and MLP
    logit_divisor: float = 1.0
    query_scale: float = 0.0  # factor on attention scores; 0 is head_dim ** -0.5
    fused: bool = (
        False  # whether files hold query, key and value in one tensor, and gate and up in another
    )

    @property
    def score_scale(self) -> float:
        """Factor on the attention scores."""
        return self.query_scale or self.head_dim**-0.5

    def flops_per_token(self, length: float | int) -> float:
        """Floating-point operations of one forward and backward pass per token.

        Six for each weight of a matrix product and 12 L N H T / 2 for causal attention over rows of
        `length` T (PaLM, arXiv:2204.02311, appendix B, with the causal half). Recomputed operations
        are not counted, as MFU requires. The output head is counted for every token, although the
        loss skips untrained ones.
        """
        d = self.hidden_size
        n = self.num_heads
        k = self.num_kv_heads
        h = self.head_dim
        layer = 2 * d * n * h + 2 * d * k * h + 3 * d * self.intermediate_size
        weights = self.num_layers * layer + self.vocab_size * d
        return 6.0 * weights + 6.0 * self.num_layers * n * h * length


_READ = {
    "vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "rope_parameters", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "attention_bias", "mlp_bias", "hidden_act",
    "hidden_activation", "query_pre_attn_scalar", "_sliding_window_pattern", "no_rope_layers",
    "no_rope_layer_interval", "embedding_multiplier", "attention_multiplier", "logits_scaling",
    "residual_multiplier", "original_max_position_embeddings",
}  # fmt: skip
"""Options of transformers' config classes that the decoder computes."""

_REPLACED = {"rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern"}
"""Former options, which transformers converts to current ones."""

_WITHOUT_EFFECT = {
    "use_cache", "cache_implementation", "initializer_range", "attention_dropout", "resid_pdrop",
    "embd_pdrop", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "torch_dtype",
}  # fmt: skip
"""Options that do not change the forward pass, in addition to those of every model.

Dropout is among them: training uses none, because the policy that samples uses none.
"""

_REFUSED = {
    "quantization_config": "the weights are quantised; convert them to bfloat16 first",
    "compression_config": "the weights are compressed; convert them to bfloat16 first",
    "auto_map": "the model brings code of its own, which is not run",
}

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}  # fmt: skip

_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "gemma3_text": {"qk_norm": "head", "norms": "both", "norm_offset": 1.0},
    "smollm3": {},
    "olmo2": {"qk_norm": "projection", "norms": "after"},
    "olmo3": {"qk_norm": "projection", "norms": "after"},
    "granite": {},
    "phi3": {"fused": True},
}
"""Properties of an architecture that its `config.json` does not state, by `model_type`."""

_ALL_LOCAL = ("mistral", "phi3")
"""Families in which every layer has the window."""


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Returns the architecture that the content of a `config.json` describes.

    Raises:
        ValueError: if the architecture or an option is not supported, or transformers refuses it;
            the message names it.
    """
    family = check_family(hf)
    options = _complete(hf, family)
    _refuse_uncomputed(options, family)
    return _read(options, family)


def check_family(hf: dict[str, Any]) -> str:
    """Returns the `model_type` of a `config.json`, without transformers, which loads slowly.

    Raises:
        ValueError: if the family is not supported, or an option is one that no family supports.
    """
    family = str(hf.get("model_type"))
    if family not in _FAMILIES:
        raise ValueError(
            f"model_type {family!r} is not supported; supported are {', '.join(_FAMILIES)}"
        )
    for name, reason in _REFUSED.items():
        if hf.get(name) is not None:
            raise ValueError(f"config.json has {name}: {reason}")
    return family


def ignored(hf: dict[str, Any]) -> list[str]:
    """Returns the options of a `config.json` that the family's config class does not have."""
    known = _defaults(hf["model_type"]).keys() | _REPLACED | _WITHOUT_EFFECT | _REFUSED.keys()
    return sorted(hf.keys() - known)


def _complete(hf: dict[str, Any], family: str) -> dict[str, Any]:
    """Returns the options as transformers' config class reads them, with its defaults.

    Raises:
        ValueError: if the class refuses them.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    # The stated dtype may differ from the stored one, or name no dtype at all; it is not used.
    told = {name: value for name, value in hf.items() if name not in ("dtype", "torch_dtype")}
    try:
        return transformers.CONFIG_MAPPING[family].from_dict(copy.deepcopy(told)).to_dict()
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers refuses config.json: {reason}") from None


def _defaults(family: str) -> dict[str, Any]:
    import transformers

    return transformers.CONFIG_MAPPING[family]().to_dict()


def _refuse_uncomputed(options: dict[str, Any], family: str) -> None:
    """Refuses options of the config class that the decoder does not compute."""
    import transformers

    harmless = _READ | _WITHOUT_EFFECT | transformers.PreTrainedConfig().to_dict().keys()
    for name, default in _defaults(family).items():
        if name not in harmless and options[name] != default:
            raise ValueError(
                f"config.json option {name}={options[name]!r} is not supported; only {default!r} is"
            )


def _read(hf: dict[str, Any], family: str) -> ModelConfig:
    heads = hf["num_attention_heads"]
    width = hf["hidden_size"]
    options = {name: hf[name] for name in _defaults(family)}
    activation = options.get("hidden_activation", options.get("hidden_act"))
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation {activation!r} is not supported; use one of {', '.join(_ACTIVATIONS)}"
        )
    window, local_layers = _local(options, family)
    rotated = tuple(map(bool, options.get("no_rope_layers", ())))[: hf["num_hidden_layers"]]
    bias = bool(options.get("attention_bias"))
    mlp_bias = bool(options.get("mlp_bias"))
    biases: dict[str, Any] = {"qkv_bias": bias, "output_bias": bias, "mlp_bias": mlp_bias}
    by_layer = "sliding_attention" in hf["rope_parameters"]
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=width,
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf["num_key_value_heads"] or heads,
        # Some config classes read it without defining it.
        head_dim=hf.get("head_dim") or width // heads,
        max_positions=_max_positions(hf),
        norm_eps=hf["rms_norm_eps"],
        tie_embeddings=bool(hf["tie_word_embeddings"]),
        rope=_rope(hf, family, "full_attention"),
        local_rope=_rope(hf, family, "sliding_attention") if by_layer else None,
        window=window,
        local_layers=local_layers,
        rope_layers=() if all(rotated) else rotated,
        activation=_ACTIVATIONS[activation],
        **(biases | _scales(options) | _FAMILIES[family]),
    )


def _scales(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the constant factors of Gemma and of Granite."""
    if "query_pre_attn_scalar" in options:
        return {
            "embed_scale": float(options["hidden_size"]) ** 0.5,
            "query_scale": float(options["query_pre_attn_scalar"]) ** -0.5,
        }
    if "residual_multiplier" in options:
        return {
            "embed_scale": float(options["embedding_multiplier"]),
            "query_scale": float(options["attention_multiplier"]),
            "residual_scale": float(options["residual_multiplier"]),
            "logit_divisor": float(options["logits_scaling"]),
        }
    return {}


def _local(options: dict[str, Any], family: str) -> tuple[int, tuple[bool, ...]]:
    """Returns the window, and for each layer whether it has it."""
    layers = options["num_hidden_layers"]
    window = options.get("sliding_window") or 0
    if family in _ALL_LOCAL:  # transformers reads no layer_types here
        return (window, (True,) * layers) if window else (0, ())
    kinds = {"sliding_attention": True, "full_attention": False}
    named = options.get("layer_types") or ["full_attention"] * layers
    unknown = set(named) - set(kinds)
    if unknown:
        raise ValueError(f"config.json option layer_types has {sorted(unknown)}, not supported")
    local = tuple(kinds[t] for t in named)
    if any(local) and not window:
        raise ValueError("config.json has layers with sliding_attention, but no sliding_window")
    return (window, local) if any(local) else (0, ())


def _max_positions(hf: dict[str, Any]) -> int:
    """Returns the number of positions that the rotary embedding of short texts covers.

    In longer texts longrope uses other frequencies for all positions, and transformers and vLLM
    choose between the two sets by different rules.
    """
    most = hf["max_position_embeddings"]
    options = hf["rope_parameters"]
    original = options.get("original_max_position_embeddings")
    return min(most, original) if options.get("rope_type") == "longrope" else most


def _rope(hf: dict[str, Any], family: str, layer_type: str) -> Rope:
    """Reads the `rope_parameters` of transformers 5, for one kind of layer if they differ."""
    options = hf["rope_parameters"]
    options = options.get(layer_type, options)
    kind = options["rope_type"]
    theta = float(options["rope_theta"])
    if kind not in _ROPES:
        raise ValueError(
            f"config.json option rope type {kind!r} is not supported; "
            f"supported are {', '.join(_ROPES)}"
        )
    partial = float(options.get("partial_rotary_factor") or 1.0)
    if partial != 1.0 and family != "phi3":
        raise ValueError("config.json option partial_rotary_factor is not supported")
    fields = _ROPES[kind](options, hf["max_position_embeddings"])
    return Rope(theta=theta, partial=partial, **fields)


def _linear(options: dict[str, Any], max_positions: int) -> dict[str, Any]:
    del max_positions
    return {"kind": "linear", "factor": float(options["factor"])}


def _llama3(options: dict[str, Any], max_positions: int) -> dict[str, Any]:
    del max_positions
    return {
        "kind": "llama3",
        "factor": float(options["factor"]),
        "low_freq_factor": float(options["low_freq_factor"]),
        "high_freq_factor": float(options["high_freq_factor"]),
        "original_max_positions": int(options["original_max_position_embeddings"]),
    }


def _yarn(options: dict[str, Any], max_positions: int) -> dict[str, Any]:
    """Reads the options of YaRN (arXiv:2309.00071, sections 3.2 to 3.4)."""
    original = int(options["original_max_position_embeddings"])
    factor = float(options["factor"] or max_positions / original)

    def length_factor(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    attention = options.get("attention_factor")
    if attention is None:
        weight = options.get("mscale")
        weight_all = options.get("mscale_all_dim")
        if weight and weight_all:
            attention = length_factor(weight) / length_factor(weight_all)
        else:
            attention = length_factor(1.0)
    return {
        "kind": "yarn",
        "factor": factor,
        "original_max_positions": original,
        "beta_fast": float(options.get("beta_fast") or 32.0),
        "beta_slow": float(options.get("beta_slow") or 1.0),
        "truncate": bool(options.get("truncate", True)),
        "attention_factor": float(attention),
    }


def _longrope(options: dict[str, Any], max_positions: int) -> dict[str, Any]:
    """Reads the options of LongRoPE (arXiv:2402.13753) for texts of the original length."""
    original = int(options["original_max_position_embeddings"])
    factor = float(options.get("factor") or max_positions / original)
    attention = options.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
    return {
        "kind": "longrope",
        "divisors": tuple(map(float, options["short_factor"])),
        "attention_factor": float(attention),
    }


def _default(options: dict[str, Any], max_positions: int) -> dict[str, Any]:
    del options, max_positions
    return {}


_ROPES: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,  # it differs only in texts longer than the model's positions
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""Reader of each kind of rotary embedding: fields of `Rope` besides the base."""
