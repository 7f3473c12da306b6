"""Splash, the sparse flash attention of TPUs, a Pallas kernel of `jax.experimental`.

The kernel skips blocks by a mask that is static, and within the others compares segments. Segments
that are known to be short are therefore given as a window, which skips what lies further away.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Int

from atlas_jax.models import passes, segments
from atlas_jax.models.passes import Pass
from atlas_jax.models.segments import Ids
from atlas_jax.sharding import BATCH_AXES, platform
from atlas_jax.types import RowBounds

BLOCK = 512
"""Positions of a block. Shorter rows are blocks of 128, which a TPU computes less fast."""

_LANES = 128

_FORWARD = (
    "fwd_mask_info", "dq_mask_info", "dkv_mask_info", "q", "k", "v", "segment_ids", "sinks",
    "save_residuals", "mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name",
    "mask_function", "attn_logits_soft_cap", "interpret",
)  # fmt: skip
_BACKWARD = (*_FORWARD[8:], "res", "do")


def is_known() -> bool:
    """Returns whether the passes of the installed JAX's kernel are those that this was made for."""
    return (
        tuple(inspect.signature(kernels._splash_attention_fwd).parameters) == _FORWARD
        and tuple(inspect.signature(kernels._splash_attention_bwd).parameters) == _BACKWARD
    )


def over(
    segment_ids: Int[Array, "B T"],
    sequence_ids: Int[Array, "B T"] | None,
    bounds: RowBounds,
    mesh: Mesh | AbstractMesh,
) -> Callable[..., jax.Array]:
    """Returns splash attention over these rows, see `attention.over`; a CPU interprets the kernel.

    Raises:
        ValueError: if completions share a prompt, and the installed JAX has another kernel than
            this was made for.
    """
    if sequence_ids is not None and not is_known():
        raise ValueError(
            f"attn_implementation='splash' cannot share a prompt with jax {jax.__version__}; set "
            "rollout.share_prompt=false"
        )
    length = segment_ids.shape[1]
    padded = padded_length(length)

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, padded - length)) + ((0, 0),) * (x.ndim - 2))

    ids = pad(segment_ids)
    sequences = None if sequence_ids is None else pad(sequence_ids)
    within = None
    if bounds.longest or bounds.prompt:
        within = segments.keeps(bounds, segment_ids, sequence_ids)[:, None, None, None]

    def run(
        query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float, window: int = 0
    ) -> jax.Array:
        attend_local = functools.partial(
            _local,
            scale=scale,
            window=window,
            bounds=bounds,
            interpret=platform(mesh) == "cpu",
        )
        heads = PartitionSpec(BATCH_AXES, None, "tensor", None)
        rows = PartitionSpec(BATCH_AXES)
        # A Pallas kernel is opaque to GSPMD, so each device is given its own rows and heads.
        out = jax.shard_map(
            attend_local, mesh=mesh, in_specs=(heads, rows, rows), out_specs=heads, check_vma=False
        )((pad(query), pad(key), pad(value)), ids, sequences)[:, :length]
        return out if within is None else jnp.where(within, out, jnp.asarray(jnp.nan, out.dtype))

    return run


def _local(
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    ids: jax.Array,
    sequences: jax.Array | None,
    *,
    scale: float,
    window: int,
    bounds: RowBounds,
    interpret: bool,
) -> jax.Array:
    query, key, value = qkv
    length = query.shape[1]
    # The kernel takes no scale. Scaling in float32 rounds the query only once.
    scaled = (query.astype(jnp.float32) * scale).astype(query.dtype)
    if not is_known():
        return _public(scaled, key, value, ids, window, interpret)
    near = min((w for w in (window, bounds.longest) if 0 < w < length), default=0)
    causal = SplashKernel(near, room=length, causal=True, interpret=interpret)
    if sequences is None:
        return passes.attend((causal,), scaled, key, value, (Pass(Ids(ids, ids)),))
    room = segments.prompt_room(bounds, length, min(BLOCK, length))
    prompt = SplashKernel(0, room=room, causal=False, interpret=interpret)
    return passes.attend((causal, prompt), scaled, key, value, segments.passes(ids, sequences))


def padded_length(length: int) -> int:
    """Returns the length to which rows are padded for the kernel's blocks."""
    block = _LANES if length <= BLOCK else BLOCK
    return -(-length // block) * block


def _public(
    q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, window: int, interpret: bool
) -> jax.Array:
    """Returns attention by the kernel's public interface, which gives no statistics."""
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    kernel = _kernel(q.shape[2], (q.shape[1],) * 2, window, True, interpret)
    both = splash_attention.SegmentIds(ids, ids)
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first, both), 1, 2)


@dataclasses.dataclass(frozen=True)
class SplashKernel:
    """The kernel, see `passes.FlashKernel`; its rows are `Ids`, and its query is scaled.

    Attributes:
        window: most positions that a query sees, itself included; 0 for all. Causal only.
        room: number of keys, from the first of the row.
        causal: whether a query sees only keys up to its own place.
        interpret: whether to run on a CPU.
    """

    window: int
    room: int
    causal: bool
    interpret: bool

    def forward(
        self, query: jax.Array, key: jax.Array, value: jax.Array, rows: Ids
    ) -> tuple[jax.Array, jax.Array]:
        """See `passes.FlashKernel`."""
        q, k, v = self._heads_first(query, key, value)
        kernel = self._kernel(query)
        infos = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info

        def row(q: Any, k: Any, v: Any, ids: Any) -> tuple[jax.Array, jax.Array]:
            out, saved = kernels._splash_attention_fwd(*infos, q, k, v, ids, None, **kernel.kwargs)
            return out, saved[6]

        out, statistics = jax.vmap(row)(q, k, v, self._ids(rows))
        return jnp.swapaxes(out, 1, 2), statistics

    def backward(
        self,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        rows: Ids,
        output: jax.Array,
        statistics: jax.Array,
        gradient: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `passes.FlashKernel`."""
        kernel = self._kernel(qkv[0])
        out, of_out = (jnp.swapaxes(x, 1, 2) for x in (output, gradient))

        def row(q: Any, k: Any, v: Any, ids: Any, o: Any, s: Any, do: Any) -> tuple[Any, ...]:
            saved = (q, k, v, ids, None, o, s, kernel.dq_mask_info, kernel.dkv_mask_info)
            grads = kernels._splash_attention_bwd(**kernel.kwargs, res=saved, do=do)
            return grads[3:6]

        q, k, v = self._heads_first(*qkv)
        found = jax.vmap(row)(q, k, v, self._ids(rows), out, statistics, of_out)
        of_query, *of_keys = (jnp.swapaxes(x, 1, 2) for x in found)
        more = ((0, 0), (0, qkv[1].shape[1] - self.room), (0, 0), (0, 0))
        of_key, of_value = (jnp.pad(x, more) for x in of_keys)
        return of_query, of_key, of_value

    def _heads_first(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.swapaxes(x, 1, 2) for x in (q, k[:, : self.room], v[:, : self.room]))

    def _ids(self, rows: Ids) -> Any:
        return splash_attention.SegmentIds(rows.query, rows.key[:, : self.room])

    def _kernel(self, query: jax.Array) -> Any:
        shape = query.shape[1], self.room
        return _kernel(query.shape[2], shape, self.window, self.causal, self.interpret)


def _kernel(
    heads: int, shape: tuple[int, int], window: int, causal: bool, interpret: bool
) -> Callable[..., jax.Array]:
    mask: splash_attention.Mask = splash_attention.FullMask(shape)
    if causal:
        mask = splash_attention.CausalMask(shape)
    if window:
        mask = splash_attention.LocalMask(shape, (window - 1, 0), 0)
    queries, keys = (next(b for b in (BLOCK, 256, 128) if n % b == 0) for n in shape)
    sizes = splash_attention.BlockSizes(
        block_q=queries, block_kv=keys, block_kv_compute=keys,
        block_q_dkv=queries, block_kv_dkv=keys, block_kv_dkv_compute=keys,
        block_q_dq=queries, block_kv_dq=keys,
    )  # fmt: skip
    return splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
