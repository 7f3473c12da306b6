"""Input embedding and output table, whose rows are split over `tensor` and columns over `fsdp`.

The columns stay where they are: a lookup exchanges the rows that it finds, and the output head
exchanges columns for rows, so that no device holds a table, or a table's gradient, of full height.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from atlas_jax.models.attention import MASKED
from atlas_jax.sharding import BATCH_AXES, Sharding, all_gather, sum_over_rows

DIMS = ("vocab", "embed")
"""Names of the dims of an embedding table, of the input and of the output."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], sharding: Sharding, dtype: jnp.dtype
) -> Float[Array, "B T D"]:
    """Returns the rows of `table` at `tokens`, in `dtype`.

    Each device looks up its part of the vocabulary and of the columns, for the tokens of all
    devices of `fsdp`, and sends each its rows. The communication is explicit, because GSPMD would
    replicate the gradient's scatter.
    """
    stored = sharding.params(DIMS).spec

    @functools.partial(
        jax.shard_map,
        mesh=sharding.mesh,
        in_specs=(stored, PartitionSpec(BATCH_AXES)),
        out_specs=PartitionSpec(BATCH_AXES),
        check_vma=False,
    )
    def local(part: jax.Array, ids: jax.Array) -> jax.Array:
        here, is_here = local_ids(_from_all(ids, stored), part.shape[0])
        rows = jnp.take(part, here, axis=0).astype(dtype)
        rows = jax.lax.psum(jnp.where(is_here[..., None], rows, 0), "tensor")
        if not _is_split(stored):
            return rows
        return jax.lax.all_to_all(rows, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    return local(table, tokens)


def _forward(
    table: jax.Array, tokens: jax.Array, sharding: Sharding, dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return lookup(table, tokens, sharding, dtype), (table, tokens)


def _backward(
    sharding: Sharding, dtype: jnp.dtype, residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, np.ndarray]:
    table, tokens = residuals
    split = sharding.optimizer(DIMS, memory=False)
    shape = split.shard_shape(table.shape)

    @functools.partial(
        jax.shard_map,
        mesh=sharding.mesh,
        in_specs=(PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES)),
        out_specs=split.spec,
        check_vma=False,
    )
    def local(ids: jax.Array, g: jax.Array) -> jax.Array:
        here, is_here = local_ids(_from_all(ids, split.spec), shape[0])
        if _is_split(split.spec):
            g = jax.lax.all_to_all(g, "fsdp", split_axis=2, concat_axis=0, tiled=True)
        # In float32: the gradient of a frequent token is a sum too long for bfloat16.
        rows = jnp.where(is_here[..., None], g, 0).astype(jnp.float32)
        total = jnp.zeros(shape, jnp.float32).at[here].add(rows)
        axes = "data" if _is_split(split.spec) else BATCH_AXES
        return jax.lax.psum(total, axes).astype(table.dtype)

    return local(tokens, g), np.zeros(tokens.shape, jax.dtypes.float0)


lookup.defvjp(_forward, _backward)


def _is_split(spec: PartitionSpec) -> bool:
    """Returns whether the columns of a table with this placement are on several devices."""
    return "fsdp" in spec and jax.lax.axis_size("fsdp") > 1


def _from_all(rows: Shaped[Array, "B ..."], spec: PartitionSpec) -> Shaped[Array, "R ..."]:
    """Returns the batch rows of all devices that share the columns of a table."""
    if not _is_split(spec):
        return rows
    return jax.lax.all_gather(rows, "fsdp", axis=0, tiled=True)


def local_ids(tokens: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns token ids relative to this device's `size` rows of the vocabulary, in `shard_map`.

    Returns:
        The ids (0 for those that another device holds), and whether this device holds them.
    """
    return _relative(tokens, jax.lax.axis_index("tensor") * size, size)


def _relative(
    tokens: jax.Array, first: jax.Array, size: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    ids = tokens - first
    is_here = (ids >= 0) & (ids < size)
    return jnp.where(is_here, ids, 0), is_here


class OutputRows(NamedTuple):
    """The rows of the output table with which a device computes logits, in `shard_map`.

    Either they are all rows that its part of `tensor` has, for the positions of the device, or they
    are split over `fsdp` too. Then every device computes with the positions of all devices of
    `fsdp`: "gathered" positions N, of which P are its own.
    """

    table: jax.Array  # [W, D] in the compute dtype, followed by zeros where W is above `size`
    first: jax.Array  # [] int32, id of the first row
    size: jax.Array | int  # [] number of rows
    axes: tuple[str, ...]  # mesh axes over which the vocabulary is split

    @classmethod
    def of(cls, part: jax.Array, sharding: Sharding, hidden: Float[Array, "B T D"]) -> OutputRows:
        """Returns the rows for these hidden states, from a table as it is placed between steps.

        The rows are split over `fsdp` unless the hidden states of all its devices are more than
        the rows: splitting sends hidden states and their gradients, the other way the table and
        its gradient.
        """
        stored = sharding.params(DIMS).spec
        height = part.shape[0]
        first = jax.lax.axis_index("tensor") * height
        num_positions = math.prod(hidden.shape[:-1]) * sharding.mesh.shape["fsdp"]
        if not _is_split(stored) or num_positions > height:
            table = all_gather(part, stored, hidden.dtype)
            return cls(table=table, first=first, size=height, axes=("tensor",))
        devices = sharding.mesh.shape["fsdp"]
        width = -(-height // devices)
        table = jnp.pad(part.astype(hidden.dtype), ((0, devices * width - height), (0, 0)))
        table = jax.lax.all_to_all(table, "fsdp", split_axis=0, concat_axis=1, tiled=True)
        skipped = jax.lax.axis_index("fsdp") * width
        size = width if devices * width == height else jnp.clip(height - skipped, 0, width)
        return cls(table=table, first=first + skipped, size=size, axes=("tensor", "fsdp"))

    @property
    def is_split(self) -> bool:
        """True if the rows are split over `fsdp`."""
        return "fsdp" in self.axes

    def gather(self, x: Shaped[Array, "P ..."]) -> Shaped[Array, "N ..."]:
        """Returns the values of all gathered positions."""
        return jax.lax.all_gather(x, "fsdp", axis=0, tiled=True) if self.is_split else x

    def own(self, x: Shaped[Array, " N"]) -> Shaped[Array, " P"]:
        """Returns the values of the device's own positions."""
        if not self.is_split:
            return x
        size = x.shape[0] // jax.lax.axis_size("fsdp")
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("fsdp") * size, size)

    def logits(self, hidden: Float[Array, "N D"]) -> Float[Array, "N W"]:
        """Returns the products with the rows in float32, and -1e30 where there is no row."""
        logits = jnp.einsum("nd,vd->nv", hidden, self.table, preferred_element_type=jnp.float32)
        if isinstance(self.size, int):
            return logits
        return jnp.where(jnp.arange(logits.shape[-1]) < self.size, logits, MASKED)

    def ids(self, targets: Int[Array, "N ..."]) -> tuple[Int[Array, "N ..."], Bool[Array, "N ..."]]:
        """Returns the targets' places among the rows, and whether they are there; else 0."""
        return _relative(targets, self.first, self.size)

    def hidden_gradient(self, d_logits: Float[Array, "N W"]) -> Float[Array, "P D"]:
        """Returns the gradient of the device's own hidden states, still to be summed over `tensor`.

        The sum over `fsdp` is in float32.
        """
        if not self.is_split:
            return d_logits @ self.table
        wide = jnp.einsum("nv,vd->nd", d_logits, self.table, preferred_element_type=jnp.float32)
        total = jax.lax.psum_scatter(wide, "fsdp", scatter_dimension=0, tiled=True)
        return total.astype(d_logits.dtype)

    def table_gradient(
        self, gradient: Float[Array, "W D"], split: PartitionSpec, part: jax.Array
    ) -> jax.Array:
        """Returns the gradient of `table` summed over devices, placed as `split`.

        It has the dtype of `part`, the table as it is placed between steps.
        """
        if self.is_split:
            total = jax.lax.psum(gradient, "data")
            total = jax.lax.all_to_all(total, "fsdp", split_axis=1, concat_axis=0, tiled=True)
            total = total[: part.shape[0]]
        else:
            total = sum_over_rows(gradient, split)
        return total.astype(part.dtype)


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
