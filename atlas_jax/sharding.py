"""The device mesh, and the mesh axis of each array dim.

Models name the dims of their parameters (`embed`, `heads`, `mlp`, `vocab` …), and one table below
maps the names to mesh axes. All arrays are global. GSPMD partitions the computation, except in the
functions that use `jax.shard_map` (`logprobs`, attention kernels).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from atlas_jax.options.train import MeshConfig

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
"""Mesh axes of a batch's rows; `fsdp` is data parallelism with split parameters."""

_TENSOR_DIMS = frozenset({"heads", "kv_heads", "mlp", "vocab"})
_FSDP_DIM = "embed"

Dims = tuple[str | None, ...]
"""Names of the dims of one parameter; a dim named None is never split."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the `data x fsdp x tensor` mesh over `devices`, by default all of them.

    Raises:
        ValueError: if the product of the sizes is not the number of devices, or `tensor` does not
            fit in one process.
    """
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    return Mesh(_grid(shape, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _grid(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Returns the devices arranged by the network between them, with `tensor` in one process.

    The slow network, between TPU slices or between processes, is given to `data` first and then to
    `fsdp`.
    """
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) == 1:
        # Within one slice JAX's order suits the network, unless it spreads `tensor` over processes.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        if _tensor_is_local(grid):
            return grid
    by_process = len(slices) == 1
    parts = len({device.process_index for device in devices}) if by_process else len(slices)
    data = math.gcd(shape[0], parts)
    fsdp = math.gcd(shape[1], parts // data)
    if data * fsdp == parts:
        grid = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // data, shape[1] // fsdp, shape[2]),
            (data, fsdp, 1),
            devices,
            process_is_granule=by_process,
            allow_split_physical_axes=True,
        )
        if _tensor_is_local(grid):
            return grid
    raise ValueError(
        f"mesh data x fsdp x tensor = {shape} has no order in which mesh.tensor={shape[2]} stays "
        f"inside one process of {parts}; use a mesh.tensor that divides the devices of a process"
    )


def _tensor_is_local(grid: np.ndarray) -> bool:
    """Returns whether each batch row belongs to one process."""
    rows = grid.reshape(-1, grid.shape[-1])
    return all(len({device.process_index for device in row}) == 1 for row in rows)


def platform(mesh: Mesh | AbstractMesh) -> str:
    """Returns the kind of the devices of `mesh`: `cpu`, `gpu` or `tpu`; they may be abstract."""
    return mesh.abstract_mesh.abstract_device.platform


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Placement of arrays on `mesh`, in one of the modes of `TrainConfig.sharding`."""

    mesh: Mesh | AbstractMesh
    mode: str = "fsdp"
    offload: str = "none"
    """State that stays in host memory between its uses, as in `TrainConfig.offload`."""

    @property
    def num_replicas(self) -> int:
        """Number of parts into which the rows of a batch are split."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def local_replicas(self) -> int:
        """Number of those parts that are on this process's devices."""
        return self.num_replicas // jax.process_count()

    def params(self, dims: Dims) -> NamedSharding:
        """Returns the placement of a parameter between steps."""
        sharding = self._named(dims, split=self.mode == "fsdp")
        return self.in_host(sharding) if self.params_in_host(dims) else sharding

    def params_in_host(self, dims: Dims) -> bool:
        """Returns whether a parameter stays in host memory, as those of layers may (`offload`)."""
        return "params" in self.offload and len(dims) > 1 and dims[0] is None

    def optimizer(self, dims: Dims, memory: bool = True) -> NamedSharding:
        """Returns the placement of a parameter's moments and of its accumulated gradient.

        Args:
            dims: the dims of the parameter.
            memory: whether to apply `offload`; false gives the placement on the device.
        """
        sharding = self._named(dims, split=self.mode != "replicated")
        return self.in_host(sharding) if memory and "optimizer" in self.offload else sharding

    def in_host(self, sharding: NamedSharding) -> NamedSharding:
        """Returns `sharding` in pinned host memory."""
        return sharding.with_memory_kind("pinned_host")

    def gathered(self, dims: Dims) -> NamedSharding:
        """Returns the placement of a parameter while its layer runs, split over `tensor` only."""
        return self._named(dims, split=False)

    def rows(self, *leading: None) -> NamedSharding:
        """Returns the sharding of arrays whose first dim after `leading` counts batch rows."""
        return NamedSharding(self.mesh, PartitionSpec(*leading, BATCH_AXES))

    @property
    def replicated(self) -> NamedSharding:
        """The placement of an array that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def _named(self, dims: Dims, split: bool) -> NamedSharding:
        axes = [
            "tensor" if d in _TENSOR_DIMS else "fsdp" if d == _FSDP_DIM and split else None
            for d in dims
        ]
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def check(self, name: str, shape: tuple[int, ...], dims: Dims) -> None:
        """Checks that a parameter divides over the mesh.

        Raises:
            ValueError: if it does not; the message names the parameter, its shape and the axis.
        """
        for size, axis in zip(shape, self._named(dims, split=True).spec, strict=True):
            if axis is not None and size % self.mesh.shape[axis]:
                raise ValueError(
                    f"parameter {name} of shape {shape}: {size} does not divide over mesh.{axis}="
                    f"{self.mesh.shape[axis]}; use a divisor of {size} for mesh.{axis}"
                )


def gather(
    sharding: Sharding, tree: Any, dims: Any, dtype: jnp.dtype, gradient_dtype: jnp.dtype
) -> Any:
    """Returns parameters rounded to `dtype`, then gathered over `fsdp`; their gradients are split.

    The rounding comes first, so the gather moves half-precision bytes. Without explicit constraints
    in both directions, GSPMD could gather all layers at once, or keep gradients whole. The result
    has the dtype `gradient_dtype`, hence so has its gradient, which is summed over devices in it.
    """

    def one(param: jax.Array, axes: Dims) -> jax.Array:
        dtypes = dtype, gradient_dtype
        return _gather(param, dtypes, sharding.gathered(axes), sharding.optimizer(axes, False))

    return jax.tree.map(one, tree, dims)


def in_host(x: jax.Array) -> bool:
    """Returns whether an array that is being traced is in host memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def fetch(x: jax.Array) -> jax.Array:
    """Returns an array, which is being traced, moved to device memory."""
    return jax.device_put(x, jax.memory.Space.Device) if in_host(x) else x


def put_back(new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns `new` moved to the memory kind of `old`; both are being traced."""
    return jax.device_put(new, jax.memory.Space.Host) if in_host(old) else new


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(
    param: jax.Array, dtypes: tuple[jnp.dtype, ...], whole: NamedSharding, split: NamedSharding
) -> jax.Array:
    param = fetch(param).astype(dtypes[0])
    return jax.lax.with_sharding_constraint(param, whole).astype(dtypes[1])


def _gather_fwd(
    param: jax.Array, dtypes: tuple[jnp.dtype, ...], whole: NamedSharding, split: NamedSharding
) -> tuple[jax.Array, jax.Array]:
    like = put_back(jnp.zeros((0,), param.dtype), param)
    return _gather(param, dtypes, whole, split), like


def _gather_bwd(
    dtypes: tuple[jnp.dtype, ...],
    whole: NamedSharding,
    split: NamedSharding,
    like: jax.Array,
    g: jax.Array,
) -> tuple[jax.Array]:
    g = jax.lax.with_sharding_constraint(g.astype(like.dtype), split)
    return (put_back(g, like),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def all_gather(param: jax.Array, spec: PartitionSpec, dtype: jnp.dtype) -> jax.Array:
    """Returns a parameter gathered over all axes but `tensor`, in `shard_map`."""
    param = param.astype(dtype)
    if "fsdp" not in spec or jax.lax.axis_size("fsdp") == 1:
        return param  # gathering from one device would copy
    return jax.lax.all_gather(param, "fsdp", axis=spec.index("fsdp"), tiled=True)


def sum_over_rows(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Returns the sum of the devices' gradients for their rows, split as `spec`, in `shard_map`."""
    if "fsdp" in spec:
        dim = spec.index("fsdp")
        gradient = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=dim, tiled=True)
    else:
        gradient = jax.lax.psum(gradient, "fsdp")
    return jax.lax.psum(gradient, "data")


def to_global(batch: T, sharding: Sharding, microbatches: int) -> T:
    """Returns global `[microbatches, B, T]` arrays, of which this process has the rows `[B, T]`.

    Neighbouring rows are on one device, so a microbatch does not depend on the number of processes.
    """

    def place(rows: np.ndarray) -> jax.Array:
        parts = rows.reshape(sharding.local_replicas, microbatches, -1, *rows.shape[1:])
        local = parts.swapaxes(0, 1).reshape(microbatches, -1, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding.rows(None), local)

    return jax.tree.map(place, batch)


def place_rows(rows: np.ndarray, sharding: Sharding) -> jax.Array:
    """Returns the global array of which this process has the rows `[B, ...]`."""
    return jax.make_array_from_process_local_data(sharding.rows(), rows)


def from_global(array: jax.Array) -> np.ndarray:
    """Returns this process's rows of a global array whose first dim counts rows."""
    if array.is_fully_addressable:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
