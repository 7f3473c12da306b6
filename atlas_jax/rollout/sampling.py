"""Drawing the next token: temperature, then min_p, top_k and top_p, all as one threshold.

Each of the three keeps the tokens whose probability is at least some value: a share of the highest
(min_p), the k-th highest (top_k), or the value at which what is kept first reaches top_p (nucleus
sampling, arXiv:1904.09751). So the support is `p >= threshold`, and nothing is sorted. Tokens of
exactly the threshold's probability are all kept.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


class Sampling(NamedTuple):
    """How tokens are drawn; static in compiled programs."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Share of the probability that is kept, taken from what top_k leaves; 1 keeps all."""
    top_k: int = 0
    """Tokens that are kept; 0 keeps all."""
    min_p: float = 0.0
    """Share of the highest probability below which a token is dropped."""

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


class Drawn(NamedTuple):
    """One token of each row."""

    tokens: jax.Array  # [P, G] int32
    logprobs: jax.Array  # [P, G] float32, under the distribution that was drawn from
    untruncated: jax.Array  # [P, G] float32, of softmax(logits / temperature)


def draw(logits: Float[Array, "P G V"], keys: UInt32[Array, "P G 2"], sampling: Sampling) -> Drawn:
    """Draws from each row's logits with the row's own random key."""
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logprobs = _at(jax.nn.log_softmax(logits), tokens)
        return Drawn(tokens, jnp.zeros_like(logprobs), logprobs)
    logprobs = jax.nn.log_softmax(logits / sampling.temperature)
    kept = logprobs
    if sampling.truncates:
        threshold = _threshold(jnp.exp(logprobs), sampling)
        kept = jnp.where(jnp.exp(logprobs) >= threshold, logprobs, -jnp.inf)
    tokens = jax.vmap(jax.vmap(_categorical))(keys, kept).astype(jnp.int32)
    untruncated = _at(logprobs, tokens)
    mass = jax.nn.logsumexp(kept, axis=-1) if sampling.truncates else 0.0
    return Drawn(tokens, untruncated - mass, untruncated)


def _categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Draws a block of the vocabulary, then a token of it: as many random numbers as its root."""
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
    """Returns the highest value v for which what is at least v holds `top_p` of the whole.

    Positive floats are ordered as their bits are, so bisection over the bits finds v exactly in
    as many passes as there are bits.
    """
    wanted = top_p * jnp.sum(probs, axis=-1, keepdims=True)

    def narrow(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # low holds enough, high does not
        middle = low + (high - low) // 2
        value = jax.lax.bitcast_convert_type(middle, jnp.float32)
        held = jnp.sum(jnp.where(probs >= value, probs, 0.0), axis=-1, keepdims=True)
        enough = held >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    zero = jnp.zeros(wanted.shape, jnp.int32)
    above = jax.lax.bitcast_convert_type(jnp.full(wanted.shape, 1.5, jnp.float32), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, narrow, (zero, above))
    return jax.lax.bitcast_convert_type(low, jnp.float32)
