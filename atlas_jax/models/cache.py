"""Decoding with a key/value cache in which all rows of a group share their prompt's entries.

Rows form a grid `[P, G]`: G continuations of each of P prompts. A prompt is run and stored once,
whatever G is. All rows sample in lockstep: after t tokens, row (p, g) is at position
`lengths[p] + t`, and the keys and values of its completion fill the first t entries of its cache.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atlas_jax.models.attention import MASKED
from atlas_jax.models.layers import KeysValues
from atlas_jax.models.transformer import Decoder
from atlas_jax.types import Params


class KVCache(NamedTuple):
    """Keys and values of every layer; scans run over the leading dim L of each array."""

    prompt: KeysValues  # [L, P, K, S, H], right-padded
    own: KeysValues  # [L, P, G, K, C, H], of the completion's tokens
    lengths: jax.Array  # [P] int32, tokens of each prompt


def prefill(
    decoder: Decoder, params: Params, tokens: Int[Array, "P S"], lengths: Int[Array, " P"]
) -> tuple[Float[Array, "P D"], KeysValues]:
    """Runs right-padded prompts through the decoder.

    Returns:
        The hidden state at each prompt's last token, and the prompts' keys and values.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    angles = decoder.angles(positions)

    def attend(window: int, *qkv: jax.Array) -> jax.Array:
        return decoder.attention(
            *qkv, segment_ids, None, scale=decoder.config.score_scale, window=window
        )

    x, cached = jax.lax.scan(
        lambda x, layer: decoder.layer(layer, x, angles, attend),
        decoder.embed(params, tokens),
        decoder.stacked(params),
    )
    cached = jax.tree.map(lambda x: jnp.swapaxes(x, 2, 3), cached)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return decoder.norm(params, last)[:, 0], cached


def decode(
    decoder: Decoder,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "P G"],
    time: Int[Array, ""],
) -> tuple[Float[Array, "P G D"], KVCache]:
    """Runs one token of each row: the one that was sampled at step `time`.

    Returns:
        The hidden states at that token, and the cache with its keys and values at entry `time`.
    """
    positions = jnp.broadcast_to(cache.lengths[:, None] + time, tokens.shape)
    angles = decoder.angles(positions)

    def step(x: jax.Array, scanned: tuple) -> tuple[jax.Array, KeysValues]:
        layer, prompt, completion_cache = scanned

        def attend(window: int, *qkv: jax.Array) -> jax.Array:
            return _attend(decoder, cache.lengths, time, prompt, completion_cache, window, qkv)

        return decoder.layer(layer, x, angles, attend)

    # The scan only reads the cache and returns the new entries, which are then written for all
    # layers at once. A cache carried through the scan would be copied in every layer.
    scanned = (decoder.stacked(params), cache.prompt, cache.own)
    x, new = jax.lax.scan(step, decoder.embed(params, tokens), scanned)
    completion_cache = jax.tree.map(lambda c, n: _put(c, n, time), cache.own, new)
    return decoder.norm(params, x), cache._replace(own=completion_cache)


def _put(cache: jax.Array, new: jax.Array, time: jax.Array) -> jax.Array:
    """Writes `new [L, P, G, K, H]` as entry `time` of `cache [L, P, G, K, C, H]`."""
    return jax.lax.dynamic_update_slice(cache, new[..., None, :], (0, 0, 0, 0, time, 0))


def _attend(
    decoder: Decoder,
    lengths: jax.Array,
    time: jax.Array,
    prompt: KeysValues,
    own: KeysValues,
    window: int,
    qkv: tuple[jax.Array, ...],
) -> jax.Array:
    """Attends to the prompt, to the row's own earlier tokens, and to the new token itself."""
    query, key, value = qkv
    p, g, n, h = query.shape
    # Three score blocks and one softmax over all of them: concatenating the keys instead would
    # copy the prompt's cache once for each of the G rows.
    query = query.reshape(p, g, key.shape[2], -1, h)
    wide = {"preferred_element_type": jnp.float32}
    scores = [
        jnp.einsum("pgkrh,pksh->pgkrs", query, prompt.keys, **wide),
        jnp.einsum("pgkrh,pgkch->pgkrc", query, own.keys, **wide),
        jnp.einsum("pgkrh,pgkh->pgkr", query, key, **wide)[..., None],
    ]
    scores = [x * decoder.config.score_scale for x in scores]
    length = prompt.keys.shape[2]
    held = own.keys.shape[3]
    place = jnp.arange(length)
    number = jnp.arange(held)
    in_prompt = place < lengths[:, None]  # [P, S]
    in_own = number < time
    if window:
        in_prompt &= lengths[:, None] + time - place < window
        in_own &= time - number < window
    scores[0] = jnp.where(in_prompt[:, None, None, None], scores[0], MASKED)
    scores[1] = jnp.where(in_own, scores[1], MASKED)
    weights = jax.nn.softmax(jnp.concatenate(scores, -1), axis=-1).astype(value.dtype)
    of_prompt, of_own, of_self = jnp.split(weights, (length, length + held), axis=-1)
    out = (
        jnp.einsum("pgkrs,pksh->pgkrh", of_prompt, prompt.values)
        + jnp.einsum("pgkrc,pgkch->pgkrh", of_own, own.values)
        + of_self * value[:, :, :, None]
    )
    return out.reshape(p, g, n, h)
