"""Cross entropy and token log-probabilities from hidden states, a chunk of positions at a time.

Logits of all positions, `[B, T, V]`, never exist, forward or backward, and those of positions that
train nothing (prompts, padding) are not computed. `cross_entropy` knows the derivative of its sum
up to a factor, and so finds the gradients in the same pass over the logits; `token_logprobs`
computes each chunk's logits again in the backward pass. The vocabulary may be split over `tensor`,
and rows are split over `data` and `fsdp`; the gradient of the table is summed over devices once,
behind the last chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from atlas_jax.losses import LossSum
from atlas_jax.models.vocab import DIMS, local_ids
from atlas_jax.sharding import BATCH_AXES, Sharding, all_gather, sum_over_rows
from atlas_jax.types import Batch, PolicyBatch

_ROWS = PartitionSpec(BATCH_AXES)
_Sums = tuple[jax.Array, ...]


class Head(NamedTuple):
    """How log-probabilities are computed; static in compiled programs."""

    sharding: Sharding
    """Of the table and of the rows."""
    chunk_size: int
    """Trained positions of a device whose logits exist at one time."""
    temperature: float = 1.0
    """Logits are divided by it."""
    with_entropy: bool = False
    """Whether the entropy is computed too; else it is 0."""


class Ahead(NamedTuple):
    """What stands behind each position."""

    targets: Any  # [B, T] int32, token ids
    mask: Any  # [B, T] bool, true where the target is trained on


def next_tokens(values: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
    """Returns what stands one position later; behind the last one, 0 or false."""
    return jnp.pad(values[:, 1:], ((0, 0), (0, 1)))


def cross_entropy(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], batch: Batch, head: Head
) -> LossSum:
    """Returns the negative log-likelihood of the trained tokens in nats, and how many they are.

    Args:
        hidden: normed last hidden states; products are computed in their dtype.
        table: the output embedding as it rests between steps.
        batch: of the hidden states.
        head: how to compute; the temperature is 1.
    """
    ahead = Ahead(next_tokens(batch.tokens), next_tokens(batch.loss_mask))
    return -masked_sum(hidden, table, ahead, head), jnp.sum(batch.loss_mask).astype(jnp.float32)


def policy_logprobs(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], batch: PolicyBatch, head: Head
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns the log-probability of every trained token given its prompt and completion so far.

    Entry t belongs to `tokens[:, t]`; the entropy is of the distribution that it was drawn from,
    and is not differentiated. Entries outside `loss_mask` are 0.

    Args:
        hidden: normed last hidden states.
        table: the output embedding as it rests between steps.
        batch: of the hidden states; a row's completions stand behind its prompt.
        head: how to compute.
    """
    before = _predecessors(batch.sequence_ids, batch.segment_ids)
    hidden = jnp.take_along_axis(hidden, before[..., None], axis=1)
    return token_logprobs(hidden, table, Ahead(batch.tokens, batch.loss_mask), head)


def _predecessors(
    sequence_ids: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Int[Array, "B T"]:
    """Returns where the token before each token stands: a completion continues its prompt."""
    prompt = jnp.sum((sequence_ids == 0) & (segment_ids > 0), axis=1, keepdims=True)
    begins = sequence_ids != jnp.pad(sequence_ids[:, :-1], ((0, 0), (1, 0)))
    here = jnp.arange(sequence_ids.shape[1])
    return jnp.maximum(jnp.where(begins, prompt, here) - 1, 0)


def each_chunk(
    mask: Bool[Array, "B T"], head: Head, chunk: Callable[[jax.Array, _Sums], _Sums], sums: _Sums
) -> _Sums:
    """Returns `sums` after `sums = chunk(places, sums)` for each chunk of trained positions.

    `places` are in the flattened rows, `B * T` where a chunk is not full. All devices run as many
    chunks, as collectives in a loop are safe only in step.
    """
    size = min(head.chunk_size, mask.size)
    most = -(-mask.size // size)
    places = jnp.flatnonzero(mask, size=most * size, fill_value=mask.size).reshape(most, size)
    count = jax.lax.pmax(-(-jnp.sum(mask) // size), BATCH_AXES)

    def more(carry: tuple[jax.Array, _Sums]) -> jax.Array:
        return (carry[0] < most) & (carry[0] < count)  # `plan/` reads the bound `most` of the loop

    def step(carry: tuple[jax.Array, _Sums]) -> tuple[jax.Array, _Sums]:
        return carry[0] + 1, chunk(places[carry[0]], carry[1])

    return jax.lax.while_loop(more, step, (jnp.int32(0), sums))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def masked_sum(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], ahead: Ahead, head: Head
) -> Float[Array, ""]:
    """Returns the sum of `log softmax(hidden @ table.T / temperature)` at the masked targets."""
    return jnp.sum(token_logprobs(hidden, table, ahead, head)[0])


def _sum_forward(
    hidden: jax.Array, table: jax.Array, ahead: Ahead, head: Head
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns the sum, and its gradients by the hidden states and by the table."""
    rest = head.sharding.params(DIMS).spec
    split = head.sharding.optimizer(DIMS, memory=False).spec

    @functools.partial(
        jax.shard_map,
        mesh=head.sharding.mesh,
        in_specs=(_ROWS, rest, _ROWS, _ROWS),
        out_specs=(PartitionSpec(), _ROWS, split),
        check_vma=False,
    )
    def local(
        hidden: jax.Array, table: jax.Array, targets: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        whole = all_gather(table, rest, hidden.dtype)

        def chunk(at: jax.Array, sums: _Sums) -> _Sums:
            total, d_hidden, d_table = sums
            h = _take(hidden, at)
            ids = _take(targets, at)
            g = _take(mask, at).astype(jnp.float32)
            logits = _logits(h, whole, head)
            log_partition = _logsumexp(logits)
            found = g * (_pick(logits, ids) - log_partition)
            d_h, more = _chunk_gradients(logits, log_partition, (h, ids, g), whole, head)
            return total + jnp.sum(found), _put(d_hidden, at, d_h), d_table + more

        start = jnp.float32(0), jnp.zeros_like(hidden), jnp.zeros(whole.shape, jnp.float32)
        total, d_hidden, d_table = each_chunk(mask, head, chunk, start)
        d_hidden = jax.lax.psum(d_hidden, "tensor")
        total = jax.lax.psum(total, BATCH_AXES)
        return total, d_hidden, sum_over_rows(d_table, split).astype(table.dtype)

    total, *gradients = local(hidden, table, ahead.targets, ahead.mask)
    return total, tuple(gradients)


def _sum_backward(
    head: Head, gradients: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, Ahead]:
    d_hidden, d_table = (g.astype(x.dtype) * x for x in gradients)
    none = np.zeros(d_hidden.shape[:2], jax.dtypes.float0)
    return d_hidden, d_table, Ahead(none, none)


masked_sum.defvjp(_sum_forward, _sum_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_logprobs(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], ahead: Ahead, head: Head
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns `log softmax(hidden @ table.T / temperature)` at the masked targets, and the entropy.

    Both are float32, in nats, and 0 outside the mask; the entropy is not differentiated.

    Args:
        hidden: normed last hidden states; the product is computed in their dtype and summed in
            float32.
        table: the output embedding as it rests between steps.
        ahead: token ids, and which of them count.
        head: how to compute.
    """
    return _run_forward(hidden, table, ahead, head)[:2]


def _run_forward(
    hidden: jax.Array, table: jax.Array, ahead: Ahead, head: Head
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns log-probabilities, entropy and the log-partition function, each `[B, T]`."""
    rest = head.sharding.params(DIMS).spec

    @functools.partial(
        jax.shard_map,
        mesh=head.sharding.mesh,
        in_specs=(_ROWS, rest, _ROWS, _ROWS),
        out_specs=(_ROWS,) * 3,
        check_vma=False,
    )
    def local(
        hidden: jax.Array, table: jax.Array, targets: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, ...]:
        table = all_gather(table, rest, hidden.dtype)

        def chunk(at: jax.Array, results: _Sums) -> _Sums:
            logits = _logits(_take(hidden, at), table, head)
            log_partition = _logsumexp(logits)
            entropy = jnp.zeros_like(log_partition)
            if head.with_entropy:
                mean = jnp.sum(jnp.exp(logits - log_partition[:, None]) * logits, axis=-1)
                entropy = log_partition - jax.lax.psum(mean, "tensor")
            found = _pick(logits, _take(targets, at)) - log_partition, entropy, log_partition
            return tuple(_put(x, at, new) for x, new in zip(results, found, strict=True))

        start = (jnp.zeros(targets.shape, jnp.float32),) * 3
        return each_chunk(mask, head, chunk, start)

    return local(hidden, table, ahead.targets, ahead.mask)


def _forward(
    hidden: jax.Array, table: jax.Array, ahead: Ahead, head: Head
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    logprobs, entropy, log_partition = _run_forward(hidden, table, ahead, head)
    return (logprobs, entropy), (hidden, table, ahead, log_partition)


def _backward(
    head: Head, residuals: tuple[Any, ...], g: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, Ahead]:
    sharding = head.sharding
    rest = sharding.params(DIMS).spec
    split = sharding.optimizer(DIMS, memory=False).spec
    hidden, table, ahead, log_partition = residuals

    @functools.partial(
        jax.shard_map,
        mesh=sharding.mesh,
        in_specs=(_ROWS, rest, _ROWS, _ROWS, _ROWS),
        out_specs=(_ROWS, split),
        check_vma=False,
    )
    def local(
        hidden: jax.Array, table: jax.Array, ahead: Ahead, log_partition: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        whole = all_gather(table, rest, hidden.dtype)

        def chunk(at: jax.Array, sums: _Sums) -> _Sums:
            d_hidden, d_table = sums
            h = _take(hidden, at)
            inputs = h, _take(ahead.targets, at), _take(g, at)
            logits = _logits(h, whole, head)
            d_h, more = _chunk_gradients(logits, _take(log_partition, at), inputs, whole, head)
            return _put(d_hidden, at, d_h), d_table + more

        start = jnp.zeros_like(hidden), jnp.zeros(whole.shape, jnp.float32)
        d_hidden, d_table = each_chunk(ahead.mask, head, chunk, start)
        d_hidden = jax.lax.psum(d_hidden, "tensor")
        return d_hidden, sum_over_rows(d_table, split).astype(table.dtype)

    d_hidden, d_table = local(hidden, table, ahead, log_partition, g[0])
    none = np.zeros(d_hidden.shape[:2], jax.dtypes.float0)
    return d_hidden, d_table, Ahead(none, none)


token_logprobs.defvjp(_forward, _backward)


def _chunk_gradients(
    logits: jax.Array,
    log_partition: jax.Array,
    inputs: tuple[jax.Array, jax.Array, jax.Array],
    table: jax.Array,
    head: Head,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients by hidden states and table of `g log softmax` at the targets.

    The derivative of `log softmax` at target y by the logits is one-hot(y) - softmax.
    """
    hidden, targets, g = inputs
    ids, found = local_ids(targets, table.shape[0])
    is_target = (jnp.arange(table.shape[0]) == ids[:, None]) & found[:, None]
    softmax = jnp.exp(logits - log_partition[:, None])
    d_logits = (is_target - softmax) * (g / head.temperature)[:, None]
    d_logits = d_logits.astype(hidden.dtype)
    d_table = jnp.einsum("nv,nd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
    return d_logits @ table, d_table


def _logits(hidden: jax.Array, table: jax.Array, head: Head) -> jax.Array:
    logits = jnp.einsum("nd,vd->nv", hidden, table, preferred_element_type=jnp.float32)
    return logits if head.temperature == 1.0 else logits / head.temperature


def _logsumexp(logits: jax.Array) -> jax.Array:
    """Over a vocabulary that is split over `tensor`."""
    top = jax.lax.pmax(jnp.max(logits, axis=-1), "tensor")
    total = jax.lax.psum(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1), "tensor")
    return top + jnp.log(total)


def _pick(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the logit of each target, from the device that holds it."""
    ids, found = local_ids(targets, logits.shape[-1])
    picked = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    return jax.lax.psum(jnp.where(found, picked, 0), "tensor")


def _take(x: Shaped[Array, "B T ..."], at: Int[Array, " N"]) -> Shaped[Array, "N ..."]:
    """Returns the entries at positions of the flattened rows; zeros behind the last one."""
    return x.reshape(-1, *x.shape[2:]).at[at].get(mode="fill", fill_value=0)


def _put(
    x: Shaped[Array, "B T ..."], at: Int[Array, " N"], new: Shaped[Array, "N ..."]
) -> Shaped[Array, "B T ..."]:
    """Writes what `_take` reads."""
    return x.reshape(-1, *x.shape[2:]).at[at].set(new, mode="drop").reshape(x.shape)
