"""Causal self-attention for each kind of device; packed sequences do not see each other.

Every implementation computes the same function: position t sees s <= t of its own segment, and of
the last `window` positions if a window is set. Rows of padding give finite numbers, which no loss
reads.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int

from atlas_jax import sharding
from atlas_jax.types import UNKNOWN, RowBounds

AttentionFn = Callable[..., jax.Array]
"""An attention implementation, `[B T N H]` from query, key, value, `segment_ids`, `sequence_ids`.

The query is `[B T N H]`, key and value are `[B T K H]`, `segment_ids` are `[B T]`, `sequence_ids`
are `[B T]` or None; `scale` and `window` are keywords."""

MASKED = -1e30
"""Attention score of a masked position; finite, because the softmax of a row of -inf is NaN."""

_BLOCK = 128  # positions of a block of cuDNN's kernels

_MOST_SCORES = 2048
"""Longest row whose scores `xla` makes all at once; for shorter ones that is the faster way."""


def select(
    name: str,
    mesh: Mesh | AbstractMesh,
    packed: bool,
    dtype: jnp.dtype,
    head_dim: int = 128,
    window: int = 0,
) -> AttentionFn:
    """Returns the attention implementation of a name, for the devices of `mesh`.

    Args:
        name: `auto`, `xla`, `cudnn` or `splash`; `auto` is `splash` on TPU, `cudnn` on an NVIDIA
            GPU in half precision, else `xla`.
        mesh: the mesh over which batch and heads are sharded.
        packed: whether a row may hold several segments.
        dtype: the dtype of activations.
        head_dim: numbers of a head.
        window: positions that a local layer sees; 0 if no layer is local.

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
        return Splash(mesh)
    if name == "cudnn":
        from atlas_jax.models import cudnn  # kernels of one kind of device

        return Cudnn(mesh, packed, cudnn.obstacle(mesh, head_dim, window))
    return xla


def over(
    attend: AttentionFn,
    segment_ids: Int[Array, "B T"],
    sequence_ids: Int[Array, "B T"] | None,
    bounds: RowBounds,
) -> AttentionFn:
    """Returns attention over these rows, a function of query, key, value, `scale` and `window`.

    What is the same for all layers is computed here, once.
    """
    if isinstance(attend, _Flash):
        return attend.over(segment_ids, sequence_ids, bounds)

    def run(*qkv: jax.Array, **options: Any) -> jax.Array:
        return attend(*qkv, segment_ids, sequence_ids, **options)

    return run


def shares_prompts(attend: AttentionFn) -> bool:
    """Returns whether completions of a row may share their prompt."""
    if not isinstance(attend, Splash):
        return True
    from atlas_jax.models import splash

    return splash.is_known()


def skips_segments(attend: AttentionFn) -> bool:
    """Returns whether packed rows need no mask, so that pairs of two segments cost nothing."""
    return isinstance(attend, Splash) or (isinstance(attend, Cudnn) and not attend.masks)


def describe(attend: AttentionFn, length: int) -> str:
    """Returns what computes the attention of a run, and what a mask costs where it needs one.

    Args:
        attend: from `select`.
        length: positions of the longest row.
    """
    if isinstance(attend, Cudnn):
        if not attend.masks:
            return "attention of cuDNN, by segments, without a mask"
        megabytes = 2 * length * length / 1e6
        return (
            f"attention of cuDNN; rows of several segments need a mask, since {attend.masks}: "
            f"{megabytes:,.0f} MB for each row of {length}, and no pair of positions is skipped"
        )
    if attend is xla:
        return "attention of XLA" + (", in blocks of keys" if length > _MOST_SCORES else "")
    return "splash attention" + ("" if shares_prompts(attend) else ", by its public interface")


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
    """Attention in plain XLA operations, in float32 between query and weights.

    Scores of short rows are one array `[B, N, T, T]`; those of long rows come in blocks of keys
    (`chunked`). The head dim comes first, and the query heads that share a key head form one
    matrix, so no score is transposed. On a CPU this is twice as fast as
    `jax.nn.dot_product_attention`, forward and backward.
    """
    rows, length, heads, size = query.shape
    if length > _MOST_SCORES:
        from atlas_jax.models import passes, segments  # long rows only
        from atlas_jax.models.chunked import Chunked

        ids = segments.Ids(segment_ids, segment_ids, sequence_ids)
        kernel = Chunked(scale, window=window)
        return passes.attend((kernel,), query, key, value, (passes.Pass(ids),))
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


class _Flash(abc.ABC):
    """Attention by a flash kernel, which depends on what is known of the rows."""

    @abc.abstractmethod
    def over(
        self,
        segment_ids: Int[Array, "B T"],
        sequence_ids: Int[Array, "B T"] | None,
        bounds: RowBounds,
    ) -> AttentionFn:
        """Returns attention over these rows, see `over`."""

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        segment_ids: Int[Array, "B T"],
        sequence_ids: Int[Array, "B T"] | None = None,
        **options: Any,
    ) -> Float[Array, "B T N H"]:
        """Returns attention over rows of which nothing else is known, see `AttentionFn`."""
        return self.over(segment_ids, sequence_ids, UNKNOWN)(query, key, value, **options)


@dataclasses.dataclass(frozen=True)
class Splash(_Flash):
    """Splash attention of TPUs, on the devices of `mesh`."""

    mesh: Mesh | AbstractMesh

    def over(
        self,
        segment_ids: Int[Array, "B T"],
        sequence_ids: Int[Array, "B T"] | None,
        bounds: RowBounds,
    ) -> AttentionFn:
        """Returns attention over these rows, see `over`."""
        from atlas_jax.models import splash

        return splash.over(segment_ids, sequence_ids, bounds, self.mesh)


@dataclasses.dataclass(frozen=True)
class Cudnn(_Flash):
    """Flash attention of NVIDIA's cuDNN.

    Attributes:
        mesh: the mesh over which batch and heads are sharded.
        packed: whether a row may hold several segments.
        masks: why such rows need a mask here, from `cudnn.obstacle`; "" if segments are enough.
    """

    mesh: Mesh | AbstractMesh
    packed: bool
    masks: str = ""

    def over(
        self,
        segment_ids: Int[Array, "B T"],
        sequence_ids: Int[Array, "B T"] | None,
        bounds: RowBounds,
    ) -> AttentionFn:
        """Returns attention over these rows, see `over`.

        Rows are padded to whole blocks: with a length of 64 more than a multiple of 128, cuDNN's
        backward pass can give NaN (pytorch issue 196678).
        """
        from atlas_jax.models import cudnn

        length = segment_ids.shape[1]
        more = -length % _BLOCK
        several = self.packed or sequence_ids is not None
        ids, sequences = (
            None if x is None else jnp.pad(x, ((0, 0), (0, more)))
            for x in (segment_ids, sequence_ids)
        )
        assert ids is not None
        rows = None
        by_mask = bool(self.masks) or (several and not bounds.segments)
        if several and not by_mask:
            rows = cudnn.layout(ids, sequences, bounds, self.mesh)

        def run(*qkv: jax.Array, scale: float, window: int = 0) -> jax.Array:
            q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in qkv)
            if by_mask:
                mask = visible(ids, sequences, 0) if several else None
                return _masked(q, k, v, mask, scale, window)[:, :length]
            return cudnn.attend(
                q, k, v, rows, scale=scale, window=window, bounds=bounds, mesh=self.mesh
            )[:, :length]

        return run


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


def _masked(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    scale: float,
    window: int,
) -> jax.Array:
    """Returns attention by JAX's public interface to cuDNN, which knows segments as a mask only."""
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=True,
        scale=scale,
        local_window_size=(window - 1, 0) if window else None,  # to the left and to the right
        implementation="cudnn",
    )
