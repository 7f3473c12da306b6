"""What a decoder is made of, read from a Hugging Face `config.json`.

Each option of a `config.json` is one of four things: read here, fixed to the one value that the
decoder computes, known not to change the forward pass, or refused by name.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv:2104.09864): the base, and how it was stretched."""

    theta: float = 10000.0
    kind: str = "default"  # default | linear | llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


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
    local_rope: Rope | None = None  # of layers with a window; None is `rope`
    window: int = 0  # positions that a local layer sees, itself included; 0 is all
    local_layers: tuple[bool, ...] = ()  # which layers are local; () is none
    activation: str = "silu"  # silu | gelu_tanh
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False  # norms on what attention and MLP return, too (Gemma)
    norm_offset: float = 0.0  # added to norm scales (Gemma: 1)
    embed_scale: float = 1.0
    query_scale: float = 0.0  # of attention scores; 0 is head_dim ** -0.5

    @property
    def score_scale(self) -> float:
        """Factor of the attention scores."""
        return self.query_scale or self.head_dim**-0.5

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one forward and backward pass per token.

        Six for each weight of a matrix product and 12 L N H T / 2 for causal attention over rows of
        `length` T (PaLM, arXiv:2204.02311, appendix B, with the causal half). Recomputation is not
        counted, so that the quotient is MFU; the head is, for tokens that are not trained too.
        """
        d, n, k, h = self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim
        layer = 2 * d * n * h + 2 * d * k * h + 3 * d * self.intermediate_size
        weights = self.num_layers * layer + self.vocab_size * d
        return 6.0 * weights + 6.0 * self.num_layers * n * h * length


_READ = {
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "head_dim",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
    "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "attention_bias",
    "mlp_bias", "hidden_act", "hidden_activation", "query_pre_attn_scalar",
    "rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern",
}  # fmt: skip

_WITHOUT_EFFECT = {
    "_name_or_path", "transformers_version", "transformers.js_config", "torch_dtype", "dtype",
    "use_cache", "cache_implementation", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id", "is_llama_config", "attention_dropout", "unsloth_version", "unsloth_fixed",
    "id2label", "label2id", "return_dict", "chunk_size_feed_forward", "problem_type",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
}  # fmt: skip

_FIXED = {
    "pretraining_tp": (1, None), "quantization_config": (None,), "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,), "partial_rotary_factor": (1.0, None),
    "num_local_experts": (None,), "num_experts": (None,), "rope_interleaved": (False, None),
    "use_bidirectional_attention": (False, None), "is_encoder_decoder": (False, None),
}  # fmt: skip

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma3_text": {"qk_norm": True, "post_norms": True, "norm_offset": 1.0},
}
"""What `config.json` leaves unsaid, by `model_type`."""


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Returns the architecture that the content of a `config.json` describes.

    Raises:
        ValueError: names the architecture or option that is not supported, or the key that lacks.
    """
    family = hf.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(
            f"model_type {family!r} is not supported; supported are {', '.join(_FAMILIES)}"
        )
    _refuse_unknown(hf)
    try:
        return _read(hf, family)
    except KeyError as error:
        raise ValueError(f"config.json lacks {error.args[0]!r}") from None


def _refuse_unknown(hf: dict[str, Any]) -> None:
    for name, value in hf.items():
        if name in _FIXED:
            if value not in _FIXED[name]:
                raise ValueError(
                    f"config.json option {name}={value!r} is not supported; only "
                    f"{_FIXED[name][0]!r} is"
                )
        elif name not in _READ and name not in _WITHOUT_EFFECT and value:
            raise ValueError(f"config.json option {name}={value!r} is not known to this decoder")


def _read(hf: dict[str, Any], family: str) -> ModelConfig:
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    gemma = family == "gemma3_text"
    activation = hf.get("hidden_activation" if gemma else "hidden_act") or "gelu_pytorch_tanh"
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation {activation!r} is not supported; use one of {', '.join(_ACTIVATIONS)}"
        )
    window, local_layers = _local(hf, family)
    if family == "qwen2" and hf.get("attention_bias") is False:
        raise ValueError("config.json option attention_bias=False is not supported for qwen2")
    bias = bool(hf.get("attention_bias", False))
    fields: dict[str, Any] = {
        "qkv_bias": bias, "output_bias": bias and family != "qwen2",
        "mlp_bias": bool(hf.get("mlp_bias", False)),
    }  # fmt: skip
    if gemma:
        fields["embed_scale"] = float(width) ** 0.5
        fields["query_scale"] = float(hf["query_pre_attn_scalar"]) ** -0.5
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=width,
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or width // heads,
        max_positions=hf["max_position_embeddings"],
        norm_eps=hf["rms_norm_eps"],
        tie_embeddings=bool(hf.get("tie_word_embeddings", gemma)),
        rope=_rope(hf, "full_attention"),
        local_rope=_rope(hf, "sliding_attention") if gemma else None,
        window=window,
        local_layers=local_layers,
        activation=_ACTIVATIONS[activation],
        **(fields | _FAMILIES[family]),
    )


def _local(hf: dict[str, Any], family: str) -> tuple[int, tuple[bool, ...]]:
    """Returns the window, and which layers have it."""
    layers, window = hf["num_hidden_layers"], hf.get("sliding_window") or 0
    if hf.get("layer_types"):
        kinds = {"sliding_attention": True, "full_attention": False}
        unknown = set(hf["layer_types"]) - set(kinds)
        if unknown:
            raise ValueError(f"config.json option layer_types has {sorted(unknown)}, not supported")
        local = tuple(kinds[t] for t in hf["layer_types"])
    elif family == "gemma3_text":
        period = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
        local = tuple((i + 1) % period != 0 for i in range(layers))
    elif family in ("qwen2", "qwen3"):
        first = hf.get("max_window_layers", layers) if hf.get("use_sliding_window") else layers
        local = tuple(i >= first for i in range(layers))
    else:
        local = (bool(window) and family == "mistral",) * layers
    if len(local) != layers:
        raise ValueError(f"config.json has {len(local)} layer_types for {layers} layers")
    if any(local) and not window:
        raise ValueError("config.json has layers with sliding_attention, but no sliding_window")
    return (window, local) if any(local) else (0, ())


def _rope(hf: dict[str, Any], layer_type: str) -> Rope:
    """Reads `rope_theta` with `rope_scaling`, or the `rope_parameters` of transformers 5."""
    options = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    options = options.get(layer_type, options)
    theta = options.get("rope_theta") or hf.get("rope_theta", 10000.0)
    if layer_type == "sliding_attention" and "rope_parameters" not in hf:
        return Rope(theta=float(hf.get("rope_local_base_freq", 10000.0)))
    kind = options.get("rope_type") or options.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(
            f"config.json option rope type {kind!r} is not supported; "
            "supported are default, linear, llama3"
        )
    if options.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json option partial_rotary_factor is not supported")
    if kind == "default":
        return Rope(theta=float(theta))
    if kind == "linear":
        return Rope(theta=float(theta), kind=kind, factor=float(options["factor"]))
    return Rope(
        theta=float(theta),
        kind=kind,
        factor=float(options["factor"]),
        low_freq_factor=float(options["low_freq_factor"]),
        high_freq_factor=float(options["high_freq_factor"]),
        original_max_positions=int(options["original_max_position_embeddings"]),
    )
