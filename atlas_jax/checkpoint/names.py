"""The one table between Hugging Face tensors and parameters, read in both directions."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from atlas_jax.models.config import ModelConfig
from atlas_jax.types import Array, Params

LAYER = "model.layers.{}."


class Entry(NamedTuple):
    """One kind of tensor.

    A `linear` tensor is `[out, in]` at Hugging Face and `[*in, *out]` here; others have the same
    order of numbers in both.

    Example:
        # o_proj.weight [D, N*H] <-> attention/o/kernel [N, H, D], whose first two dims are inputs
        Entry("self_attn.o_proj.weight", ("layers", "attention", "o", "kernel"), "linear", 2)
    """

    name: str  # behind `model.layers.{i}.` where the path begins with "layers"
    path: tuple[str, ...]
    kind: Literal["linear", "same"] = "same"
    inputs: int = 1  # leading dims of the parameter that are inputs

    @property
    def per_layer(self) -> bool:
        """Whether there is one such tensor in each layer."""
        return self.path[0] == "layers"


def entries(config: ModelConfig) -> list[Entry]:
    """Returns the kinds of tensors that a model of this architecture consists of."""
    found = [Entry("model.embed_tokens.weight", ("embed",)), Entry("model.norm.weight", ("norm",))]
    if not config.tie_embeddings:
        found.append(Entry("lm_head.weight", ("head",)))
    attention, mlp = ("layers", "attention"), ("layers", "mlp")
    for ours, inputs, bias in (
        ("q", 1, config.qkv_bias), ("k", 1, config.qkv_bias), ("v", 1, config.qkv_bias),
        ("o", 2, config.output_bias),
    ):  # fmt: skip
        found += _linear(f"self_attn.{ours}_proj", (*attention, ours), inputs, bias)
    for ours in ("gate", "up", "down"):
        found += _linear(f"mlp.{ours}_proj", (*mlp, ours), 1, config.mlp_bias)
    if config.qk_norm:
        found.append(Entry("self_attn.q_norm.weight", (*attention, "q_norm", "scale")))
        found.append(Entry("self_attn.k_norm.weight", (*attention, "k_norm", "scale")))
    return found + [
        Entry(f"{name}.weight", ("layers", norm, "scale")) for name, norm in _norms(config)
    ]


def _norms(config: ModelConfig) -> list[tuple[str, str]]:
    """Llama calls the norm before the MLP `post_attention`; Gemma has one that really is."""
    if not config.post_norms:
        return [("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm")]
    return [
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "attention_post_norm"),
        ("pre_feedforward_layernorm", "mlp_norm"),
        ("post_feedforward_layernorm", "mlp_post_norm"),
    ]


def _linear(name: str, path: tuple[str, ...], inputs: int, bias: bool) -> list[Entry]:
    found = [Entry(f"{name}.weight", (*path, "kernel"), "linear", inputs)]
    return [*found, Entry(f"{name}.bias", (*path, "bias"))] if bias else found


def leaf(tree: Params, path: tuple[str, ...]) -> Any:
    """Returns what stands at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def hf_names(entry: Entry, config: ModelConfig) -> list[str]:
    """Returns the Hugging Face names of the tensors of one kind, by layer."""
    if not entry.per_layer:
        return [entry.name]
    return [LAYER.format(i) + entry.name for i in range(config.num_layers)]


def hf_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the Hugging Face shape of a parameter of `shape`, the layer dim left out."""
    if entry.kind == "same":
        return shape if len(entry.path) == 1 else (int(np.prod(shape)),)
    split = entry.inputs
    return int(np.prod(shape[split:])), int(np.prod(shape[:split]))


def hf_shapes(config: ModelConfig, shapes: Params) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every Hugging Face tensor of a model."""
    result: dict[str, tuple[int, ...]] = {}
    for entry in entries(config):
        shape = leaf(shapes, entry.path).shape[1 if entry.per_layer else 0 :]
        result |= dict.fromkeys(hf_names(entry, config), hf_shape(entry, shape))
    return result


def from_hf(entry: Entry, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a Hugging Face tensor in the layout of the parameter, as a view where it can be."""
    return (tensor.T if entry.kind == "linear" else tensor).reshape(shape)


def to_hf(entry: Entry, value: Array) -> Array:
    """Returns one layer of a parameter in Hugging Face layout."""
    shape = hf_shape(entry, value.shape)
    return value.reshape(shape) if entry.kind == "same" else value.reshape(shape[::-1]).T
