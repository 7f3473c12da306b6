"""NVIDIA's cuDNN flash attention for packed rows and shared prompts, without a mask.

JAX's public interface to cuDNN has no segments, so this binds the primitives below it. A packed row
is given as the first token and the length of each segment, of which cuDNN computes one after the
other and skips all other pairs. Statistics and workspaces of cuDNN are as long as a row for each
segment: `[B M, N, T]` for M segments in each of B rows, so M should be as small as the rows allow.

Kernels run inside `jax.shard_map`: offsets count the tokens of a device's own rows.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from atlas_jax.models import passes, segments
from atlas_jax.models.passes import Pass
from atlas_jax.sharding import BATCH_AXES
from atlas_jax.types import RowBounds

_OPERANDS = (
    "query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets",
    "page_table_k", "page_table_v",
)  # fmt: skip
_SETTINGS = (
    "scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout",
    "sliding_window_length",
)  # fmt: skip
_RESULTS = ("activation", "fwd_output", "grad_output")

_NONE: dict[str, Any] = {}
_NO_SCORE_MOD = {"score_mod_name": None, "score_mod_jaxpr": None}
_SIGNATURES = {
    (*_OPERANDS, *_SETTINGS, "is_training"): ((*_OPERANDS, *_RESULTS, *_SETTINGS), _NONE),
    (*_OPERANDS, "score_mod_args", *_SETTINGS, *_NO_SCORE_MOD, "is_training"): (
        (*_OPERANDS, *_RESULTS, "score_mod_args", *_SETTINGS, *_NO_SCORE_MOD),
        _NO_SCORE_MOD,
    ),
}
"""Known parameters of the forward primitive -> those of the backward one, and settings to add.

The first are those of jax 0.11, the second those of jax 0.12."""

_OLDEST_JAX = (0, 11, 1)
_OLDEST_FOR_WINDOWS = 91002  # cuDNN 9.10.2; older ones refuse a window of packed rows
_MOST_OFFSET = 2**31
_LARGEST_HEAD = 256


def obstacle(mesh: Mesh | AbstractMesh, head_dim: int, window: int) -> str:
    """Returns why these devices and this JAX need a mask for packed rows; "" if they need none."""
    version = jax.__version_info__
    capability = _capability(mesh)
    if version < _OLDEST_JAX:
        return f"jax {jax.__version__} is older than {'.'.join(map(str, _OLDEST_JAX))}"
    if settings() is None:
        return f"jax {jax.__version__} has an interface to cuDNN that this version does not know"
    if capability < (9, 0):
        return f"a GPU of compute capability {'.'.join(map(str, capability))} is older than Hopper"
    if head_dim > _LARGEST_HEAD or head_dim % 8:
        return f"cuDNN has no heads of {head_dim}"
    if window and fused.check_cudnn_version() < _OLDEST_FOR_WINDOWS:
        return "a window of packed rows needs cuDNN 9.10.2"
    return ""


def settings() -> dict[str, Any] | None:
    """Returns what the installed JAX needs beside our settings; None if it is not known.

    The lowerings are looked at, which take what the primitives are bound with.
    """
    names = [
        tuple(inspect.signature(function).parameters)
        for function in (
            fused._dot_product_attention_fwd_cuda_lowering,
            fused._dot_product_attention_bwd_cuda_lowering,
        )
    ]
    (_, *forward), (_, *backward) = names  # the first is the context of the lowering
    expected, more = _SIGNATURES.get(tuple(forward), ((), _NONE))
    return more if tuple(backward) == expected else None


def _capability(mesh: Mesh | AbstractMesh) -> tuple[int, ...]:
    """Returns the compute capability, also of devices that are only compiled for."""
    devices = mesh.devices.flat if isinstance(mesh, Mesh) else jax.local_devices()
    text = getattr(next(iter(devices)), "compute_capability", "0.0")
    return tuple(map(int, text.split(".")))


class PackedLayout(NamedTuple):
    """Segments of a device's rows, computed once for all layers."""

    starts: Int[Array, " S"]
    """First token of each segment, counted over the tokens of all rows of the device."""
    lengths: Int[Array, " S"]
    """Tokens of each segment; 0 for those that are not there."""
    slot: Int[Array, "B T"]
    """Segment of each position, as an index of the two above."""
    place: Int[Array, "B T"]
    """Position in that segment."""
    held: Bool[Array, "B T"]
    """False for padding."""
    filler: Float[Array, "B T"]
    """Output where no segment is computed: 0 for padding, NaN where the bounds do not hold."""
    completion: Bool[Array, "B T"] | None
    """Positions that see the prompt of their row; None where nothing is shared."""
    tokens: Int[Array, " B"]
    """Positions of each row without padding."""
    prompt: Int[Array, " B"]
    """Tokens of the shared prompt of each row."""


def layout(
    segment_ids: Int[Array, "B T"],
    sequence_ids: Int[Array, "B T"] | None,
    bounds: RowBounds,
    mesh: Mesh | AbstractMesh,
) -> PackedLayout:
    """Returns the segments of rows for the kernels of this module.

    Args:
        segment_ids: segments; 0 is padding, at the end of a row.
        sequence_ids: sequences that share a prompt, or None.
        bounds: the most segments of a row.
        mesh: the mesh over which the rows are split.
    """
    rows = PartitionSpec(BATCH_AXES)
    one = functools.partial(_layout, bounds=bounds)
    inputs = (segment_ids, sequence_ids)
    return jax.shard_map(one, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(*inputs)


def _layout(
    segment_ids: jax.Array, sequence_ids: jax.Array | None, bounds: RowBounds
) -> PackedLayout:
    num_rows, length = segment_ids.shape
    size = num_rows * max(bounds.segments, 2)  # of one segment cuDNN wants no offsets
    mine = segments.own(segment_ids, sequence_ids)
    held = segment_ids > 0
    differs = mine[:, 1:] != mine[:, :-1]
    begins = held & jnp.pad(differs, ((0, 0), (1, 0)), constant_values=True)
    ends = held & jnp.pad(differs, ((0, 0), (0, 1)), constant_values=True)
    find = functools.partial(jnp.nonzero, size=size)
    (starts,) = find(begins.reshape(-1), fill_value=num_rows * length)
    (lasts,) = find(ends.reshape(-1), fill_value=num_rows * length - 1)
    number = jnp.cumsum(begins.reshape(-1)).reshape(segment_ids.shape) - 1
    slot = jnp.clip(number, 0, size - 1)
    token = jnp.arange(num_rows * length).reshape(segment_ids.shape)
    fits = held & (number < size)
    prompt = tokens = jnp.sum(held, axis=1)
    completion = None
    if sequence_ids is not None:
        prompt = jnp.sum(held & (sequence_ids == 0), axis=1)
        completion = segments.sees_prompt(segment_ids, sequence_ids) & (prompt > 0)[:, None]
        fits &= (prompt <= segments.prompt_room(bounds, length))[:, None]
    return PackedLayout(
        starts=starts.astype(jnp.int32),
        lengths=(lasts - starts + 1).astype(jnp.int32),
        slot=slot,
        place=jnp.clip(token - starts[slot], 0, length - 1),
        held=fits,
        filler=jnp.where(held, jnp.nan, 0.0),
        completion=completion,
        tokens=tokens.astype(jnp.int32),
        prompt=prompt.astype(jnp.int32),
    )


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    rows: PackedLayout | None,
    *,
    scale: float,
    window: int,
    bounds: RowBounds,
    mesh: Mesh | AbstractMesh,
) -> Float[Array, "B T N H"]:
    """Returns causal attention within segments, and to a shared prompt.

    Args:
        query: queries.
        key: keys.
        value: values.
        rows: from `layout`; None for rows of one segment with padding at their end.
        scale: factor of the scores.
        window: most positions that a position sees, itself included; 0 for all.
        bounds: those that `rows` was made with.
        mesh: the mesh over which rows and heads are split.

    Raises:
        ValueError: if a device has more numbers in its queries than cuDNN's offsets can count.
    """
    length = query.shape[1]
    window = window if window < length else 0
    heads = PartitionSpec(BATCH_AXES, None, "tensor", None)
    kernels: tuple[passes.FlashKernel, ...] = (Causal(scale, window),)
    if rows is not None:
        kernels = (Segments(scale, window),)
        if rows.completion is not None:
            kernels = (*kernels, Prompt(scale, segments.prompt_room(bounds, length)))

    def local(q: jax.Array, k: jax.Array, v: jax.Array, rows: PackedLayout | None) -> jax.Array:
        if rows is not None and q.size >= _MOST_OFFSET:
            raise ValueError(
                f"a device has {q.shape[0]} rows of {length} tokens, {q.size} numbers of queries, "
                f"and cuDNN's offsets end at {_MOST_OFFSET}; use fewer rows a device"
            )
        completion = None if rows is None else rows.completion
        return passes.attend(kernels, q, k, v, (Pass(rows), Pass(rows, completion))[: len(kernels)])

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, heads, heads, PartitionSpec(BATCH_AXES)),
        out_specs=heads,
        check_vma=False,
    )(query, key, value, rows)


@dataclasses.dataclass(frozen=True)
class Causal:
    """Rows of one segment, see `passes.FlashKernel`; nobody sees the padding at their end."""

    scale: float
    window: int

    def forward(
        self, query: jax.Array, key: jax.Array, value: jax.Array, rows: Any
    ) -> tuple[jax.Array, jax.Array]:
        """See `passes.FlashKernel`."""
        return _forward((query, key, value), self._static())

    def backward(
        self,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        rows: Any,
        output: jax.Array,
        statistics: jax.Array,
        gradient: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `passes.FlashKernel`."""
        return _backward(qkv, (statistics, output, gradient), self._static())

    def _static(self) -> dict[str, Any]:
        return _static(self.scale, fused.MaskType.CAUSAL, self.window)


@dataclasses.dataclass(frozen=True)
class Segments:
    """Causal attention within segments, see `passes.FlashKernel`; its rows are a `PackedLayout`."""

    scale: float
    window: int

    def forward(
        self, query: jax.Array, key: jax.Array, value: jax.Array, rows: PackedLayout
    ) -> tuple[jax.Array, jax.Array]:
        """See `passes.FlashKernel`."""
        output, statistics = _forward(
            (query, key, value), self._static(), *_packed(query, key, rows)
        )
        output = jnp.where(rows.held[..., None, None], output, rows.filler[..., None, None])
        # cuDNN counts statistics [S, N, T] from the first token of each segment.
        statistics = jnp.swapaxes(statistics[rows.slot, :, rows.place], 1, 2)
        statistics = jnp.where(rows.held[:, None], statistics, 0.0)
        return output.astype(query.dtype), statistics

    def backward(
        self,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        rows: PackedLayout,
        output: jax.Array,
        statistics: jax.Array,
        gradient: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `passes.FlashKernel`."""
        query, key, _ = qkv
        by_token = jnp.swapaxes(statistics, 1, 2).reshape(-1, query.shape[2])
        token = rows.starts[:, None] + jnp.arange(query.shape[1])
        by_segment = by_token[jnp.minimum(token, len(by_token) - 1)]
        results = jnp.swapaxes(by_segment, 1, 2), output, gradient
        grads = _backward(qkv, results, self._static(), *_packed(query, key, rows))
        held = rows.held[..., None, None]
        # cuDNN writes nothing outside of segments.
        of_query, of_key, of_value = (jnp.where(held, x, 0) for x in grads)
        return of_query, of_key, of_value

    def _static(self) -> dict[str, Any]:
        return _static(self.scale, fused.MaskType.PADDING_CAUSAL, self.window)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Attention to the first tokens of a row, the prompt that it shares; rows are a `PackedLayout`.

    Queries of the prompt are computed too, and their results are not read.

    Attributes:
        scale: factor of the scores.
        room: most tokens of a prompt.
    """

    scale: float
    room: int

    def forward(
        self, query: jax.Array, key: jax.Array, value: jax.Array, rows: PackedLayout
    ) -> tuple[jax.Array, jax.Array]:
        """See `passes.FlashKernel`."""
        qkv = query, key[:, : self.room], value[:, : self.room]
        return _forward(qkv, self._static(), *self._lengths(rows))

    def backward(
        self,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        rows: PackedLayout,
        output: jax.Array,
        statistics: jax.Array,
        gradient: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `passes.FlashKernel`."""
        query, key, value = qkv
        results = statistics, output, gradient
        cut = query, key[:, : self.room], value[:, : self.room]
        of_query, *of_prompt = _backward(cut, results, self._static(), *self._lengths(rows))
        assert rows.completion is not None
        of_query = jnp.where(rows.completion[..., None, None], of_query, 0)
        inside = (jnp.arange(self.room) < rows.prompt[:, None])[..., None, None]
        more = ((0, 0), (0, key.shape[1] - self.room), (0, 0), (0, 0))
        of_key, of_value = (jnp.pad(jnp.where(inside, x, 0), more) for x in of_prompt)
        return of_query, of_key, of_value

    def _lengths(self, rows: PackedLayout) -> tuple[jax.Array, jax.Array]:
        """Returns lengths of queries and of keys; at least 1, since cuDNN divides by their sum."""
        return jnp.maximum(rows.tokens, 1), jnp.clip(rows.prompt, 1, self.room)

    def _static(self) -> dict[str, Any]:
        return _static(self.scale, fused.MaskType.PADDING, 0)


def _packed(query: jax.Array, key: jax.Array, rows: PackedLayout) -> tuple[jax.Array, ...]:
    """Returns the lengths `[B, M]` and offsets `[B, M + 1]`, which cuDNN reads as one list.

    Offsets count numbers, not tokens. Segments of all rows stand one after the other, as
    `fused._fix_seqlen_offsets` leaves them.
    """
    num_rows, length = query.shape[:2]
    lengths = rows.lengths.reshape(num_rows, -1)
    starts = jnp.pad(rows.starts, (0, num_rows), constant_values=num_rows * length)
    starts = starts.reshape(num_rows, -1)
    of_query, of_key = (starts * (x.shape[2] * x.shape[3]) for x in (query, key))
    return lengths, lengths, of_query, of_key


def _static(scale: float, mask: Any, window: int) -> dict[str, Any]:
    return {
        "scale": scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, and no gradient of one
        "mask_type": mask,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": window or None,
    } | (settings() or {})


def _operands(qkv: tuple[jax.Array, ...], ranges: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Returns the operands of both primitives: no bias, then lengths, offsets, and no pages."""
    unused = jnp.zeros(0, qkv[0].dtype)
    ranges = (*ranges, *[unused] * (4 - len(ranges)))
    return (*qkv, unused, *ranges, unused, unused)


def _forward(
    qkv: tuple[jax.Array, ...], static: dict[str, Any], *ranges: jax.Array
) -> tuple[jax.Array, jax.Array]:
    forward = fused._dot_product_attention_fwd_p
    output, statistics = forward.bind(*_operands(qkv, ranges), **static, is_training=True)
    return output, statistics


def _backward(
    qkv: tuple[jax.Array, ...],
    results: tuple[jax.Array, ...],
    static: dict[str, Any],
    *ranges: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients, from statistics, output and the gradient of the output."""
    backward = fused._dot_product_attention_bwd_p
    of_query, of_key, of_value = backward.bind(*_operands(qkv, ranges), *results, **static)
    return of_query, of_key, of_value
