"""A small Llama in NumPy, float32, with keys and values kept: what `stand_in` computes with."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (by which NumPy knows bfloat16)
import numpy as np
import safetensors.numpy


class Layer(NamedTuple):
    """Keys and values of one layer, [tokens, kv heads, head dim]."""

    keys: np.ndarray
    values: np.ndarray


class Adapter:
    """The LoRA adapter of a directory in PEFT's layout."""

    def __init__(self, directory: str) -> None:
        path = pathlib.Path(directory)
        config = json.loads((path / "adapter_config.json").read_text())
        self.rank = config["r"]
        divisor = np.sqrt(self.rank) if config["use_rslora"] else self.rank
        self.scale = np.float32(config["lora_alpha"] / divisor)
        found = safetensors.numpy.load_file(path / "adapter_model.safetensors")
        self.weights = {
            name.removeprefix("base_model.model."): tensor.astype(np.float32)
            for name, tensor in found.items()
        }

    def added(self, x: np.ndarray, name: str) -> np.ndarray | float:
        """Returns what is added to the product of `x` with a matrix."""
        if f"{name}.lora_A.weight" not in self.weights:
            return 0.0
        a, b = (self.weights[f"{name}.lora_{part}.weight"] for part in "AB")
        return self.scale * (x @ a.T) @ b.T


class Llama:
    """The model of a directory in HF layout."""

    def __init__(self, directory: str) -> None:
        path = pathlib.Path(directory)
        self.config = json.loads((path / "config.json").read_text())
        assert self.config["model_type"] == "llama"
        self.weights = {
            name: tensor.astype(np.float32)
            for file in sorted(path.glob("*.safetensors"))
            for name, tensor in safetensors.numpy.load_file(file).items()
        }
        self.heads = self.config["num_attention_heads"]
        self.kv_heads = self.config["num_key_value_heads"]
        size = self.config["hidden_size"]
        self.head_dim = self.config.get("head_dim") or size // self.heads
        theta = (self.config.get("rope_parameters") or self.config).get("rope_theta", 10000.0)
        self._frequencies = theta ** -(np.arange(0, self.head_dim, 2) / self.head_dim)

    def empty(self) -> list[Layer]:
        """Returns the keys and values of no tokens."""
        none = np.zeros((0, self.kv_heads, self.head_dim), np.float32)
        return [Layer(none, none)] * self.config["num_hidden_layers"]

    def extend(
        self, cache: list[Layer], tokens: list[int], adapter: Adapter | None = None
    ) -> tuple[np.ndarray, list[Layer]]:
        """Returns the logits behind the last token, and the cache with all tokens."""
        linear = functools.partial(self._linear, adapter)
        old = len(cache[0].keys)
        x = self.weights["model.embed_tokens.weight"][tokens]
        angles = np.arange(old, old + len(tokens))[:, None] * self._frequencies
        cos, sin = (np.tile(f(angles), 2)[:, None].astype(np.float32) for f in (np.cos, np.sin))
        visible = np.arange(old + len(tokens)) <= np.arange(old, old + len(tokens))[:, None]
        after = []
        for number, layer in enumerate(cache):
            name = f"model.layers.{number}."
            hidden = self._norm(x, f"{name}input_layernorm")
            query, key, value = (
                linear(hidden, f"{name}self_attn.{kind}_proj").reshape(
                    len(tokens), -1, self.head_dim
                )
                for kind in "qkv"
            )
            query, key = _turn(query, cos, sin), _turn(key, cos, sin)
            layer = Layer(np.concatenate([layer[0], key]), np.concatenate([layer[1], value]))
            after.append(layer)
            shared = self.heads // self.kv_heads
            keys, values = (np.repeat(part, shared, axis=1) for part in layer)
            scores = np.einsum("tnh,snh->nts", query, keys) / np.sqrt(self.head_dim)
            scores = np.where(visible, scores, -np.inf)
            mixed = np.einsum("nts,snh->tnh", _softmax(scores), values).reshape(len(tokens), -1)
            x = x + linear(mixed, f"{name}self_attn.o_proj")
            hidden = self._norm(x, f"{name}post_attention_layernorm")
            gate = linear(hidden, f"{name}mlp.gate_proj")
            up = linear(hidden, f"{name}mlp.up_proj")
            x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{name}mlp.down_proj")
        last = self._norm(x[-1:], "model.norm")
        tied = "lm_head.weight" not in self.weights
        return (last @ self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T)[
            0
        ], after

    def _linear(self, adapter: Adapter | None, x: np.ndarray, name: str) -> np.ndarray:
        product = x @ self.weights[f"{name}.weight"].T
        return product + adapter.added(x, name) if adapter else product

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / scale * self.weights[f"{name}.weight"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns log-probabilities."""
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _turn(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotary position embedding."""
    first, second = np.split(x, 2, axis=-1)
    return x * cos + np.concatenate([-second, first], axis=-1) * sin
