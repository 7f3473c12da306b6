"""Sampling of the next token: temperature, then min_p, top_k and top_p as one threshold.

Each of the three keeps the tokens whose probability is at least some value: a fraction of the
highest one (min_p), the k-th highest one (top_k), or the highest value at which the kept tokens'
sum reaches top_p (nucleus sampling, arXiv:1904.09751). The support is therefore `p >= threshold`,
and nothing is sorted. Tokens with exactly the threshold's probability are all kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

_BITS = 4
_PASSES = 8


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
    # Every pass over the vocabulary counts: a row's logits are read far more slowly than computed.
    scaled = logits / sampling.temperature
    top = jnp.max(scaled, axis=-1, keepdims=True)
    total = jnp.log(jnp.sum(jnp.exp(scaled - top), axis=-1, keepdims=True))

    def normed(logits: jax.Array) -> jax.Array:
        return (logits / sampling.temperature - top) - total

    probs = jnp.exp(normed(logits))
    if sampling.truncates:
        # The barrier keeps one set of numbers: computed again elsewhere, a probability could
        # differ in its last bit from the threshold that was taken from it.
        probs = jax.lax.optimization_barrier(probs)
        probs = jnp.where(probs >= _threshold(probs, sampling), probs, 0.0)
    blocks = _blocks(probs)
    of_block, of_token = _split(keys)
    block = _categorical(of_block, jnp.log(blocks))
    width = _width(logits)
    places = block[..., None] * width + jnp.arange(width)
    is_kept = jnp.take_along_axis(probs, places, axis=-1, mode="fill", fill_value=0.0) > 0
    inside = normed(jnp.take_along_axis(logits, places, axis=-1, mode="clip"))
    token = _categorical(of_token, jnp.where(is_kept, inside, -jnp.inf))
    tokens = (block * width + token).astype(jnp.int32)
    untruncated = normed(_at(logits, tokens)[..., None])[..., 0]
    mass = jnp.log(jnp.sum(blocks, axis=-1)) if sampling.truncates else 0.0
    return Drawn(tokens, untruncated - mass, untruncated)


# A token is drawn in two stages: a block of about sqrt(V) tokens, then a token of the block. That
# needs about 2 sqrt(V) random numbers instead of V.


def _width(values: jax.Array) -> int:
    """Returns the number of tokens in a block."""
    return math.isqrt(values.shape[-1] - 1) + 1


def _blocks(probs: Float[Array, "P G V"]) -> jax.Array:
    """Returns the probability of each block."""
    width = _width(probs)
    padded = jnp.pad(probs, [(0, 0), (0, 0), (0, -probs.shape[-1] % width)])
    return jnp.sum(padded.reshape(*probs.shape[:2], -1, width), axis=-1)


@jax.vmap
@jax.vmap
def _split(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    of_block, of_token = jax.random.split(jax.random.wrap_key_data(key))
    return of_block, of_token


_categorical = jax.vmap(jax.vmap(jax.random.categorical))


def _at(values: jax.Array, tokens: Int[Array, "P G"]) -> jax.Array:
    return jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]


def _threshold(probs: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the lowest probability that is kept, `[P, G, 1]`."""
    threshold = jnp.zeros((*probs.shape[:-1], 1), jnp.float32)
    if sampling.min_p > 0:
        threshold = jnp.max(probs, axis=-1, keepdims=True) * sampling.min_p
    if 0 < sampling.top_k < probs.shape[-1]:
        highest = jax.lax.top_k(probs, sampling.top_k)[0]
        threshold = jnp.maximum(threshold, highest[..., -1:])
    if sampling.top_p < 1:
        wanted: Any = sampling.top_p
        if sampling.min_p > 0 or sampling.top_k > 0:
            probs = jnp.where(probs >= threshold, probs, 0.0)
            wanted *= jnp.sum(probs, axis=-1, keepdims=True)
        threshold = jnp.maximum(threshold, _nucleus(probs, wanted))
    return threshold


def _nucleus(probs: jax.Array, wanted: Any) -> jax.Array:
    """Returns the highest value v at which the probabilities of at least v sum to `wanted`.

    Positive floats have the order of their bits, and those up to 1 have 30 of them, so a search
    over the bits finds v exactly. A pass over the vocabulary computes the sums at 15 values, which
    gives four bits.
    """
    largest = jnp.uint32((1 << 30) - 1)  # the bits of a number above 1
    digits = range(1, 1 << _BITS)

    def narrow(number: jax.Array, low: jax.Array) -> jax.Array:
        shift = (_PASSES - 1 - number).astype(jnp.uint32) * _BITS
        steps = [jnp.minimum(low + (jnp.uint32(digit) << shift), largest) for digit in digits]
        held = _sums_from(probs, steps)  # they fall, and reach `wanted` up to some digit
        reached = sum((x >= wanted).astype(jnp.uint32) for x in held)
        return low + (reached << shift)

    low = jax.lax.fori_loop(0, _PASSES, narrow, jnp.zeros((*probs.shape[:-1], 1), jnp.uint32))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _sums_from(probs: jax.Array, steps: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the sum of the probabilities of at least each value, given by its bits."""
    bounds = (jax.lax.bitcast_convert_type(bits, jnp.float32) for bits in steps)
    terms = tuple(jnp.where(probs >= bound, probs, 0.0) for bound in bounds)
    zeros = (jnp.float32(0),) * len(terms)

    def add(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    sums = jax.lax.reduce(terms, zeros, add, (probs.ndim - 1,))  # one pass for all
    return [x[..., None] for x in sums]
