"""LoRA (arXiv:2106.09685): low-rank factors of a layer's matrices, which train while these stay.

A matrix W has the factors A and B beside it, `lora_a [*in, r]` and `lora_b [r, *out]`, and its
layer computes `x W + scale (x A) B`. Trees that hold both are those that every function of a model
takes; without the factors the same function computes the model itself.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from atlas_jax.models.config import ModelConfig
from atlas_jax.models.layers import Block, Projection, product
from atlas_jax.types import Params

if TYPE_CHECKING:
    from atlas_jax.models.transformer import Decoder

FACTORS = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Factors of a decoder.

    Attributes:
        rank: r.
        scale: factor of the product of the factors.
        targets: path of each matrix in a layer, such as `("attention", "q")`.
        dtype: the dtype of the factors between steps.
        dropout: share of the inputs of A that are set to 0, where a key is given.
    """

    rank: int
    scale: float
    targets: tuple[tuple[str, str], ...]
    dtype: jnp.dtype
    dropout: float = 0.0


def shapes(lora: Lora, config: ModelConfig) -> Params:
    """Returns the shapes of the factors, a tree of `jax.ShapeDtypeStruct`."""

    def pair(projection: Projection) -> Params:
        sizes = (*projection.inner, lora.rank), (lora.rank, *projection.outer)
        return {
            name: jax.ShapeDtypeStruct((config.num_layers, *size), lora.dtype)
            for name, size in zip(FACTORS, sizes, strict=True)
        }

    return _each(lora, config, pair)


def dims(lora: Lora, config: ModelConfig) -> Params:
    """Returns the names of the dims of the factors, those of the matrix and none for the rank."""

    def pair(projection: Projection) -> Params:
        names = projection.kernel.get_metadata("dims")
        split = len(projection.inner)
        return {"lora_a": (None, *names[:split], None), "lora_b": (None, None, *names[split:])}

    return _each(lora, config, pair)


def _each(lora: Lora, config: ModelConfig, pair: Any) -> Params:
    block = nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0)))
    tree: Params = {}
    for part, name in lora.targets:
        tree.setdefault(part, {})[name] = pair(getattr(getattr(block, part), name))
    return {"layers": tree}


def init(decoder: Decoder, seed: int) -> Params:
    """Returns new factors, created in place on the mesh: A as PEFT draws it, B zero."""
    shapes, _, placements = decoder.trained

    def create() -> Params:
        leaves, structure = jax.tree.flatten_with_path(shapes)
        key = jax.random.key(seed)
        new = []
        for number, (path, shape) in enumerate(leaves):
            if path[-1].key == "lora_b":
                new.append(jnp.zeros(shape.shape, shape.dtype))
                continue
            # Kaiming's uniform distribution with a slope of sqrt(5).
            bound = 1 / math.sqrt(math.prod(shape.shape[1:-1]))
            own = jax.random.fold_in(key, number)
            drawn = jax.random.uniform(own, shape.shape, jnp.float32, -bound, bound)
            new.append(drawn.astype(shape.dtype))
        return jax.tree.unflatten(structure, new)

    return jax.jit(create, out_shardings=placements)()


def split(tree: Params) -> tuple[Params, Params]:
    """Returns a tree without the factors, and a tree of these alone; empty if it has none."""
    rest: Params = {}
    factors: Params = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            value, own = split(value)
            factors |= {name: own} if own else {}
        (factors if name in FACTORS else rest)[name] = value
    return rest, factors


def attach(block: Block, factors: Params, lora: Lora, key: jax.Array | None) -> None:
    """Lets a layer add the products of its factors; with a key their inputs drop out."""
    for number, (part, name) in enumerate(lora.targets):
        own = None if key is None else jax.random.fold_in(key, number)
        pair = factors[part][name]
        projection = getattr(getattr(block, part), name)
        projection.delta = functools.partial(_delta, pair, lora, own)


def _delta(
    pair: Params, lora: Lora, key: jax.Array | None, x: Float[Array, "M I"]
) -> Float[Array, "M O"]:
    """Returns `scale (x A) B`."""
    if key is not None:
        kept = jax.random.bernoulli(key, 1 - lora.dropout, x.shape)
        x = jnp.where(kept, x / (1 - lora.dropout), 0)
    low = product(x, pair["lora_a"].reshape(-1, lora.rank))
    return product(lora.scale * low, pair["lora_b"].reshape(lora.rank, -1))


def merged(tree: Params, lora: Lora) -> Params:
    """Returns a layer's tree with the products of the factors added to their matrices.

    They are added in float32, and the sums have the dtypes of the matrices.
    """
    if "lora_a" not in tree:
        return {k: merged(v, lora) if isinstance(v, dict) else v for k, v in tree.items()}
    rest = {name: value for name, value in tree.items() if name not in FACTORS}
    kernel = rest["kernel"]
    return rest | {"kernel": merged_kernel(tree, lora, kernel.dtype)}


def merged_kernel(tree: Params, lora: Lora, dtype: Any) -> jax.Array:
    """Returns the matrix of one layer with its factors added, in `dtype`."""
    kernel, a, b = (tree[name].astype(jnp.float32) for name in ("kernel", *FACTORS))
    precision = jax.lax.Precision.HIGHEST
    added = jnp.matmul(
        a.reshape(-1, lora.rank), b.reshape(lora.rank, -1), precision=precision
    ).reshape(kernel.shape)
    return (kernel + lora.scale * added).astype(dtype)
