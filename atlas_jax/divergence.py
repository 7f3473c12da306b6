"""Divergence of a policy from a teacher, from hidden states, a chunk at a time.

The teacher is a model here, or what a server says of its most probable tokens. No table of logits
`[B, T, V]` exists, of neither model, forward or backward, and none are computed for positions that
are not compared. See `logprobs` for chunks and placement.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from atlas_jax.logprobs import (
    ROWS,
    Head,
    Sums,
    each_chunk,
    partition,
    put,
    scaled_logits,
    take,
)
from atlas_jax.models.attention import MASKED
from atlas_jax.models.vocab import DIMS, OutputRows
from atlas_jax.sharding import BATCH_AXES
from atlas_jax.types import TopTokens

_Compared = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]]
"""`(positions, log q [N, W])` -> the divergence [N], its derivative by the scaled logits of q, and
the facts of `DivergenceFacts`, each [N]."""


class TeacherSide(NamedTuple):
    """The teacher's side of each position, where its model is here."""

    hidden: Any  # [B, T, E], its normed last hidden states at the policy's positions
    table: Any  # [V, E], its output embedding, of as many rows as the policy's


class DivergenceOptions(NamedTuple):
    """Options of the divergence, static in compiled programs."""

    head: Head
    beta: float
    """Share of the teacher in the mixture; 0 is the forward and 1 the reverse KL divergence."""
    num_tokens: int
    """Tokens that both models know, the first ones; the others have probability 0."""


class DivergenceFacts(NamedTuple):
    """Sums over the compared positions that no gradient goes through, [] float32."""

    policy_entropy: Any
    teacher_entropy: Any
    agreement: Any
    """Number of positions at which both models hold the same token for the most probable."""


def fitted(table: Float[Array, "U E"], height: int) -> Float[Array, "V E"]:
    """Returns a table of `height` rows: without its last ones, or with rows of 0 after them.

    Models of one tokenizer may pad their tables differently.
    """
    if table.shape[0] >= height:
        return table[:height]
    return jnp.pad(table, ((0, height - table.shape[0]), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def masked_divergence(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    teacher: TeacherSide | TopTokens,
    mask: Bool[Array, "B T"],
    options: DivergenceOptions,
) -> tuple[Float[Array, ""], DivergenceFacts]:
    """Returns the generalized Jensen-Shannon divergence in nats, summed over the masked positions.

    With the teacher's distribution p, the policy's q and the mixture m = beta p + (1 - beta) q, all
    at the temperature of the head, a position counts with

        beta KL(p || m) + (1 - beta) KL(q || m).

    For beta = 0 it is KL(p || q), the forward one, and for beta = 1 KL(q || p), the reverse one:
    the limits of the divergence over beta and over 1 - beta. Nothing is multiplied by the square
    of the temperature.

    The gradient goes to the policy alone. By the policy's probability of token v, where the terms
    of the mixture's own change cancel, the derivative is

        (1 - beta) log(q_v / m_v),         for beta = 1: log(q_v / p_v) + 1,

    and by the logits z = temperature x log q + constant, where a softmax takes the mean away,

        (1 - beta) q_v (log(q_v / m_v) - KL(q || m)) / temperature,
        for beta = 1: q_v (log(q_v / p_v) - KL(q || p)) / temperature,
        for beta = 0: (q_v - p_v) / temperature.

    It is known up to the factor of the sum, so the forward pass computes it, and the backward pass
    multiplies. Each chunk's logits are computed once.

    Of `TopTokens` the divergence is that of the distributions over K + 1 groups, see `_by_groups`.

    Args:
        hidden: normed last hidden states of the policy; products are computed in their dtype.
        table: the policy's output embedding, placed as between steps.
        teacher: the other side, in the same positions: a model with a table placed alike, or its
            most probable tokens, which are taken at the temperature that they have.
        mask: true at the positions whose next token's distributions are compared.
        options: the divergence.

    Reference:
        Agarwal et al. 2024, arXiv:2306.13649, eq. 1.
    """
    return _compute(hidden, table, teacher, mask, options, with_gradients=False)[0]


def _forward(
    hidden: jax.Array,
    table: jax.Array,
    teacher: TeacherSide | TopTokens,
    mask: jax.Array,
    options: DivergenceOptions,
) -> tuple[tuple[jax.Array, DivergenceFacts], tuple[jax.Array, ...]]:
    """Returns the sums, and the gradients of the first for the backward pass."""
    return _compute(hidden, table, teacher, mask, options, with_gradients=True)


def _backward(
    options: DivergenceOptions,
    gradients: tuple[jax.Array, jax.Array],
    g: tuple[jax.Array, DivergenceFacts],
) -> tuple[Any, ...]:
    """Returns the gradients for the derivative with respect to the divergence."""
    d_hidden, d_table = (g[0].astype(x.dtype) * x for x in gradients)
    return d_hidden, d_table, None, None


masked_divergence.defvjp(_forward, _backward)


def _compute(
    hidden: jax.Array,
    table: jax.Array,
    teacher: TeacherSide | TopTokens,
    mask: jax.Array,
    options: DivergenceOptions,
    with_gradients: bool,
) -> tuple[tuple[jax.Array, DivergenceFacts], tuple[jax.Array, ...]]:
    """Returns the sums, and the gradients of the divergence or nothing."""
    sharding = options.head.sharding
    stored = sharding.params(DIMS).spec
    split = sharding.optimizer(DIMS, memory=False).spec
    whole = PartitionSpec()
    sides = TopTokens(ROWS, ROWS) if isinstance(teacher, TopTokens) else TeacherSide(ROWS, stored)

    @functools.partial(
        jax.shard_map,
        mesh=sharding.mesh,
        in_specs=(ROWS, stored, sides, ROWS),
        out_specs=((whole,) * 4, (ROWS, split) if with_gradients else ()),
        check_vma=False,
    )
    def local(
        hidden: jax.Array, table: jax.Array, teacher: TeacherSide | TopTokens, mask: jax.Array
    ) -> tuple[Sums, Sums]:
        rows = OutputRows.of(table, sharding, hidden)
        if isinstance(teacher, TopTokens):
            compared = _by_groups(teacher, rows, options.beta)
        else:
            compared = _by_tokens(teacher, rows, options)

        def chunk(at: jax.Array, sums: Sums) -> Sums:
            states = rows.gather(take(hidden, at))
            g = rows.gather(take(mask, at)).astype(jnp.float32)
            value, slope, facts = compared(at, _log_softmax(states, rows, options))
            found = value, *facts
            totals = [s + jnp.sum(rows.own(g * x)) for s, x in zip(sums[:4], found, strict=True)]
            if not with_gradients:
                return tuple(totals)
            d_logits = (slope * (g / options.head.temperature)[:, None]).astype(hidden.dtype)
            d_hidden = put(sums[4], at, rows.hidden_gradient(d_logits))
            more = jnp.einsum("nv,nd->vd", d_logits, states, preferred_element_type=jnp.float32)
            return *totals, d_hidden, sums[5] + more

        start: Sums = (jnp.float32(0),) * 4
        if with_gradients:
            start += jnp.zeros_like(hidden), jnp.zeros(rows.table.shape, jnp.float32)
        sums = each_chunk(mask, options.head, chunk, start)
        totals = tuple(jax.lax.psum(s, BATCH_AXES) for s in sums[:4])
        if not with_gradients:
            return totals, ()
        # Each device has seen its part of the vocabulary only.
        d_hidden = jax.lax.psum(sums[4], "tensor")
        return totals, (d_hidden, rows.table_gradient(sums[5], split, table))

    (total, *facts), gradients = local(hidden, table, teacher, mask)
    return (total, DivergenceFacts(*facts)), gradients


def _by_tokens(teacher: TeacherSide, rows: OutputRows, options: DivergenceOptions) -> _Compared:
    """Returns the comparison with a model, token by token."""
    theirs = OutputRows.of(teacher.table, options.head.sharding, teacher.hidden)

    def compared(
        at: jax.Array, log_q: jax.Array
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        log_p = _log_softmax(rows.gather(take(teacher.hidden, at)), theirs, options)
        value, slope = _compare(log_q, log_p, options.beta, rows.axes)
        return value, slope, _facts(log_q, log_p, rows.axes)

    return compared


def _by_groups(teacher: TopTokens, rows: OutputRows, beta: float) -> _Compared:
    """Returns the comparison with a teacher's K most probable tokens, and all others as one.

    With the K tokens i and the tail r of all other tokens both distributions become

        P = (p_1, ..., p_K, 1 - sum_i p_i),        Q = (q_1, ..., q_K, sum_{v in r} q_v),

    whose divergence is at most that of p and q: an f-divergence never grows where outcomes are
    joined (the data-processing inequality). They are equal if p_v / q_v is the same for all tokens
    of the tail, or if it is empty. The derivative by the logit of a token v in group b is that by
    the logit of Q_b, times q_v / Q_b, the share of the token in its group.

    Reference:
        Csiszár 1967, Studia Sci. Math. Hungar. 2, 299-318, on the inequality.
    """

    def compared(
        at: jax.Array, log_q: jax.Array
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        ids, log_p = (rows.gather(take(x, at)) for x in teacher)
        places, here = rows.ids(ids)
        picked = jnp.where(here, jnp.take_along_axis(log_q, places, axis=-1), 0)
        anywhere = jax.lax.psum(here.astype(jnp.int32), rows.axes) > 0
        own = jnp.where(anywhere, jax.lax.psum(picked, rows.axes), MASKED)
        # A scatter drops what lies beyond the end, which are the tokens of other devices.
        width = log_q.shape[-1]
        put_at = jnp.arange(len(ids))[:, None], jnp.where(here, places, width)
        others = log_q.at[put_at].set(MASKED, mode="drop")
        top = jax.lax.pmax(jnp.max(others, axis=-1), rows.axes)
        tail = top + jnp.log(_total(jnp.exp(others - top[:, None]), rows.axes))
        # Where the policy has no other token, the teacher's tail is what its sum was rounded by.
        log_p = log_p.at[:, -1].set(jnp.where(tail > MASKED / 2, log_p[:, -1], MASKED))
        groups = jnp.concatenate([own, tail[:, None]], axis=-1)
        value, slope = _compare(groups, log_p, beta, ())
        d_logits = slope[:, -1:] * jnp.exp(others - tail[:, None])
        d_logits = d_logits.at[put_at].set(slope[:, :-1], mode="drop")
        best = jax.lax.pmax(jnp.max(log_q, axis=-1), rows.axes)
        facts = (
            -_total(jnp.exp(log_q) * log_q, rows.axes),
            -_total(jnp.exp(log_p) * log_p, ()),
            (own[:, 0] == best).astype(jnp.float32),
        )
        return value, d_logits, facts

    return compared


def _log_softmax(hidden: jax.Array, rows: OutputRows, options: DivergenceOptions) -> jax.Array:
    """Returns the log-probabilities of the tokens of `rows`, [N, W]."""
    logits = scaled_logits(hidden, rows, options.head)
    ids = rows.first + jnp.arange(logits.shape[-1])
    logits = jnp.where(ids < options.num_tokens, logits, MASKED)
    return logits - partition(logits, rows, options.head)[0][:, None]


def _compare(
    log_q: jax.Array, log_p: jax.Array, beta: float, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """Returns the divergence [N], and its derivative by the scaled logits of q [N, W]."""
    p = jnp.exp(log_p)
    q = jnp.exp(log_q)
    if beta == 0:
        return _total(p * (log_p - log_q), axes), q - p
    if beta == 1:
        value = _total(q * (log_q - log_p), axes)
        return value, q * (log_q - log_p - value[:, None])
    log_m = jnp.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    kl = _total(q * (log_q - log_m), axes)
    value = beta * _total(p * (log_p - log_m), axes) + (1 - beta) * kl
    return value, (1 - beta) * q * (log_q - log_m - kl[:, None])


def _facts(log_q: jax.Array, log_p: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """Returns the entropies of q and of p, and 1 where their most probable tokens are the same."""
    entropies = [-_total(jnp.exp(x) * x, axes) for x in (log_q, log_p)]
    best_q, best_p = (jax.lax.pmax(jnp.max(x, axis=-1), axes) for x in (log_q, log_p))
    of_best = jnp.max(jnp.where(log_p == best_p[:, None], log_q, MASKED), axis=-1)
    agrees = jax.lax.pmax(of_best, axes) == best_q
    return *entropies, agrees.astype(jnp.float32)


def _total(values: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the sums over the vocabulary, which the devices of `axes` share."""
    total = jnp.sum(values, axis=-1)
    return jax.lax.psum(total, axes) if axes else total
