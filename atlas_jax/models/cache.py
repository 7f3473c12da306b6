"""Decoding with a key/value cache in which all rows of a group share their prompt's entries.

Rows form a grid `[P, G]`: G continuations of each of P prompts. A prompt is run and stored once,
whatever G is. All rows sample in lockstep, and what they write at step `time` is entry `time % C`
of every row's cache. The rows of a prompt may begin at any step, `begins[p]`: at step `time` they
are at position `lengths[p] + time - begins[p]`, and no entry from before belongs to them.

Layers are unrolled, and each layer's weights and cache are arrays of their own. A scan would copy
every layer's slice of them for every token, which is most of what a token reads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from atlas_jax.models.attention import MASKED
from atlas_jax.models.layers import KeysValues
from atlas_jax.models.transformer import Decoder
from atlas_jax.sharding import BATCH_AXES, Sharding
from atlas_jax.types import Params


class KVCache(NamedTuple):
    """Keys and values, a list with an entry for each layer."""

    prompt: list[KeysValues]  # [P, K, S, H], right-padded
    own: list[KeysValues]  # [P * G, K, C, H], of the completion's tokens
    lengths: jax.Array  # [P] int32, tokens of each prompt
    begins: jax.Array  # [P] int32, step of the first token of each prompt's rows


def capacity(cache: KVCache) -> int:
    """Returns C, the number of a completion's tokens that fit into the cache."""
    return cache.own[0].keys.shape[2]


def placements(sharding: Sharding) -> KVCache:
    """Returns the placement of a cache: rows over the batch axes, heads over `tensor`."""
    heads = NamedSharding(sharding.mesh, PartitionSpec(BATCH_AXES, "tensor"))
    rows = sharding.rows()
    # The first two are prefixes of their trees.
    return KVCache(prompt=heads, own=heads, lengths=rows, begins=rows)  # type: ignore[arg-type]


def resident(decoder: Decoder) -> Decoder:
    """Returns the decoder of the weights that `weights` gives.

    They are in the compute dtype, whole on every device but for the axis `tensor`, and have the
    factors of LoRA added to them.
    """
    sharding = dataclasses.replace(decoder.sharding, mode="replicated", offload="none")
    return dataclasses.replace(
        decoder, sharding=sharding, param_dtype=decoder.compute_dtype, lora=None
    )


def weights(decoder: Decoder, params: Params) -> Params:
    """Returns the parameters as `decode` reads them: cast, gathered, and `layers` as a list.

    A device needs the space for it beside the parameters. Tables that are already as wanted are not
    copied.

    Args:
        decoder: the decoder of the parameters.
        params: the parameters, placed as between steps.
    """
    layers = [_layer(decoder, params["layers"], i) for i in range(decoder.config.num_layers)]
    places = resident(decoder).placements()
    rest = {name: place for name, place in places.items() if name != "layers"}
    cast = {name: _placed(params[name], decoder.compute_dtype, rest[name]) for name in rest}
    # The final norm computes in float32, from the scale as it is.
    return cast | {"layers": layers, "norm": params["norm"]}


def weight_shapes(decoder: Decoder) -> Params:
    """Returns shapes, dtypes and places of what `weights` gives."""
    here = resident(decoder)
    places = here.placements()
    shapes = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), here.shapes, places
    )
    layer = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype, sharding=_unstacked(s.sharding)),
        shapes["layers"],
    )
    norm = jax.ShapeDtypeStruct(shapes["norm"].shape, decoder.param_dtype, sharding=places["norm"])
    return shapes | {"layers": [layer] * decoder.config.num_layers, "norm": norm}


def _unstacked(place: NamedSharding) -> NamedSharding:
    """Returns the placement of one layer of an array that is placed so."""
    return NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))


@functools.partial(jax.jit, static_argnums=0)
def _layer(decoder: Decoder, stacked: Params, number: jax.Array) -> Params:
    """Returns one layer's weights."""
    layer = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), stacked)
    if decoder.lora is not None:
        from atlas_jax.models import lora

        layer = lora.merged(layer, decoder.lora)

    def one(x: jax.Array, place: NamedSharding) -> jax.Array:
        return jax.lax.with_sharding_constraint(x.astype(decoder.compute_dtype), _unstacked(place))

    return jax.tree.map(one, layer, resident(decoder).placements()["layers"])


def _placed(x: jax.Array, dtype: jnp.dtype, place: NamedSharding) -> jax.Array:
    if x.dtype == dtype and x.sharding.is_equivalent_to(place, x.ndim):
        return x
    return _cast(x, dtype, place)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cast(x: jax.Array, dtype: jnp.dtype, place: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x.astype(dtype), place)


def prefill(
    decoder: Decoder,
    params: Params,
    tokens: Int[Array, "P S"],
    lengths: Int[Array, " P"],
    places: int,
) -> tuple[Float[Array, "P D"], list[KeysValues]]:
    """Runs right-padded prompts through the decoder, with parameters as between steps.

    Returns:
        The hidden state at each prompt's last token, and the prompts' keys and values, padded to so
        many places.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    angles = decoder.angles(positions)

    def attend(window: int, *qkv: jax.Array) -> jax.Array:
        return decoder.attention(
            *qkv, segment_ids, None, scale=decoder.config.score_scale, window=window
        )

    x, stacked = jax.lax.scan(
        lambda x, layer: decoder.layer(layer, x, angles, attend),
        decoder.embed(params, tokens),
        decoder.stacked(params),
    )
    more = places - tokens.shape[1]

    def one(number: int, x: jax.Array) -> jax.Array:
        return jnp.pad(jnp.swapaxes(x[number], 1, 2), [(0, 0), (0, 0), (0, more), (0, 0)])

    layers = range(decoder.config.num_layers)
    cached = [jax.tree.map(functools.partial(one, i), stacked) for i in layers]
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return decoder.norm(params, last)[:, 0], cached


def begun(
    prompt: list[KeysValues], lengths: Int[Array, " P"], samples: int, places: int
) -> KVCache:
    """Returns the cache of `samples` completions of each prompt, with empty `places` for each."""

    def empty(x: jax.Array) -> jax.Array:
        return jnp.zeros((x.shape[0] * samples, x.shape[1], places, x.shape[3]), x.dtype)

    own = jax.tree.map(empty, prompt)
    return KVCache(prompt=prompt, own=own, lengths=lengths, begins=jnp.zeros_like(lengths))


def replaced_prompts(
    cache: KVCache,
    prompt: list[KeysValues],
    lengths: Int[Array, " N"],
    places: Int[Array, " N"],
    begin: Int[Array, ""],
    sharding: Sharding,
) -> KVCache:
    """Returns the cache with other prompts, whose rows begin with step `begin`, in some places.

    Args:
        cache: the cache.
        prompt: the prompts' keys and values.
        lengths: the prompts' lengths.
        places: the place of each prompt among those of its device; prompts without one are left
            out.
        begin: the step.
        sharding: the placement of the cache.
    """
    put = functools.partial(put_rows, sharding, places)
    return cache._replace(
        prompt=jax.tree.map(put, cache.prompt, prompt),
        lengths=put(cache.lengths, lengths),
        begins=put(cache.begins, jnp.full_like(lengths, begin)),
    )


def put_rows(sharding: Sharding, places: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Writes rows of `new` over those of `old` at `places`, counted within each device's part."""

    # Within a part, by `vmap`, for the reason that `_taken` gives.
    def split(x: jax.Array) -> jax.Array:
        return x.reshape(sharding.num_replicas, -1, *x.shape[1:])

    put = jax.vmap(lambda old, i, new: old.at[i].set(new, mode="drop"))
    return put(split(old), split(places), split(new)).reshape(old.shape)


def grown(cache: KVCache, places: int, time: int) -> KVCache:
    """Returns the cache with a capacity of `places`; the arrays of `cache.own` are deleted.

    Args:
        cache: the cache.
        places: the capacity, larger than before.
        time: the number of steps whose entries have been written.
    """
    # An entry of the last C steps moves from its step modulo C to its step modulo `places`.
    ago = (time - 1 - np.arange(places)) % places
    held = ago < capacity(cache)
    source = np.where(held, (time - 1 - ago) % capacity(cache), -1).astype(np.int32)
    own = [_replaced(lambda layer: _moved(source, layer), layer) for layer in cache.own]
    return cache._replace(own=own)


def selected(
    cache: KVCache,
    taken: Int[Array, "Q W"],
    lengths: Int[Array, " Q"],
    begins: Int[Array, " Q"],
    sharding: Sharding,
) -> KVCache:
    """Returns the cache of some prompts and of some of their rows; that of the others is deleted.

    Args:
        cache: the cache, whose arrays are deleted.
        taken: for each prompt of the result its number among the prompts of the same device, and
            the numbers of its rows.
        lengths: the lengths of the prompts of the result.
        begins: the steps with which their rows begin.
        sharding: the placement of both.
    """
    take = functools.partial(_taken, sharding, taken)
    layers = [_replaced(take, layer) for layer in zip(cache.prompt, cache.own, strict=True)]
    prompt, own = (list(kind) for kind in zip(*layers, strict=True))
    return KVCache(prompt=prompt, own=own, lengths=lengths, begins=begins)


def _replaced(function: Callable[[Any], Any], layer: Any) -> Any:
    """Returns `function(layer)` and deletes the layer: two caches would not fit at once."""
    new = function(layer)
    jax.tree.map(lambda x: x.delete(), layer)
    return new


@jax.jit
def _moved(source: jax.Array, own: KeysValues) -> KeysValues:
    """Returns one layer's entries from `source`; where that is -1, zeros."""

    def one(x: jax.Array) -> jax.Array:
        return jnp.where((source >= 0)[:, None], jnp.take(x, source, axis=2), 0)

    return jax.tree.map(one, own)


@functools.partial(jax.jit, static_argnums=0)
def _taken(sharding: Sharding, taken: jax.Array, layer: Any) -> Any:
    """Returns one layer's cache, as `selected` does."""
    # Indexing within a part, by `vmap`, keeps every prompt on its device; a gather over the whole
    # grid would communicate.
    rows = taken[:, 1:]
    prompt, own = layer
    before = prompt.keys.shape[0]

    def of_rows(x: jax.Array) -> jax.Array:  # [P * G, ...]
        split = _of_prompts(sharding, taken, x.reshape(before, -1, *x.shape[1:]))
        return jax.vmap(lambda x, i: x[i])(split, rows).reshape(-1, *x.shape[1:])

    of_prompts = functools.partial(_of_prompts, sharding, taken)
    taken_layer = jax.tree.map(of_prompts, prompt), jax.tree.map(of_rows, own)
    return jax.lax.with_sharding_constraint(taken_layer, tuple(placements(sharding)[:2]))


def _of_prompts(sharding: Sharding, taken: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the entries `[Q, ...]` of the chosen prompts."""
    prompts = taken[:, 0].reshape(sharding.num_replicas, -1)
    split = x.reshape(sharding.num_replicas, -1, *x.shape[1:])
    return jax.vmap(lambda x, i: x[i])(split, prompts).reshape(-1, *x.shape[1:])


def decode(
    decoder: Decoder,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "P G"],
    time: Int[Array, ""],
) -> tuple[Float[Array, "P G D"], KVCache]:
    """Runs one token of each row: the one that was sampled at step `time`.

    Args:
        decoder: the decoder, see `resident`.
        params: its parameters, from `weights`.
        cache: the cache; its entries of the steps before `time` are filled.
        tokens: the token of each row.
        time: the number of the step, counted from 0.

    Returns:
        The hidden states at that token, and the cache with its keys and values as entry `time % C`.
    """
    ages = time - cache.begins
    positions = jnp.broadcast_to((cache.lengths + ages)[:, None], tokens.shape)
    angles = decoder.angles(positions)
    x = decoder.embed(params, tokens)
    filled: list[KeysValues] = []

    def attend(window: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        # The new entries are written before they are read: otherwise the cache before and after
        # would both be alive, and the write be a copy of all of it.
        at = len(filled)
        new = zip(cache.own[at], (key, value), strict=True)
        own = KeysValues(*(_put(held, x, time) for held, x in new))
        filled.append(own)
        return _attend(decoder, cache, time, (cache.prompt[at], own), window, query)

    for layer, kind in zip(params["layers"], decoder.kinds, strict=True):
        x, _ = decoder.layer((layer, kind), x, angles, attend)
    return decoder.norm(params, x), cache._replace(own=filled)


def _put(cache: jax.Array, new: jax.Array, time: jax.Array) -> jax.Array:
    """Writes `new [P, G, K, H]` as entry `time % C` of `cache [P * G, K, C, H]`."""
    entry = new.reshape(cache.shape[0], cache.shape[1], 1, cache.shape[3])
    return jax.lax.dynamic_update_slice(cache, entry, (0, 0, time % cache.shape[2], 0))


def _attend(
    decoder: Decoder,
    cache: KVCache,
    time: jax.Array,
    cached: tuple[KeysValues, KeysValues],
    window: int,
    query: jax.Array,
) -> jax.Array:
    """Attends to the prompt and to the row's own tokens up to the new one."""
    prompt, own = cached
    p, g, n, h = query.shape
    query = query.reshape(p, g, prompt.keys.shape[1], -1, h)
    of_rows = query.reshape(p * g, *query.shape[2:])
    # Two blocks of scores and one softmax over both: concatenating the keys instead would copy the
    # prompt's cache once for each of the G rows.
    wide = {"preferred_element_type": jnp.float32}
    before = jnp.einsum("pgkrh,pksh->pkgrs", query, prompt.keys, **wide)
    since = jnp.einsum("nkrh,nkch->nkrc", of_rows, own.keys, **wide)
    since = since.reshape(p, g, *since.shape[1:])
    place = jnp.arange(before.shape[-1])
    ago = (time - jnp.arange(since.shape[-1])) % since.shape[-1]  # steps since an entry was written
    lengths = cache.lengths[:, None]
    ages = (time - cache.begins)[:, None]
    in_prompt = place < lengths  # [P, S]
    in_own = ago <= ages  # [P, C]
    if window:
        in_prompt &= lengths + ages - place < window
        in_own &= ago < window
    scale = decoder.config.score_scale
    before = jnp.where(in_prompt[:, None, None, None], before * scale, MASKED)
    since = jnp.where(in_own[:, None, None, None], since * scale, MASKED)
    top = jnp.maximum(jnp.max(before, -1, keepdims=True), _swap(jnp.max(since, -1, keepdims=True)))
    before = jnp.exp(before - top)
    since = jnp.exp(since - _swap(top))
    total = _swap(jnp.sum(before, -1, keepdims=True)) + jnp.sum(since, -1, keepdims=True)
    dtype = query.dtype
    out = jnp.einsum("pkgrs,pksh->pgkrh", before.astype(dtype), prompt.values, **wide)
    since = since.astype(dtype).reshape(p * g, *since.shape[2:])
    out += jnp.einsum("nkrc,nkch->nkrh", since, own.values, **wide).reshape(out.shape)
    return (out / total).astype(dtype).reshape(p, g, n, h)


def _swap(x: jax.Array) -> jax.Array:
    """Exchanges the dims K and G."""
    return jnp.swapaxes(x, 1, 2)
