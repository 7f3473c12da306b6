"""Number of devices over which a vLLM server splits its model, by the sizes of model and device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from atlas_jax.checkpoint import hf
from atlas_jax.models.config import from_hf

_BYTES = 2
"""Bytes of a parameter in a server's bfloat16."""

_MOST = 0.45
"""Largest share of a device's memory for weights. vLLM takes 0.9 of it, and the other half of that
holds keys and values, without which a server computes few requests at one time."""


class ModelSize(NamedTuple):
    """Sizes of a model on which its division over devices depends."""

    num_params: int
    num_heads: int
    num_kv_heads: int


def model_size(model: str) -> ModelSize:
    """Returns the sizes of a directory or hub id.

    Raises:
        ValueError: if it is no model, or one that is not supported.
    """
    source = hf.open_source(hf.resolve(model))
    config = from_hf(source.config)
    shapes = hf.stored_shapes(source, config.tie_embeddings)
    return ModelSize(sum(map(math.prod, shapes.values())), config.num_heads, config.num_kv_heads)


def devices_per_server(sizes: Sequence[ModelSize], devices: int, memory_bytes: float) -> int:
    """Returns the smallest number of devices on which a server of each model has room to work.

    It divides the devices and the heads of the models, as vLLM needs it. If no number is large
    enough, it is the largest one.

    Args:
        sizes: the sizes of the models.
        devices: the most devices for one server, all of which are dealt to servers.
        memory_bytes: the memory of one device.
    """
    needed = _BYTES * max(size.num_params for size in sizes)
    possible = [
        number
        for number in range(1, devices + 1)
        if devices % number == 0 and all(_splits(size, number) for size in sizes)
    ]
    enough = [number for number in possible if needed <= _MOST * memory_bytes * number]
    return (enough or possible[-1:])[0]


def _splits(size: ModelSize, number: int) -> bool:
    """Returns whether the heads divide so; vLLM copies heads of keys that are too few."""
    heads = size.num_heads
    kv_heads = size.num_kv_heads
    return heads % number == 0 and (kv_heads % number == 0 or number % kv_heads == 0)
