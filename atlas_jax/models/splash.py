"""The sparse flash attention of TPUs, a Pallas kernel of `jax.experimental`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from atlas_jax.sharding import BATCH_AXES, platform

_MULTIPLE = 128  # TPU lanes: row lengths that the kernel's blocks divide; others are padded


def splash(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    sequence_ids: Int[Array, "B T"] | None = None,
    *,
    scale: float,
    window: int = 0,
    mesh: Mesh | AbstractMesh,
) -> Float[Array, "B T N H"]:
    """Splash attention, see `attention.AttentionFn`; a CPU interprets the kernel.

    Raises:
        ValueError: if completions share a prompt.
    """
    if sequence_ids is not None:
        raise ValueError(
            "attn_implementation='splash' cannot share a prompt between completions; set "
            "rollout.share_prompt=false"
        )
    interpret = platform(mesh) == "cpu"
    length = query.shape[1]
    padded = -(-length // _MULTIPLE) * _MULTIPLE
    rows = PartitionSpec(BATCH_AXES, None, "tensor", None)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(rows, rows, rows, PartitionSpec(BATCH_AXES)),
        out_specs=rows,
        check_vma=False,
    )
    # A Pallas kernel is opaque to GSPMD, so each device is given its own rows and heads.
    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        # The kernel takes no scale. Scaling in float32 rounds the query only once.
        scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
        heads_first = [jnp.swapaxes(x, 1, 2) for x in (scaled, k, v)]
        kernel = _kernel(q.shape[2], padded, window, interpret)
        ids = splash_attention.SegmentIds(segments, segments)
        return jnp.swapaxes(jax.vmap(kernel)(*heads_first, ids), 1, 2)

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, padded - length)) + ((0, 0),) * (x.ndim - 2))

    return local(*map(pad, (query, key, value, segment_ids)))[:, :length]


def _kernel(heads: int, length: int, window: int, interpret: bool) -> Callable[..., jax.Array]:
    if window:
        mask: splash_attention.Mask = splash_attention.LocalMask((length,) * 2, (window - 1, 0), 0)
    else:
        mask = splash_attention.CausalMask((length, length))
    block = next(b for b in (512, 256, 128) if length % b == 0)
    sizes = splash_attention.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    return splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
