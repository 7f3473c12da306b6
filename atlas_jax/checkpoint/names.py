"""Table of Hugging Face tensors and the parameters they hold, used in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from atlas_jax.models.config import ModelConfig
from atlas_jax.types import Array, Params

if TYPE_CHECKING:
    from atlas_jax.models.lora import Lora

LAYER = "model.layers.{}."


class TensorKind(NamedTuple):
    """One kind of tensor.

    A `linear` tensor is `[out, in]` at Hugging Face and `[*in, *out]` here; others have the same
    order of numbers in both. A tensor may hold several parameters, stacked on its first dim.

    Example:
        # o_proj.weight [D, N*H] <-> attention/o/kernel [N, H, D], whose first two dims are inputs
        path = ("layers", "attention", "o", "kernel")
        TensorKind("self_attn.o_proj.weight", (path,), "linear", 2)
    """

    name: str  # after the prefix `model.layers.{i}.` if the paths begin with "layers"
    paths: tuple[tuple[str, ...], ...]
    kind: Literal["linear", "same"] = "same"
    inputs: int = 1  # number of leading dims of a parameter that are inputs

    @property
    def per_layer(self) -> bool:
        """True for a tensor that each layer has; false for one of the whole model."""
        return self.paths[0][0] == "layers"


def entries(config: ModelConfig) -> list[TensorKind]:
    """Returns the kinds of tensors that a model of this architecture consists of."""
    table = [
        TensorKind("model.embed_tokens.weight", (("embed",),)),
        TensorKind("model.norm.weight", (("norm",),)),
    ]
    if not config.tie_embeddings:
        table.append(TensorKind("lm_head.weight", (("head",),)))
    bias = config.qkv_bias
    mlp_bias = config.mlp_bias
    if config.fused:
        table += _linear("self_attn.qkv_proj", "attention", ("q", "k", "v"), bias)
        table += _linear("mlp.gate_up_proj", "mlp", ("gate", "up"), mlp_bias)
    else:
        for ours in ("q", "k", "v"):
            table += _linear(f"self_attn.{ours}_proj", "attention", (ours,), bias)
        for ours in ("gate", "up"):
            table += _linear(f"mlp.{ours}_proj", "mlp", (ours,), mlp_bias)
    table += _linear("self_attn.o_proj", "attention", ("o",), config.output_bias, inputs=2)
    table += _linear("mlp.down_proj", "mlp", ("down",), mlp_bias)
    if config.qk_norm != "none":
        for ours in ("q_norm", "k_norm"):
            path = ("layers", "attention", ours, "scale")
            table.append(TensorKind(f"self_attn.{ours}.weight", (path,)))
    return table + [
        TensorKind(f"{name}.weight", (("layers", norm, "scale"),))
        for name, norm in _NORMS[config.norms].items()
    ]


_NORMS = {
    "before": {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    "after": {
        "post_attention_layernorm": "attention_post_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
    "both": {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_post_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
}
"""Hugging Face names of a layer's norms and ours, by placement.

Llama's `post_attention_layernorm` is the norm before the MLP. In the other placements a norm of
that name does follow the attention."""


def _linear(
    name: str, part: str, ours: tuple[str, ...], bias: bool, inputs: int = 1
) -> list[TensorKind]:
    kernels, biases = (
        tuple(("layers", part, each, leaf) for each in ours) for leaf in ("kernel", "bias")
    )
    weights = [TensorKind(name=f"{name}.weight", paths=kernels, kind="linear", inputs=inputs)]
    return [*weights, TensorKind(f"{name}.bias", biases)] if bias else weights


def leaf(tree: Params, path: tuple[str, ...]) -> Any:
    """Returns the leaf of a tree at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def stored(params: Params, path: tuple[str, ...]) -> Any:
    """Returns the parameter at `path`, or with LoRA its matrix and its factors."""
    parent = leaf(params, path[:-1])
    if path[-1] == "kernel" and "lora_a" in parent:
        return {name: parent[name] for name in ("kernel", "lora_a", "lora_b")}
    return parent[path[-1]]


def value(part: Any, lora: Lora | None, dtype: Any) -> Array:
    """Returns the parameter of one layer, or of the model, from its part of `stored`."""
    if not isinstance(part, dict):
        return part.astype(dtype)
    from atlas_jax.models import lora as factors  # most models have none

    assert lora is not None, "a model with factors says so"
    return factors.merged_kernel(part, lora, dtype)


def hf_names(entry: TensorKind, config: ModelConfig) -> list[str]:
    """Returns the Hugging Face names of the tensors of one kind, by layer."""
    if not entry.per_layer:
        return [entry.name]
    return [LAYER.format(i) + entry.name for i in range(config.num_layers)]


def hf_shape(entry: TensorKind, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the Hugging Face shape of a parameter of `shape`, both without the layer dim."""
    if entry.kind == "same":
        return (int(np.prod(shape)),) if entry.per_layer else shape
    split = entry.inputs
    return int(np.prod(shape[split:])), int(np.prod(shape[:split]))


def shapes_of(entry: TensorKind, shapes: Params) -> list[tuple[int, ...]]:
    """Returns the shapes of the parameters in a tensor, without the layer dim."""
    return [leaf(shapes, path).shape[1 if entry.per_layer else 0 :] for path in entry.paths]


def hf_shapes(config: ModelConfig, shapes: Params) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every Hugging Face tensor of a model, by name."""
    result: dict[str, tuple[int, ...]] = {}
    for entry in entries(config):
        parts = [hf_shape(entry, shape) for shape in shapes_of(entry, shapes)]
        whole = sum(part[0] for part in parts), *parts[0][1:]
        result |= dict.fromkeys(hf_names(entry, config), whole)
    return result


def from_hf(
    entry: TensorKind, tensor: np.ndarray, shapes: Sequence[tuple[int, ...]]
) -> list[np.ndarray]:
    """Returns the parameters that a Hugging Face tensor holds, as views if possible."""
    ends = np.cumsum([hf_shape(entry, shape)[0] for shape in shapes])[:-1]
    parts = np.split(tensor, ends) if len(shapes) > 1 else [tensor]
    return [
        (part.T if entry.kind == "linear" else part).reshape(shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]


def to_hf(entry: TensorKind, values: Sequence[Array]) -> Array:
    """Returns the Hugging Face tensor of one layer's parameters."""
    parts = []
    for value in values:
        shape = hf_shape(entry, value.shape)
        linear = entry.kind == "linear"
        parts.append(value.reshape(shape[::-1]).T if linear else value.reshape(shape))
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]
