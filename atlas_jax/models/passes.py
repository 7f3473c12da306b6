"""Attention as passes over parts of the keys, merged by their log-sum-exp.

A pass is a flash attention kernel that sees some of the keys of each query. Over keys that passes
divide among themselves, the softmax of all of them follows from each pass's output and log-sum-exp:

    statistics = log(sum over passes of exp(statistics_p))
    output     = sum over passes of output_p * exp(statistics_p - statistics)

The backward pass of flash attention computes the weights again from the scores and the statistics,
`exp(score - statistics)`, and needs of all other keys only the sum of `output * gradient` of a
query. So the backward kernel of each pass is given the merged output and the merged statistics, and
gives its part of the exact gradients, which are added up. No array is `[T, T]`.

Reference: FlashAttention-2, arXiv:2307.08691, algorithm 2 and section 3.1.1 (statistics); ring
attention, arXiv:2310.01889, merges blocks of keys by the same formula.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

OUTPUT = "attention_out"
"""Name of the merged output among what a rematerialisation policy may keep."""

STATISTICS = "attention_stats"
"""Name of the merged log-sum-exp, `[B, N, T]` float32; with `OUTPUT` kept, no kernel runs twice."""

NOTHING = -1e30
"""Log-sum-exp of a query that sees nothing in a pass."""


@runtime_checkable
class FlashKernel(Protocol):
    """One flash attention kernel with its static settings; it is hashable."""

    def forward(
        self, query: jax.Array, key: jax.Array, value: jax.Array, rows: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the output `[B, T, N, H]` and the natural log-sum-exp `[B, N, T]` in float32."""

    def backward(
        self,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        rows: Any,
        output: jax.Array,
        statistics: jax.Array,
        gradient: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the gradients of query, key and value for this output and these statistics."""


class Pass(NamedTuple):
    """The arrays of one pass, of integers and booleans."""

    rows: Any
    """Whatever the kernel takes: segments, lengths, offsets."""
    sees: Bool[Array, "B T"] | None = None
    """Queries that see any key in this pass; None for all that are ever read."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    kernels: tuple[FlashKernel, ...],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    passes: tuple[Pass, ...],
) -> Float[Array, "B T N H"]:
    """Returns the attention of all passes together.

    Args:
        kernels: the kernel of each pass.
        query: queries.
        key: keys, of which no query sees one in two passes.
        value: values.
        passes: the arrays of each pass.
    """
    return _forward(kernels, query, key, value, passes)[0]


def _forward(
    kernels: tuple[FlashKernel, ...],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    passes: tuple[Pass, ...],
) -> tuple[jax.Array, tuple[Any, ...]]:
    parts = []
    for kernel, part in zip(kernels, passes, strict=True):
        output, statistics = kernel.forward(query, key, value, part.rows)
        if part.sees is not None:
            output = jnp.where(part.sees[..., None, None], output, 0)
            statistics = jnp.where(part.sees[:, None], statistics, NOTHING)
        parts.append((output, statistics))
    output, statistics = parts[0] if len(parts) == 1 else _merge(parts)
    output = checkpoint_name(output, OUTPUT)
    statistics = checkpoint_name(statistics, STATISTICS)
    return output, (query, key, value, passes, output, statistics)


def _merge(parts: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    statistics = functools.reduce(jnp.logaddexp, [s for _, s in parts])
    wide = [
        output.astype(jnp.float32) * jnp.swapaxes(jnp.exp(s - statistics), 1, 2)[..., None]
        for output, s in parts
    ]
    return functools.reduce(jnp.add, wide).astype(parts[0][0].dtype), statistics


def _backward(
    kernels: tuple[FlashKernel, ...], residuals: tuple[Any, ...], gradient: jax.Array
) -> tuple[Any, ...]:
    query, key, value, passes, output, statistics = residuals
    grads = []
    for kernel, part in zip(kernels, passes, strict=True):
        mine = gradient
        scale = statistics
        if part.sees is not None:
            # A query that sees nothing here has statistics of other keys, against which scores of
            # this pass may be infinite; infinite statistics make its weights 0.
            mine = jnp.where(part.sees[..., None, None], gradient, 0)
            scale = jnp.where(part.sees[:, None], statistics, -NOTHING)
        grads.append(kernel.backward((query, key, value), part.rows, output, scale, mine))
    return *jax.tree.map(lambda *parts: functools.reduce(jnp.add, parts), *grads), None


attend.defvjp(_forward, _backward)
