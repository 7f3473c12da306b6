"""Sampling of the next token: temperature, then min_p, top_k and top_p as one threshold.

Each of the three keeps the tokens whose probability is at least some value: a fraction of the
highest one (min_p), the k-th highest one (top_k), or the highest value at which the kept tokens'
sum reaches top_p (nucleus sampling, arXiv:1904.09751). The support is therefore `p >= threshold`,
and nothing is sorted. Tokens with exactly the threshold's probability are all kept.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


class Sampling(NamedTuple):
    """Options of sampling, static in compiled programs."""

    temperature: float = 1.0
    """Divisor of the logits; 0 takes the most probable token."""
    top_p: float = 1.0
    """Fraction of the probability that is kept, of the tokens that top_k leaves; 1 keeps all."""
    top_k: int = 0
    """Number of tokens that are kept; 0 keeps all."""
    min_p: float = 0.0
    """Fraction of the highest probability below which a token is dropped."""

    @property
    def truncates(self) -> bool:
        """True if some tokens can never be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


class Drawn(NamedTuple):
    """One token of each row."""

    tokens: jax.Array  # [P, G] int32
    logprobs: jax.Array  # [P, G] float32, under the truncated distribution
    untruncated: jax.Array  # [P, G] float32, log-probabilities of softmax(logits / temperature)


def draw(logits: Float[Array, "P G V"], keys: UInt32[Array, "P G 2"], sampling: Sampling) -> Drawn:
    """Returns a token of each row, drawn from the row's logits with its own random key."""
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logprobs = _at(jax.nn.log_softmax(logits), tokens)
        return Drawn(tokens, jnp.zeros_like(logprobs), logprobs)
    logprobs = jax.nn.log_softmax(logits / sampling.temperature)
    kept_logprobs = logprobs
    if sampling.truncates:
        threshold = _threshold(jnp.exp(logprobs), sampling)
        kept_logprobs = jnp.where(jnp.exp(logprobs) >= threshold, logprobs, -jnp.inf)
    tokens = jax.vmap(jax.vmap(_categorical))(keys, kept_logprobs).astype(jnp.int32)
    untruncated = _at(logprobs, tokens)
    mass = jax.nn.logsumexp(kept_logprobs, axis=-1) if sampling.truncates else 0.0
    return Drawn(tokens, untruncated - mass, untruncated)


def _categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns tokens drawn in two stages: a block of about sqrt(V) tokens, then a token of it.

    That needs about 2 sqrt(V) random numbers instead of V.
    """
    of_block, of_token = jax.random.split(jax.random.wrap_key_data(key))
    width = math.isqrt(len(logits) - 1) + 1
    blocks = jnp.pad(logits, (0, -len(logits) % width), constant_values=-jnp.inf)
    blocks = blocks.reshape(-1, width)
    block = jax.random.categorical(of_block, jax.nn.logsumexp(blocks, axis=-1))
    return block * width + jax.random.categorical(of_token, blocks[block])


def _at(values: jax.Array, tokens: Int[Array, "P G"]) -> jax.Array:
    return jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]


def _threshold(probs: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the lowest probability that is kept, `[P, G, 1]`."""
    threshold = jnp.max(probs, axis=-1, keepdims=True) * sampling.min_p
    if 0 < sampling.top_k < probs.shape[-1]:
        highest = jax.lax.top_k(probs, sampling.top_k)[0]
        threshold = jnp.maximum(threshold, highest[..., -1:])
    if sampling.top_p < 1:
        probs = jnp.where(probs >= threshold, probs, 0.0)
        threshold = jnp.maximum(threshold, _nucleus(probs, sampling.top_p))
    return threshold


def _nucleus(probs: jax.Array, top_p: float) -> jax.Array:
    """Returns the highest value v at which the probabilities of at least v sum to `top_p`.

    Positive floats have the order of their bits, so a bisection over the bits finds v exactly, in
    one pass for each bit.
    """
    wanted = top_p * jnp.sum(probs, axis=-1, keepdims=True)

    def narrow(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # the sum reaches `top_p` at low, not at high
        middle = low + (high - low) // 2
        value = jax.lax.bitcast_convert_type(middle, jnp.float32)
        held = jnp.sum(jnp.where(probs >= value, probs, 0.0), axis=-1, keepdims=True)
        enough = held >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    zero = jnp.zeros(wanted.shape, jnp.int32)
    above = jax.lax.bitcast_convert_type(jnp.full(wanted.shape, 1.5, jnp.float32), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, narrow, (zero, above))
    return jax.lax.bitcast_convert_type(low, jnp.float32)
