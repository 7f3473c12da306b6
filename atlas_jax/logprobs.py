"""Cross entropy from hidden states, a chunk of positions at a time.

Logits of all positions, `[B, T, V]`, are never materialised, forward or backward. Logits of
positions that are not trained (prompts, padding) are not computed. The derivative of
`cross_entropy` is known up to a factor, so its gradients are computed in the forward pass. Rows
are split over `data` and `fsdp`, and the vocabulary over `tensor` and usually `fsdp`
(`vocab.OutputRows`). The gradient of the table is summed over devices once, after the last chunk.
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

from atlas_jax.models.vocab import DIMS, OutputRows
from atlas_jax.sharding import BATCH_AXES, Sharding, platform
from atlas_jax.types import Batch, LossSum

ROWS = PartitionSpec(BATCH_AXES)
Sums = tuple[jax.Array, ...]


class Head(NamedTuple):
    """Options of the output head, static in compiled programs."""

    sharding: Sharding
    """Placement of the table and of the rows."""
    chunk_size: int
    """Number of trained positions of a device whose logits are in memory at one time."""
    temperature: float = 1.0
    """Divisor of the logits."""
    with_entropy: bool = False
    """True to compute the entropy too, which is 0 otherwise."""
    trains_entropy: bool = False
    """True for an entropy with a gradient."""


class Labels(NamedTuple):
    """The target token of each position."""

    targets: Any  # [B, T] int32, token ids
    mask: Any  # [B, T] bool, true where the target is trained on


def next_tokens(values: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
    """Returns the values shifted by one position: entry t is `values[:, t + 1]`, the last one 0."""
    return jnp.pad(values[:, 1:], ((0, 0), (0, 1)))


def cross_entropy(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], batch: Batch, head: Head
) -> LossSum:
    """Returns the negative log-likelihood of the trained tokens in nats, and their number.

    Args:
        hidden: normed last hidden states; products are computed in their dtype.
        table: the output embedding, placed as between steps.
        batch: the batch of the hidden states.
        head: the options, with a temperature of 1.
    """
    labels = Labels(next_tokens(batch.tokens), next_tokens(batch.loss_mask))
    return -masked_sum(hidden, table, labels, head), jnp.sum(batch.loss_mask).astype(jnp.float32)


def each_chunk(
    mask: Bool[Array, "B T"], head: Head, chunk: Callable[[jax.Array, Sums], Sums], sums: Sums
) -> Sums:
    """Returns `sums` after `sums = chunk(positions, sums)` for each chunk of trained positions.

    `positions` index the flattened rows; a chunk that is not full is padded with `B * T`. All
    devices run the same number of chunks, because the loop contains collectives.
    """
    size = min(head.chunk_size, mask.size)
    max_chunks = -(-mask.size // size)
    # Trained positions come first, so the chunks after `count` are all padding and are skipped.
    positions = jnp.flatnonzero(mask, size=max_chunks * size, fill_value=mask.size).reshape(
        max_chunks, size
    )
    count = jax.lax.pmax(-(-jnp.sum(mask) // size), BATCH_AXES)

    def more(carry: tuple[jax.Array, Sums]) -> jax.Array:
        return (carry[0] < max_chunks) & (carry[0] < count)  # `plan/` reads the constant bound

    def step(carry: tuple[jax.Array, Sums]) -> tuple[jax.Array, Sums]:
        return carry[0] + 1, chunk(positions[carry[0]], carry[1])

    return jax.lax.while_loop(more, step, (jnp.int32(0), sums))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def masked_sum(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], labels: Labels, head: Head
) -> Float[Array, ""]:
    """Returns the sum of `log softmax(hidden @ table.T / temperature)` at the masked targets.

    Its gradients are those of a sum times a scalar, so the forward pass computes them without
    knowing the scalar, and the backward pass multiplies. Each chunk's logits are computed once.
    """
    return jnp.sum(logprobs_and_entropy(hidden, table, labels, head)[0])


def _masked_sum_fwd(
    hidden: jax.Array, table: jax.Array, labels: Labels, head: Head
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns the sum, and its gradients with respect to the hidden states and to the table."""
    stored = head.sharding.params(DIMS).spec
    split = head.sharding.optimizer(DIMS, memory=False).spec

    @functools.partial(
        jax.shard_map,
        mesh=head.sharding.mesh,
        in_specs=(ROWS, stored, ROWS, ROWS),
        out_specs=(PartitionSpec(), ROWS, split),
        check_vma=False,
    )
    def local(
        hidden: jax.Array, table: jax.Array, targets: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        rows = OutputRows.of(table, head.sharding, hidden)

        def chunk(at: jax.Array, sums: Sums) -> Sums:
            total, d_hidden, d_table = sums
            inputs = rows.gather(take(hidden, at)), rows.gather(take(targets, at))
            g = rows.gather(take(mask, at)).astype(jnp.float32)
            logits = scaled_logits(inputs[0], rows, head)
            log_partition, _ = partition(logits, rows, head)
            found = g * (_pick(logits, inputs[1], rows) - log_partition)
            d_h, more = chunk_gradients(logits, log_partition, (*inputs, g), rows, head)
            return total + jnp.sum(rows.own(found)), put(d_hidden, at, d_h), d_table + more

        # The table's gradient is a sum over all positions, so it is accumulated in float32; each
        # hidden state gets its gradient from one chunk only.
        start = jnp.float32(0), jnp.zeros_like(hidden), jnp.zeros(rows.table.shape, jnp.float32)
        total, d_hidden, d_table = each_chunk(mask, head, chunk, start)
        d_hidden = jax.lax.psum(d_hidden, "tensor")
        total = jax.lax.psum(total, BATCH_AXES)
        return total, d_hidden, rows.table_gradient(d_table, split, table)

    # The gradients are the residuals of the backward pass.
    total, *gradients = local(hidden, table, labels.targets, labels.mask)
    return total, tuple(gradients)


def _masked_sum_bwd(
    head: Head, gradients: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, Labels]:
    """Returns the gradients for `g`, the derivative with respect to the sum."""
    d_hidden, d_table = (g.astype(x.dtype) * x for x in gradients)
    none = np.zeros(d_hidden.shape[:2], jax.dtypes.float0)
    return d_hidden, d_table, Labels(none, none)


masked_sum.defvjp(_masked_sum_fwd, _masked_sum_bwd)


def logprobs_and_entropy(
    hidden: jax.Array, table: jax.Array, labels: Labels, head: Head
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns log-probabilities, entropy and the log-partition function, each `[B, T]`."""
    stored = head.sharding.params(DIMS).spec

    @functools.partial(
        jax.shard_map,
        mesh=head.sharding.mesh,
        in_specs=(ROWS, stored, ROWS, ROWS),
        out_specs=(ROWS,) * 3,
        check_vma=False,
    )
    def local(
        hidden: jax.Array, table: jax.Array, targets: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, ...]:
        rows = OutputRows.of(table, head.sharding, hidden)

        def chunk(at: jax.Array, results: Sums) -> Sums:
            logits = scaled_logits(rows.gather(take(hidden, at)), rows, head)
            log_partition, entropy = partition(logits, rows, head)
            logprobs = _pick(logits, rows.gather(take(targets, at)), rows) - log_partition
            found = logprobs, entropy, log_partition
            return tuple(put(x, at, rows.own(new)) for x, new in zip(results, found, strict=True))

        start = (jnp.zeros(targets.shape, jnp.float32),) * 3
        return each_chunk(mask, head, chunk, start)

    return local(hidden, table, labels.targets, labels.mask)


def chunk_gradients(
    logits: jax.Array,
    log_partition: jax.Array,
    inputs: tuple[jax.Array, jax.Array, jax.Array],
    rows: OutputRows,
    head: Head,
    entropy: tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of `g log softmax` at the targets, for own hidden states and `rows`.

    The derivative of `log softmax` at target y with respect to the logits is one-hot(y) - softmax.
    `inputs` are the hidden states, targets and `g` of the gathered positions. `entropy` is the
    entropy H of each with its own factor, where it is differentiated too. The derivative of
    H = -sum_v p_v log p_v with respect to the logit of v is -p_v (log p_v + H), because those of
    log p_v add up to 0 in the mean over p.
    """
    hidden, targets, g = inputs
    ids, found = rows.ids(targets)
    is_target = (jnp.arange(logits.shape[-1]) == ids[:, None]) & found[:, None]
    log_softmax = logits - log_partition[:, None]
    softmax = jnp.exp(log_softmax)
    d_logits = (is_target - softmax) * (g / head.temperature)[:, None]
    if entropy:
        value, factor = entropy
        d_logits -= softmax * (log_softmax + value[:, None]) * (factor / head.temperature)[:, None]
    d_logits = d_logits.astype(hidden.dtype)
    d_table = jnp.einsum("nv,nd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
    return rows.hidden_gradient(d_logits), d_table


def scaled_logits(hidden: jax.Array, rows: OutputRows, head: Head) -> jax.Array:
    """Returns the logits, divided by the temperature."""
    logits = rows.logits(hidden)
    return logits if head.temperature == 1.0 else logits / head.temperature


def partition(logits: jax.Array, rows: OutputRows, head: Head) -> tuple[jax.Array, jax.Array]:
    """Returns the log-partition function over the whole vocabulary, and the entropy or 0."""
    sums = sums_at_once if platform(head.sharding.mesh) == "gpu" else sums_in_turn
    own, *found = sums(logits, head.with_entropy)
    top = jax.lax.pmax(own, rows.axes)
    total, *weighted = (jax.lax.psum(x * jnp.exp(own - top), rows.axes) for x in found)
    log_partition = top + jnp.log(total)
    if not weighted:
        return log_partition, jnp.zeros_like(log_partition)
    return log_partition, log_partition - weighted[0] / total


def sums_in_turn(logits: Float[Array, "N W"], with_entropy: bool) -> Sums:
    """Returns each row's maximum and its sum of `exp(logit - maximum)`.

    For the entropy there is a third array, the sum of those terms times the logit.
    """
    top = jnp.max(logits, axis=-1)
    terms = jnp.exp(logits - top[:, None])
    sums = top, jnp.sum(terms, axis=-1)
    return (*sums, jnp.sum(terms * logits, axis=-1)) if with_entropy else sums


def sums_at_once(logits: Float[Array, "N W"], with_entropy: bool) -> Sums:
    """Returns the same as `sums_in_turn`, by one kernel of a GPU, which reads the logits once.

    Sums so far are scaled to the maximum so far. A CPU would do that number by number.
    """

    def merged(some: Sums, others: Sums) -> Sums:
        top = jnp.maximum(some[0], others[0])
        scales = jnp.exp(some[0] - top), jnp.exp(others[0] - top)
        both = zip(some[1:], others[1:], strict=True)
        return top, *(scales[0] * x + scales[1] * y for x, y in both)

    count = 3 if with_entropy else 2
    # The least finite number, because -inf less -inf is not a number.
    start = (np.finfo(np.float32).min, np.float32(0), np.float32(0))
    terms = (logits, jnp.ones_like(logits), logits)
    return tuple(jax.lax.reduce(terms[:count], start[:count], merged, (1,)))


def _pick(logits: jax.Array, targets: jax.Array, rows: OutputRows) -> jax.Array:
    """Returns the logit of each target, from the device that holds it."""
    ids, found = rows.ids(targets)
    picked = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    return jax.lax.psum(jnp.where(found, picked, 0), rows.axes)


def take(x: Shaped[Array, "B T ..."], at: Int[Array, " N"]) -> Shaped[Array, "N ..."]:
    """Returns the entries at positions of the flattened rows; 0 for positions past the end."""
    return x.reshape(-1, *x.shape[2:]).at[at].get(mode="fill", fill_value=0)


def put(
    x: Shaped[Array, "B T ..."], at: Int[Array, " N"], new: Shaped[Array, "N ..."]
) -> Shaped[Array, "B T ..."]:
    """Returns `x` with `new` at positions of the flattened rows, without those past the end."""
    return x.reshape(-1, *x.shape[2:]).at[at].set(new, mode="drop").reshape(x.shape)
