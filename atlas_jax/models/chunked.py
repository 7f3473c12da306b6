"""Flash attention in plain XLA operations: a scan over blocks of keys, for any device and dtype.

Scores exist for one block of keys at a time, `[B, N, T, block]`, in the backward pass too, which
computes them again from the log-sum-exp of the forward pass (`passes`). It skips no block, so it
does the arithmetic of a dense mask in the memory of a flash kernel.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from atlas_jax.models.attention import MASKED
from atlas_jax.models.segments import Ids

_NO_KEY = -3  # segment of keys that fill up the last block; no query has it


@dataclasses.dataclass(frozen=True)
class Chunked:
    """The kernel, see `passes.FlashKernel`; its rows are `Ids`.

    Attributes:
        scale: factor of the scores.
        causal: whether a query sees only keys up to its own place in the row.
        window: number of those that it sees at most; 0 for all.
        block: keys of a step of the scan.
    """

    scale: float
    causal: bool = True
    window: int = 0
    block: int = 512

    def forward(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        rows: Ids,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
        """Returns the output and the log-sum-exp of each query's scores."""
        groups = key.shape[2]
        grouped = _grouped(query, groups)

        def step(carry: Any, block: Any) -> tuple[Any, None]:
            highest, total, out = carry
            keys, values, start, ids = block
            scores = self._scores(grouped, keys, start, ids, rows)
            new = jnp.maximum(highest, scores.max(-1))
            weights = jnp.exp(scores - new[..., None])
            shrink = jnp.exp(highest - new)
            part = jnp.einsum(
                "bkqs,bksh->bkqh",
                weights.astype(values.dtype),
                values,
                preferred_element_type=jnp.float32,
            )
            return (new, total * shrink + weights.sum(-1), out * shrink[..., None] + part), None

        highest = jnp.full(grouped.shape[:-1], MASKED, jnp.float32)
        start = highest, jnp.zeros_like(highest), jnp.zeros(grouped.shape, jnp.float32)
        (highest, total, out), _ = jax.lax.scan(step, start, self._blocks(key, value, rows))
        statistics = (highest + jnp.log(total)).reshape(key.shape[0], query.shape[2], -1)
        return _ungrouped(out / total[..., None], query.shape).astype(query.dtype), statistics

    def backward(
        self,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        rows: Ids,
        output: Float[Array, "B T N H"],
        statistics: Float[Array, "B N T"],
        gradient: Float[Array, "B T N H"],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the gradients, see `passes.FlashKernel`; arXiv:2307.08691, algorithm 2."""
        query, key, value = qkv
        groups = key.shape[2]
        grouped = _grouped(query, groups)
        of_output = _grouped(gradient, groups)
        both = output.astype(jnp.float32) * gradient.astype(jnp.float32)
        mean = _grouped(both.sum(-1, keepdims=True), groups)
        statistics = statistics.reshape(*grouped.shape[:-1], 1)
        wide = {"preferred_element_type": jnp.float32}

        def step(of_query: jax.Array, block: tuple) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            keys, values, start, ids = block
            weights = jnp.exp(self._scores(grouped, keys, start, ids, rows) - statistics)
            of_weights = jnp.einsum("bkqh,bksh->bkqs", of_output, values, **wide)
            of_scores = (weights * (of_weights - mean) * self.scale).astype(keys.dtype)
            of_query += jnp.einsum("bkqs,bksh->bkqh", of_scores, keys, **wide)
            of_key = jnp.einsum("bkqs,bkqh->bksh", of_scores, grouped, **wide)
            of_value = jnp.einsum("bkqs,bkqh->bksh", weights.astype(keys.dtype), of_output, **wide)
            return of_query, (of_key.astype(key.dtype), of_value.astype(value.dtype))

        zeros = jnp.zeros(grouped.shape, jnp.float32)
        of_query, of_blocks = jax.lax.scan(step, zeros, self._blocks(key, value, rows))
        of_key, of_value = (_joined(x, key.shape[1]) for x in of_blocks)
        return _ungrouped(of_query, query.shape).astype(query.dtype), of_key, of_value

    def _blocks(self, key: jax.Array, value: jax.Array, rows: Ids) -> tuple[jax.Array, ...]:
        """Returns what the scan runs over: keys, values, first places and segments of blocks."""
        length = key.shape[1]
        count = -(-length // self.block)
        more = count * self.block - length

        def split(x: jax.Array) -> jax.Array:
            x = jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))
            return x.reshape(x.shape[0], count, self.block, *x.shape[2:]).transpose(1, 0, 3, 2, 4)

        sequence = rows.key if rows.sequence is None else rows.sequence
        ids = jnp.stack([rows.key, sequence])
        ids = jnp.pad(ids, ((0, 0), (0, 0), (0, more)), constant_values=_NO_KEY)
        ids = ids.reshape(2, -1, count, self.block).transpose(2, 0, 1, 3)
        return split(key), split(value), jnp.arange(count) * self.block, ids

    def _scores(
        self, grouped: jax.Array, keys: jax.Array, start: jax.Array, ids: jax.Array, rows: Ids
    ) -> jax.Array:
        """Returns the scores of a block `[B, K, R T, block]`, of R query heads for a key head."""
        scores = jnp.einsum("bkqh,bksh->bkqs", grouped, keys, preferred_element_type=jnp.float32)
        seen = self._seen(start, ids, rows)[:, None, None]
        shape = scores.shape
        scores = scores.reshape(*shape[:2], -1, *seen.shape[-2:]) * self.scale
        return jnp.where(seen, scores, MASKED).reshape(shape)

    def _seen(self, start: jax.Array, ids: jax.Array, rows: Ids) -> Bool[Array, "B T C"]:
        segment, sequence = ids[:, :, None]
        seen = rows.query[..., None] == segment
        if rows.sequence is not None:
            seen &= (sequence == 0) | (rows.sequence[..., None] == sequence)
        if self.causal:
            places = jnp.arange(rows.query.shape[1])[:, None]
            distance = places - start - jnp.arange(segment.shape[-1])
            seen &= (distance >= 0) & (distance < (self.window or places.size))
        return seen


def _grouped(x: Float[Array, "B T N H"], groups: int) -> Float[Array, "B K R H"]:
    """Returns heads first; the query heads that share a key head form one matrix."""
    rows, length, heads, size = x.shape
    x = x.reshape(rows, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)
    return x.reshape(rows, groups, -1, size)


def _ungrouped(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    rows, length, _, size = shape
    x = x.reshape(rows, x.shape[1], -1, length, size).transpose(0, 3, 1, 2, 4)
    return x.reshape(shape)


def _joined(x: jax.Array, length: int) -> jax.Array:
    """Returns blocks `[count, B, K, block, H]` as `[B, length, K, H]`."""
    x = x.transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
