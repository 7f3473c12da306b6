"""Log-probabilities of completions from hidden states, whose gradients differ from token to token.

The backward pass computes each chunk's logits again; see `logprobs` for chunks and placement.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from atlas_jax.logprobs import (
    ROWS,
    Head,
    Labels,
    Sums,
    chunk_gradients,
    each_chunk,
    logprobs_and_entropy,
    put,
    scaled_logits,
    take,
)
from atlas_jax.models.vocab import DIMS, OutputRows
from atlas_jax.types import PolicyBatch


def policy_logprobs(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], batch: PolicyBatch, head: Head
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns the log-probability of every trained token given its prompt and completion so far.

    The second array is the entropy of the distribution from which each token was drawn, with a
    gradient if `head.trains_entropy` says so. Entry t of both belongs to `tokens[:, t]`. Entries
    outside `loss_mask` are 0.

    Args:
        hidden: normed last hidden states.
        table: the output embedding, placed as between steps.
        batch: the batch of the hidden states; a row's completions follow its prompt.
        head: the options.
    """
    # The first token of each completion is predicted by the end of the prompt that they share.
    before = _predecessors(batch.sequence_ids, batch.segment_ids)
    hidden = jnp.take_along_axis(hidden, before[..., None], axis=1)
    return token_logprobs(hidden, table, Labels(batch.tokens, batch.loss_mask), head)


def _predecessors(
    sequence_ids: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Int[Array, "B T"]:
    """Returns the index of each token's predecessor; a completion begins after the prompt."""
    prompt = jnp.sum((sequence_ids == 0) & (segment_ids > 0), axis=1, keepdims=True)
    begins = sequence_ids != jnp.pad(sequence_ids[:, :-1], ((0, 0), (1, 0)))
    here = jnp.arange(sequence_ids.shape[1])
    return jnp.maximum(jnp.where(begins, prompt, here) - 1, 0)


# By itself, JAX would keep the logits `[B, T, V]` for the backward pass; they are computed again in
# chunks instead.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_logprobs(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], labels: Labels, head: Head
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns `log softmax(hidden @ table.T / temperature)` at the masked targets, and the entropy.

    Both are float32, in nats, and 0 outside the mask. The entropy has a gradient if
    `head.trains_entropy` says so. The upstream gradient differs from token to token, so the
    backward pass computes the logits again.

    Args:
        hidden: normed last hidden states; the product is computed in their dtype and summed in
            float32.
        table: the output embedding, placed as between steps.
        labels: the target tokens, and the mask of those that count.
        head: the options.
    """
    return logprobs_and_entropy(hidden, table, labels, head)[:2]


def _token_logprobs_fwd(
    hidden: jax.Array, table: jax.Array, labels: Labels, head: Head
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    """Returns the outputs; residuals are the inputs, the log-partition function and the entropy."""
    logprobs, entropy, log_partition = logprobs_and_entropy(hidden, table, labels, head)
    return (logprobs, entropy), (hidden, table, labels, log_partition, entropy)


def _token_logprobs_bwd(
    head: Head, residuals: tuple[Any, ...], g: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, Labels]:
    """Returns the gradients for `g`, the derivatives with respect to the two outputs."""
    sharding = head.sharding
    stored = sharding.params(DIMS).spec
    split = sharding.optimizer(DIMS, memory=False).spec
    hidden, table, labels, log_partition, entropy = residuals
    of_entropy = (entropy, g[1]) if head.trains_entropy else ()

    @functools.partial(
        jax.shard_map,
        mesh=sharding.mesh,
        in_specs=(ROWS, stored, ROWS, ROWS, ROWS, ROWS),
        out_specs=(ROWS, split),
        check_vma=False,
    )
    def local(
        hidden: jax.Array,
        table: jax.Array,
        labels: Labels,
        log_partition: jax.Array,
        g: jax.Array,
        of_entropy: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, jax.Array]:
        rows = OutputRows.of(table, sharding, hidden)

        def chunk(at: jax.Array, sums: Sums) -> Sums:
            d_hidden, d_table = sums

            def gathered(x: jax.Array) -> jax.Array:
                return rows.gather(take(x, at))

            inputs = gathered(hidden), gathered(labels.targets), gathered(g)
            logits = scaled_logits(inputs[0], rows, head)
            known = gathered(log_partition)
            factors = tuple(map(gathered, of_entropy))
            d_h, more = chunk_gradients(logits, known, inputs, rows, head, factors)
            return put(d_hidden, at, d_h), d_table + more

        start = jnp.zeros_like(hidden), jnp.zeros(rows.table.shape, jnp.float32)
        d_hidden, d_table = each_chunk(labels.mask, head, chunk, start)
        # Each device has seen its part of the vocabulary only.
        d_hidden = jax.lax.psum(d_hidden, "tensor")
        return d_hidden, rows.table_gradient(d_table, split, table)

    d_hidden, d_table = local(hidden, table, labels, log_partition, g[0], of_entropy)
    # Labels are integers and booleans, whose cotangents have this dtype.
    none = np.zeros(d_hidden.shape[:2], jax.dtypes.float0)
    return d_hidden, d_table, Labels(none, none)


token_logprobs.defvjp(_token_logprobs_fwd, _token_logprobs_bwd)
