"""Input embedding from a table that is split over `tensor` by vocabulary, and over `fsdp`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from atlas_jax.sharding import BATCH_AXES, Sharding, all_gather, sum_over_rows

DIMS = ("vocab", "embed")
"""Names of the dims of an embedding table, of the input and of the output."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], sharding: Sharding
) -> Float[Array, "B T D"]:
    """Returns the rows of `table` at `tokens`, in its dtype.

    Each device looks up the part of the vocabulary that it holds, and the parts are summed over
    `tensor`. The communication is explicit, because GSPMD would replicate the gradient's scatter.
    """

    @functools.partial(
        jax.shard_map,
        mesh=sharding.mesh,
        in_specs=(sharding.params(DIMS).spec, PartitionSpec(BATCH_AXES)),
        out_specs=PartitionSpec(BATCH_AXES),
        check_vma=False,
    )
    def local(part: jax.Array, ids: jax.Array) -> jax.Array:
        part = all_gather(part, sharding.params(DIMS).spec, part.dtype)
        here, found = local_ids(ids, part.shape[0])
        rows = jnp.take(part, here, axis=0)
        return jax.lax.psum(jnp.where(found[..., None], rows, 0), "tensor")

    return local(table, tokens)


def _forward(
    table: jax.Array, tokens: jax.Array, sharding: Sharding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return lookup(table, tokens, sharding), (table, tokens)


def _backward(
    sharding: Sharding, residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, np.ndarray]:
    table, tokens = residuals
    spec = sharding.optimizer(DIMS, memory=False).spec
    size, width = sharding.local_shape(table.shape, DIMS)

    @functools.partial(
        jax.shard_map,
        mesh=sharding.mesh,
        in_specs=(PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES)),
        out_specs=spec,
        check_vma=False,
    )
    def local(ids: jax.Array, g: jax.Array) -> jax.Array:
        here, found = local_ids(ids, size)
        # In float32: the gradient of a frequent token is a sum too long for bfloat16.
        rows = jnp.where(found[..., None], g, 0).astype(jnp.float32)
        total = jnp.zeros((size, width), jnp.float32).at[here].add(rows)
        return sum_over_rows(total, spec).astype(table.dtype)

    return local(tokens, g), np.zeros(tokens.shape, jax.dtypes.float0)


lookup.defvjp(_forward, _backward)


def local_ids(tokens: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns token ids relative to this device's `size` rows of the vocabulary, in `shard_map`.

    Returns:
        The ids (0 for those that another device holds), and whether this device holds them.
    """
    ids = tokens - jax.lax.axis_index("tensor") * size
    found = (ids >= 0) & (ids < size)
    return jnp.where(found, ids, 0), found


def logits(
    hidden: Float[Array, "P G D"], table: Float[Array, "V D"], sharding: Sharding
) -> Float[Array, "P G V"]:
    """Returns `hidden @ table.T` in float32; each device of `tensor` has the whole vocabulary."""
    stored = sharding.params(DIMS).spec
    rows = PartitionSpec(BATCH_AXES)

    @functools.partial(
        jax.shard_map, mesh=sharding.mesh, in_specs=(rows, stored), out_specs=rows, check_vma=False
    )
    def local(hidden: jax.Array, table: jax.Array) -> jax.Array:
        table = all_gather(table, stored, hidden.dtype)
        part = jnp.einsum("pgd,vd->pgv", hidden, table, preferred_element_type=jnp.float32)
        return jax.lax.all_gather(part, "tensor", axis=2, tiled=True)

    return local(hidden, table)
