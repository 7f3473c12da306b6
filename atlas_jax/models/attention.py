"""Causal self-attention for each kind of device; packed sequences do not see each other.

Every implementation computes the same function: position t sees s <= t of its own segment, and of
the last `window` positions if a window is set. Rows of padding give finite numbers, which no loss
reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int

from atlas_jax import sharding

AttentionFn = Callable[..., jax.Array]
"""An attention implementation, `[B T N H]` from query, key, value, `segment_ids`, `sequence_ids`.

The query is `[B T N H]`, key and value are `[B T K H]`, `segment_ids` are `[B T]`, `sequence_ids`
are `[B T]` or None; `scale` and `window` are keywords."""

MASKED = -1e30
"""Attention score of a masked position; finite, because the softmax of a row of -inf is NaN."""


def select(name: str, mesh: Mesh | AbstractMesh, packed: bool, dtype: jnp.dtype) -> AttentionFn:
    """Returns the attention implementation of a name, for the devices of `mesh`.

    Args:
        name: `auto`, `xla`, `cudnn` or `splash`; `auto` is `splash` on TPU, `cudnn` on an NVIDIA
            GPU in half precision, else `xla`.
        mesh: the mesh over which batch and heads are sharded.
        packed: whether a row may hold several segments.
        dtype: the dtype of activations.

    Raises:
        ValueError: if these devices cannot run the implementation.
    """
    platform = sharding.platform(mesh)
    half = dtype == jnp.bfloat16
    if name == "auto":
        name = {"tpu": "splash", "gpu": "cudnn" if half else "xla"}.get(platform, "xla")
    if name == "cudnn" and (platform != "gpu" or not half):
        raise ValueError(
            f"attn_implementation='cudnn' needs an NVIDIA GPU and bfloat16, not {platform} and "
            f"{dtype}; use 'auto' or 'xla'"
        )
    if name == "splash" and platform != "tpu":
        raise ValueError(
            f"attn_implementation='splash' needs a TPU, not {platform}; use 'auto' or 'xla'"
        )
    if name == "splash":
        from atlas_jax.models.splash import splash  # kernels of one kind of device

        return functools.partial(splash, mesh=mesh)
    return functools.partial(cudnn, packed=packed) if name == "cudnn" else xla


def can_share_prompts(attention: AttentionFn) -> bool:
    """Returns whether an implementation takes `sequence_ids`; the masks of splash have none."""
    function = attention.func if isinstance(attention, functools.partial) else attention
    return function.__name__ != "splash"


def visible(
    segment_ids: Int[Array, "B T"], sequence_ids: Int[Array, "B T"] | None, window: int
) -> Bool[Array, "B 1 T T"]:
    """Returns the attention mask: entry `[b, 0, t, s]` is true where position t sees position s.

    With `sequence_ids` the window is counted in entries of the row instead of rotary positions, so
    it must be at least as long as the row (`recipes.grpo.fit_attention`).
    """
    length = segment_ids.shape[1]
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    near = (distance >= 0) & (distance < (window or length))
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    if sequence_ids is not None:
        keys = sequence_ids[:, None, :]
        same &= (keys == 0) | (sequence_ids[:, :, None] == keys)
    return (near & same)[:, None]


def xla(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    sequence_ids: Int[Array, "B T"] | None = None,
    *,
    scale: float,
    window: int = 0,
) -> Float[Array, "B T N H"]:
    """Attention in plain XLA operations; it materialises scores `[B, N, T, T]` in float32.

    The head dim comes first, and the query heads that share a key head form one matrix, so no score
    is transposed. On a CPU this is twice as fast as `jax.nn.dot_product_attention`, forward and
    backward.
    """
    rows, length, heads, size = query.shape
    groups = key.shape[2]
    query = query.reshape(rows, length, groups, -1, size).transpose(0, 2, 3, 1, 4)
    query = query.reshape(rows, groups, -1, size)
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    scores = jnp.einsum("bkqh,bksh->bkqs", query, key, preferred_element_type=jnp.float32)
    scores = (scores * scale).reshape(rows, groups, -1, length, length)
    mask = visible(segment_ids, sequence_ids, window)[:, :, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1).astype(value.dtype)
    out = jnp.einsum("bkqs,bksh->bkqh", weights.reshape(rows, groups, -1, length), value)
    out = out.reshape(rows, groups, -1, length, size).transpose(0, 3, 1, 2, 4)
    return out.reshape(rows, length, heads, size)


def cudnn(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    sequence_ids: Int[Array, "B T"] | None = None,
    *,
    scale: float,
    window: int = 0,
    packed: bool = True,
) -> Float[Array, "B T N H"]:
    """Flash attention of NVIDIA's cuDNN.

    Unpacked rows need only the causal mask, since padding stands at their end. JAX's interface to
    cuDNN takes no segment ids, so packed rows materialise a mask `[B, 1, T, T]`.
    """
    local_window = (window - 1, 0) if window else None  # positions to the left and to the right
    masked = packed or sequence_ids is not None
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=visible(segment_ids, sequence_ids, 0) if masked else None,
        is_causal=True,
        scale=scale,
        local_window_size=local_window,
        implementation="cudnn",
    )
