"""Generation inside the training process, from the sharded training parameters.

Prompts are run once, then tokens are decoded in chunks. After a chunk, finished rows are dropped if
that at least halves the grid, so a long answer does not keep finished rows computing. Below a few
rows nothing is gained, because a step then takes the time of reading the weights. Lengths and
numbers of rows are rounded up (`bucket`), and each combination is compiled once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from atlas_jax import distributed, stopping
from atlas_jax.models import cache as kv
from atlas_jax.models import vocab
from atlas_jax.models.layers import KeysValues
from atlas_jax.models.transformer import Decoder
from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.sampling import Sampling, draw
from atlas_jax.sharding import BATCH_AXES, Sharding, from_global, place_rows
from atlas_jax.types import Completion, Params

CHUNK = 32
"""Number of tokens between two checks for finished rows."""
_SHORTEST = 32  # smallest bucket of prompt lengths
_FEW = 16  # rows of a device below which a smaller grid is not worth a compilation
_ROOM = 128  # largest number of tokens that the first cache of a row holds


class GridInputs(NamedTuple):
    """Inputs of a new grid, on the devices."""

    prompts: jax.Array  # [P, S] int32, right-padded
    lengths: jax.Array  # [P] int32
    limits: jax.Array  # [P, G] int32, tokens that a row may have
    keys: jax.Array  # [P, G, 2] uint32, root of each row's random numbers


class _Grid(NamedTuple):
    """Rows that are being decoded, `[P, G]`; arrays on the devices."""

    cache: kv.KVCache
    tokens: jax.Array  # [P, G] int32, sampled last and not yet in the cache
    alive: jax.Array  # [P, G] bool
    limits: jax.Array  # [P, G] int32, tokens that a row may have
    keys: jax.Array  # [P, G, 2] uint32, root of each row's random numbers
    time: jax.Array  # [] int32, the number of `tokens`, counted from 0


class _Chunk(NamedTuple):
    """Sampled tokens, `[P, G, C]`; entries after a row's end have no meaning."""

    tokens: jax.Array
    logprobs: jax.Array
    untruncated: jax.Array


@dataclasses.dataclass
class _RowState:
    """The completion of one row so far."""

    limit: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    untruncated: list[float] = dataclasses.field(default_factory=list)
    done: bool = False

    def extend(self, chunk: Sequence[np.ndarray], stop_ids: tuple[int, ...]) -> None:
        """Appends tokens until one stops the row."""
        for token, logprob, untruncated in zip(*chunk, strict=True):
            if self.done:
                return
            self.tokens.append(int(token))
            self.logprobs.append(float(logprob))
            self.untruncated.append(float(untruncated))
            self.done = int(token) in stop_ids or len(self.tokens) >= self.limit


_Places = list[list[_RowState]]
"""Rows of this process's part of the grid, by prompt."""


@dataclasses.dataclass(frozen=True)
class LocalEngine:
    """An engine that generates with a decoder in this process.

    Attributes:
        decoder: the decoder of the model.
        tokenizer: the tokenizer, for decoding.
        stop_ids: the tokens that end a text.
        max_rows: the number of rows of this process that are decoded at one time, though at least
            one prompt with its samples a device.
    """

    decoder: Decoder
    tokenizer: Any
    stop_ids: tuple[int, ...]
    max_rows: int = 256

    def generate(
        self, params: Params, version: int, requests: Sequence[Request], sampling: Sampling
    ) -> list[list[Completion]]:
        """Returns the completions of each request, in order.

        A row's text depends only on its prompt, its seed and the parameters. All processes must
        call it together, each with its own requests.

        Args:
            params: the parameters of the decoder, placed as between steps.
            version: the step of these parameters, for the completions' record.
            requests: the requests, all with the same `num_samples`.
            sampling: the options of sampling.

        Raises:
            ValueError: if a request is empty, asks for no tokens or for more than the model has
                positions, or the weights give log-probabilities that are not finite.
            StopRequestedError: in every process, within a chunk, if one of them was asked to stop.
        """
        for request in requests:
            self._check(request)
        samples = distributed.max_over_processes(max((r.num_samples for r in requests), default=1))
        size = self._prompts_at_once(samples)
        done: list[list[Completion]] = []
        for first in range(0, distributed.max_over_processes(len(requests)), size):
            part = requests[first : first + size]
            done += self._run(params, version, part, samples, sampling)
        return done

    def _prompts_at_once(self, samples: int) -> int:
        """Returns the number of prompts of the largest grid of at most `max_rows` rows."""
        parts = self.decoder.sharding.local_replicas
        share = self.max_rows // (samples * parts)
        return parts * (1 << max(share.bit_length() - 1, 0))

    def _check(self, request: Request) -> None:
        max_positions = self.decoder.config.max_positions
        if not request.prompt_ids:
            raise ValueError("a prompt has no tokens; give the model something to continue")
        if request.max_tokens < 1:
            raise ValueError(f"a request has max_tokens={request.max_tokens}; ask for 1 or more")
        if len(request.prompt_ids) + request.max_tokens > max_positions:
            raise ValueError(
                f"a prompt of {len(request.prompt_ids)} tokens and {request.max_tokens} new ones "
                f"do not fit the model's {max_positions} positions; lower max_prompt_length or the "
                "limit of new tokens"
            )

    def _run(
        self,
        params: Params,
        version: int,
        requests: Sequence[Request],
        samples: int,
        sampling: Sampling,
    ) -> list[list[Completion]]:
        """Returns the completions of one grid, which may have no requests of this process."""
        sharding = self.decoder.sharding
        groups = [[_RowState(r.max_tokens) for _ in range(samples)] for r in requests]
        places = _fill(groups, _prompts(len(groups), sharding), samples)
        static = self.decoder, self.stop_ids, sampling
        longest = distributed.max_over_processes(max((r.max_tokens for r in requests), default=1))
        grid, chunk = start(
            *static, first_room(longest), params, _inputs(requests, places, sharding)
        )
        while True:
            # A row that has finished decodes on to the end of the chunk; `extend` ignores that.
            for rows, sampled in zip(places, _host(chunk), strict=True):
                for row, *columns in zip(rows, *sampled, strict=True):
                    row.extend(columns, self.stop_ids)
            if not goes_on(any(not r.done for rows in groups for r in rows)):
                break
            grid, places = _shrink(grid, places, sharding)
            grid, chunk = decode(*static, params, _with_room(grid))
        return [
            [self._completion(request, row, version) for row in rows]
            for request, rows in zip(requests, groups, strict=True)
        ]

    def _completion(self, request: Request, row: _RowState, version: int) -> Completion:
        if not np.isfinite(row.untruncated).all():
            raise ValueError(
                f"log-probabilities of {self.tokenizer.name_or_path} with the weights of step "
                f"{version} are not finite: the weights are damaged or have diverged; lower "
                "learning_rate, and continue from an earlier checkpoint"
            )
        stopped = row.tokens[-1] in self.stop_ids
        text = self.tokenizer.decode(
            row.tokens[: len(row.tokens) - stopped], skip_special_tokens=True
        )
        return Completion(
            prompt_ids=request.prompt_ids,
            token_ids=tuple(row.tokens),
            logprobs=tuple(row.logprobs),
            untruncated_logprobs=tuple(row.untruncated),
            finish_reason="stop" if stopped else "length",
            text=text,
            weights_version=version,
        )


def goes_on(unfinished: bool) -> bool:
    """Returns whether any process has unfinished rows, or requests for more of them.

    Every process calls it after each chunk, and before generation that may not be needed. All leave
    the loop together, because decoding is collective and the others would wait for one that has
    left.

    Raises:
        StopRequestedError: if any process was asked to stop.
    """
    flags = distributed.gather(np.asarray([unfinished, stopping.requested()]))
    if flags[:, 1].any():
        stopping.check()
        raise stopping.StopRequestedError("a request to another process")
    return bool(flags[:, 0].any())


def first_room(longest: int) -> int:
    """Returns the number of tokens in the first cache of rows of at most `longest` tokens."""
    return min(_power_of_two(max(longest, CHUNK)), _ROOM)


def bucket(number: int) -> int:
    """Returns the smallest of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, … that is at least `number`."""
    power = _power_of_two(number)
    between = power // 4 * 3
    return between if _FEW < number <= between else power


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def start(
    decoder: Decoder,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    room: int,
    params: Params,
    inputs: GridInputs,
) -> tuple[_Grid, _Chunk]:
    """Runs the prompts and samples the first token of each row.

    The completions' cache has room for `room` tokens, a multiple of `CHUNK`.
    """
    limits = inputs.limits
    size = limits.shape[1]
    hidden, prompt_cache = kv.prefill(decoder, params, inputs.prompts, inputs.lengths)
    hidden = jnp.broadcast_to(hidden[:, None], (hidden.shape[0], size, hidden.shape[1]))
    empty = jax.tree.map(
        lambda x: jnp.zeros((*x.shape[:2], size, x.shape[2], room, x.shape[4]), x.dtype),
        prompt_cache,
    )
    grid = _Grid(
        cache=kv.KVCache(prompt_cache, empty, inputs.lengths),
        tokens=jnp.zeros(limits.shape, jnp.int32),
        alive=limits > 0,
        limits=limits,
        keys=inputs.keys,
        time=jnp.int32(-1),
    )
    grid, drawn = _sample(decoder, stop_ids, sampling, params, grid, hidden)
    return _placed(decoder, grid, jax.tree.map(lambda x: x[..., None], drawn))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(
    decoder: Decoder,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    params: Params,
    grid: _Grid,
) -> tuple[_Grid, _Chunk]:
    """Samples `CHUNK` tokens of each row, or fewer if all rows end before."""

    def more(carry: tuple[jax.Array, _Grid, _Chunk]) -> jax.Array:
        return (carry[0] < CHUNK) & jnp.any(carry[1].alive)

    def step(carry: tuple[jax.Array, _Grid, _Chunk]) -> tuple[jax.Array, _Grid, _Chunk]:
        count, grid, chunk = carry
        hidden, cache = kv.decode(decoder, params, grid.cache, grid.tokens, grid.time)
        grid = grid._replace(cache=cache)
        grid, drawn = _sample(decoder, stop_ids, sampling, params, grid, hidden)
        chunk = jax.tree.map(lambda c, d: c.at[..., count].set(d), chunk, drawn)
        return count + 1, grid, chunk

    shape = (*grid.tokens.shape, CHUNK)
    floats = jnp.zeros(shape, jnp.float32)
    chunk = _Chunk(jnp.zeros(shape, jnp.int32), floats, floats)
    _, grid, chunk = jax.lax.while_loop(more, step, (jnp.int32(0), grid, chunk))
    return _placed(decoder, grid, chunk)


def placements(sharding: Sharding) -> Any:
    """Returns the placement of a grid's arrays: rows over the batch axes, heads over `tensor`."""
    rows: Any = sharding.rows()
    prompt: Any = NamedSharding(sharding.mesh, PartitionSpec(None, BATCH_AXES, "tensor"))
    own: Any = NamedSharding(sharding.mesh, PartitionSpec(None, BATCH_AXES, None, "tensor"))
    everywhere: Any = sharding.replicated
    return _Grid(
        cache=kv.KVCache(KeysValues(prompt, prompt), KeysValues(own, own), rows),
        tokens=rows,
        alive=rows,
        limits=rows,
        keys=rows,
        time=everywhere,
    )


def _placed(decoder: Decoder, grid: _Grid, chunk: _Chunk) -> tuple[_Grid, _Chunk]:
    """Returns a program's results in the placement that the next program and the host expect.

    Without constraints XLA would put constants, such as an empty cache or the log-probabilities of
    greedy choices, whole on every device.
    """
    sharding = decoder.sharding
    rows = jax.tree.map(lambda _: sharding.rows(), chunk)
    places = placements(sharding), rows
    return jax.lax.with_sharding_constraint((grid, chunk), places)


def _sample(
    decoder: Decoder,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    params: Params,
    grid: _Grid,
    hidden: jax.Array,
) -> tuple[_Grid, _Chunk]:
    """Draws the next token of each row from the hidden states `[P, G, D]`."""
    time = grid.time + 1
    logits = vocab.logits(hidden, decoder.output_table(params), decoder.sharding)
    keys = jax.vmap(jax.vmap(lambda key: _fold_in(key, time)))(grid.keys)
    drawn = draw(logits, keys, sampling)
    stopped = jnp.isin(drawn.tokens, jnp.asarray(stop_ids, jnp.int32)) | (time + 1 >= grid.limits)
    grid = grid._replace(tokens=drawn.tokens, alive=grid.alive & ~stopped, time=time)
    return grid, _Chunk(*drawn)


def _fold_in(key: jax.Array, number: jax.Array) -> jax.Array:
    return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), number))


def _inputs(requests: Sequence[Request], places: _Places, sharding: Sharding) -> GridInputs:
    """Returns prompts, limits and keys of the rows on devices."""
    own = max((len(r.prompt_ids) for r in requests), default=1)
    longest = distributed.max_over_processes(own)
    tokens = np.zeros((len(places), bucket(max(longest, _SHORTEST))), np.int32)
    lengths = np.ones(len(places), np.int32)
    seeds = np.zeros(len(places), np.uint32)
    for i, request in enumerate(requests):
        tokens[i, : len(request.prompt_ids)] = request.prompt_ids
        lengths[i] = len(request.prompt_ids)
        seeds[i] = request.seed
    size = len(places[0])
    limits = np.asarray([[row.limit for row in rows] for rows in places], np.int32)
    roots = _keys(jnp.asarray(np.repeat(seeds, size)), jnp.tile(jnp.arange(size), len(seeds)))
    keys = np.asarray(roots).reshape(len(places), size, -1)
    return GridInputs(*(place_rows(x, sharding) for x in (tokens, lengths, limits, keys)))


@jax.jit
def _keys(seeds: jax.Array, streams: jax.Array) -> jax.Array:
    def root(seed: jax.Array, stream: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.key(seed), stream))

    return jax.vmap(root)(seeds, streams)


def _shrink(grid: _Grid, places: _Places, sharding: Sharding) -> tuple[_Grid, _Places]:
    """Drops finished rows if that at least halves the grid; rows stay on their device."""
    # The grid is split over devices by prompt, so that each device has `share` consecutive prompts.
    parts = sharding.local_replicas
    share = len(places) // parts
    if share * len(places[0]) <= _FEW:
        return grid, places
    # The new grid stays a rectangle on every device: the device with the most unfinished prompts
    # decides its height, and the prompt with the most unfinished rows decides its width. Shapes are
    # those of compiled programs, so all processes must agree on them.
    alive = [[i for i, row in enumerate(rows) if not row.done] for rows in places]
    prompts = [[i for i in range(p * share, (p + 1) * share) if alive[i]] for p in range(parts)]
    height = distributed.max_over_processes(max(map(len, prompts)))
    width = distributed.max_over_processes(max(map(len, alive)))
    height = bucket(max(height, 1))
    width = bucket(max(width, 1))
    if 2 * height * width > share * len(places[0]):  # not worth the copy of the cache
        return grid, places
    # Column 0 selects a prompt of the device's part, the others select rows of that prompt. Idle
    # cells select prompt 0 and row 0: they are computed, and ignored because their state is done.
    selection = np.zeros((parts * height, 1 + width), np.int32)
    remaining: _Places = [[_RowState(done=True)] * width for _ in range(parts * height)]
    for part, chosen in enumerate(prompts):
        for j, i in enumerate(chosen, part * height):
            selection[j, 0] = i - part * share
            selection[j, 1 : 1 + len(alive[i])] = alive[i]
            remaining[j] = ([places[i][k] for k in alive[i]] + remaining[j])[:width]
    # Without this mask the copies in idle cells would keep the loop on the devices running.
    is_alive = np.asarray([[not row.done for row in rows] for rows in remaining])
    moved = _take(sharding, grid, place_rows(selection, sharding))
    return moved._replace(alive=place_rows(is_alive, sharding)), remaining


@functools.partial(jax.jit, static_argnums=0)
def _take(sharding: Sharding, grid: _Grid, taken: jax.Array) -> _Grid:
    """Returns the grid of the selected prompts of each part, with their selected rows."""
    # Indexing within a part, by `vmap`, keeps every prompt on its device; a gather over the whole
    # grid would communicate.
    parts = sharding.num_replicas
    prompts = taken[:, 0].reshape(parts, -1)
    rows = taken[:, 1:]

    def of_prompts(x: jax.Array) -> jax.Array:  # [P, ...]
        split = x.reshape(parts, -1, *x.shape[1:])
        return jax.vmap(lambda x, i: x[i])(split, prompts).reshape(-1, *x.shape[1:])

    def of_rows(x: jax.Array) -> jax.Array:  # [P, G, ...]
        return jax.vmap(lambda x, i: x[i])(of_prompts(x), rows)

    cache = kv.KVCache(
        jax.tree.map(jax.vmap(of_prompts), grid.cache.prompt),
        jax.tree.map(jax.vmap(of_rows), grid.cache.own),
        of_prompts(grid.cache.lengths),
    )
    fewer = grid._replace(
        cache=cache,
        tokens=of_rows(grid.tokens),
        alive=of_rows(grid.alive),
        limits=of_rows(grid.limits),
        keys=of_rows(grid.keys),
    )
    return jax.lax.with_sharding_constraint(fewer, placements(sharding))


def _with_room(grid: _Grid) -> _Grid:
    """Doubles the completions' cache if the next chunk would not fit."""
    held = grid.cache.own.keys.shape[4]
    if int(grid.time) + CHUNK <= held:
        return grid
    return grid._replace(cache=grid.cache._replace(own=_double(grid.cache.own)))


@jax.jit
def _double(cache: Any) -> Any:
    def one(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, x.shape[4] if dim == 4 else 0) for dim in range(x.ndim)])

    return jax.tree.map(one, cache)


def _host(chunk: _Chunk) -> list[tuple[np.ndarray, ...]]:
    """Returns this process's rows of each array, by prompt."""
    return list(zip(*map(from_global, chunk), strict=True))


def _fill(groups: _Places, count: int, size: int) -> _Places:
    """Returns the groups, extended to `count` by groups of finished rows."""
    idle = [[_RowState(done=True)] * size for _ in range(count - len(groups))]
    return groups + idle


def _prompts(count: int, sharding: Sharding) -> int:
    """Returns the number of the grid's prompts in this process, for `count` real ones."""
    parts = sharding.local_replicas
    return parts * bucket(distributed.max_over_processes(-(-count // parts)))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
