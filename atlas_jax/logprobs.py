"""Cross entropy and token log-probabilities from hidden states, a chunk of positions at a time.

Logits of all positions, `[B, T, V]`, never exist, forward or backward. `cross_entropy` knows the
derivative of its sum up to a factor, and so finds the gradients in the same pass over the logits;
`token_logprobs` computes each chunk's logits again in the backward pass. The vocabulary may be
split over `tensor`, and rows are split over `data` and `fsdp`; the gradient of the table is summed
over devices once, behind the last chunk.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from atlas_jax.losses import LossSum
from atlas_jax.models.vocab import DIMS, local_ids
from atlas_jax.sharding import BATCH_AXES, Sharding, all_gather, sum_over_rows
from atlas_jax.types import Batch, PolicyBatch

_ROWS = PartitionSpec(BATCH_AXES)


class Head(NamedTuple):
    """How log-probabilities are computed; static in compiled programs."""

    sharding: Sharding
    """Of the table and of the rows."""
    chunk_size: int
    """Positions of a row whose logits exist at one time."""
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
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    batch: PolicyBatch,
    head: Head,
    max_sampled: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns the log-probability of every sampled token given its prompt and completion so far.

    Entry t belongs to `tokens[:, t]`; the entropy is of the distribution that it was drawn from,
    and is not differentiated. Entries outside `loss_mask` have no meaning. Logits are computed
    behind the prompts only.

    Args:
        hidden: normed last hidden states.
        table: the output embedding as it rests between steps.
        batch: of the hidden states; a row's completions stand behind its prompt.
        head: how to compute.
        max_sampled: tokens that the completions of a row have together at most.
    """
    length = batch.tokens.shape[1]
    size = min(max_sampled, length)
    prompt = jnp.sum((batch.sequence_ids == 0) & (batch.segment_ids > 0), axis=1, keepdims=True)
    start = jnp.minimum(prompt, length - size)
    sampled = start + jnp.arange(size)  # [B, size]
    before = jnp.take_along_axis(_predecessors(batch.sequence_ids, prompt), sampled, axis=1)
    found = token_logprobs(
        jnp.take_along_axis(hidden, before[..., None], axis=1),
        table,
        jnp.take_along_axis(batch.tokens, sampled, axis=1),
        head,
    )
    back = jnp.clip(jnp.arange(length) - start, 0, size - 1)
    logprobs, entropy = (jnp.take_along_axis(x, back, axis=1) for x in found)
    return logprobs, entropy


def _predecessors(sequence_ids: Int[Array, "B T"], prompt: Int[Array, "B 1"]) -> Int[Array, "B T"]:
    """Returns where the token before each token stands: a completion continues its prompt."""
    begins = sequence_ids != jnp.pad(sequence_ids[:, :-1], ((0, 0), (1, 0)))
    here = jnp.arange(sequence_ids.shape[1])
    return jnp.maximum(jnp.where(begins, prompt, here) - 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def masked_sum(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], ahead: Ahead, head: Head
) -> Float[Array, ""]:
    """Returns the sum of `log softmax(hidden @ table.T / temperature)` at the masked targets."""
    logprobs, _ = token_logprobs(hidden, table, ahead.targets, head)
    return jnp.sum(jnp.where(ahead.mask, logprobs, 0.0))


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

        def chunk(sums: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]) -> Any:
            h, targets, mask = inputs
            logits = _logits(h, whole, head)
            log_partition = _logsumexp(logits)
            found = jnp.where(mask, _pick(logits, targets) - log_partition, 0.0)
            g = mask.astype(jnp.float32)
            d_hidden, d_table = _chunk_gradients(
                logits, log_partition, (h, targets, g), whole, head
            )
            return (sums[0] + jnp.sum(found), sums[1] + d_table), d_hidden

        start = jnp.float32(0), jnp.zeros(whole.shape, jnp.float32)
        chunks = tuple(_split(x, head.chunk_size) for x in (hidden, targets, mask))
        (total, d_table), d_hidden = jax.lax.scan(chunk, start, chunks)
        d_hidden = jax.lax.psum(_join(d_hidden, hidden.shape[1]), "tensor")
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
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    head: Head,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns `log softmax(hidden @ table.T / temperature)` at `targets`, and the entropy in nats.

    Both are float32; the entropy is not differentiated.

    Args:
        hidden: normed last hidden states; the product is computed in their dtype and summed in
            float32.
        table: the output embedding as it rests between steps.
        targets: token ids.
        head: how to compute.
    """
    return _run_forward(hidden, table, targets, head)[:2]


def _run_forward(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, head: Head
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns log-probabilities, entropy and the log-partition function, each `[B, T]`."""
    rest = head.sharding.params(DIMS).spec

    @functools.partial(
        jax.shard_map,
        mesh=head.sharding.mesh,
        in_specs=(_ROWS, rest, _ROWS),
        out_specs=(_ROWS,) * 3,
        check_vma=False,
    )
    def local(
        hidden: jax.Array, table: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        table = all_gather(table, rest, hidden.dtype)

        def chunk(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
            logits = _logits(inputs[0], table, head)
            log_partition = _logsumexp(logits)
            entropy = jnp.zeros_like(log_partition)
            if head.with_entropy:
                mean = jnp.sum(jnp.exp(logits - log_partition[..., None]) * logits, axis=-1)
                entropy = log_partition - jax.lax.psum(mean, "tensor")
            logprobs = _pick(logits, inputs[1]) - log_partition
            return None, jnp.stack([logprobs, entropy, log_partition])

        chunks = _split(hidden, head.chunk_size), _split(targets, head.chunk_size)
        results = jax.lax.scan(chunk, None, chunks)[1]  # [chunks, 3, B, T / chunks]
        logprobs, entropy, log_partition = (
            _join(results[:, i], targets.shape[1]) for i in range(3)
        )
        return logprobs, entropy, log_partition

    return local(hidden, table, targets)


def _forward(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, head: Head
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    logprobs, entropy, log_partition = _run_forward(hidden, table, targets, head)
    return (logprobs, entropy), (hidden, table, targets, log_partition)


def _backward(
    head: Head, residuals: tuple[jax.Array, ...], g: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    sharding = head.sharding
    rest, split = sharding.params(DIMS).spec, sharding.optimizer(DIMS, memory=False).spec
    hidden, table, targets, log_partition = residuals

    @functools.partial(
        jax.shard_map,
        mesh=sharding.mesh,
        in_specs=(_ROWS, rest, _ROWS, _ROWS, _ROWS),
        out_specs=(_ROWS, split),
        check_vma=False,
    )
    def local(hidden: jax.Array, table: jax.Array, *rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = all_gather(table, rest, hidden.dtype)

        def chunk(d_table: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            h, targets, log_partition, g = inputs
            logits = _logits(h, whole, head)
            d_hidden, more = _chunk_gradients(logits, log_partition, (h, targets, g), whole, head)
            return d_table + more, d_hidden

        start = jnp.zeros(whole.shape, jnp.float32)
        chunks = [_split(x, head.chunk_size) for x in (hidden, *rows)]
        d_table, d_hidden = jax.lax.scan(chunk, start, tuple(chunks))
        d_hidden = jax.lax.psum(_join(d_hidden, hidden.shape[1]), "tensor")
        return d_hidden, sum_over_rows(d_table, split).astype(table.dtype)

    d_hidden, d_table = local(hidden, table, targets, log_partition, g[0])
    return d_hidden, d_table, np.zeros(targets.shape, jax.dtypes.float0)


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
    is_target = (jnp.arange(table.shape[0]) == ids[..., None]) & found[..., None]
    softmax = jnp.exp(logits - log_partition[..., None])
    d_logits = (is_target - softmax) * (g / head.temperature)[..., None]
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = jnp.einsum("btv,vd->btd", d_logits, table)
    # In two dims, which spares XLA a transposed copy of what is summed over.
    rows = (x.reshape(-1, x.shape[-1]) for x in (d_logits, hidden))
    d_table = jnp.einsum("nv,nd->vd", *rows, preferred_element_type=jnp.float32)
    return d_hidden, d_table


def _logits(hidden: jax.Array, table: jax.Array, head: Head) -> jax.Array:
    logits = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
    return logits if head.temperature == 1.0 else logits / head.temperature


def _logsumexp(logits: jax.Array) -> jax.Array:
    """Over a vocabulary that is split over `tensor`."""
    top = jax.lax.pmax(jnp.max(logits, axis=-1), "tensor")
    total = jax.lax.psum(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1), "tensor")
    return top + jnp.log(total)


def _pick(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the logit of each target, from the device that holds it."""
    ids, found = local_ids(targets, logits.shape[-1])
    picked = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return jax.lax.psum(jnp.where(found, picked, 0), "tensor")


def _split(x: jax.Array, chunk_size: int) -> jax.Array:
    """Cuts `[B, T, ...]` into `[chunks, B, chunk, ...]`, the last chunk filled with zeros."""
    rows, length = x.shape[:2]
    chunks = -(-length // chunk_size)
    size = -(-length // chunks)
    x = jnp.pad(x, ((0, 0), (0, chunks * size - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(rows, chunks, size, *x.shape[2:]), 1, 0)


def _join(chunks: jax.Array, length: int) -> jax.Array:
    """Inverts `_split`."""
    rows = jnp.moveaxis(chunks, 0, 1)
    return rows.reshape(rows.shape[0], -1, *rows.shape[3:])[:, :length]
