"""Generation inside the training process, from the sharded training parameters.

Prompts are run once, then tokens are decoded in chunks. While prompts wait, a chunk ends as soon as
a quarter of the grid's prompts have finished, and others take their places. When none waits,
finished rows are dropped if the others fit into a quarter of the grid, so a long answer does not
keep finished rows computing. Below a few rows nothing is gained, because a step then takes the time
of reading the weights. On a CPU the time of a step grows with its rows. Where prompts have one row
each, a grid there holds few of them while the others wait, and shrinks by halves in the end.

Each shape of the grid is compiled once, which takes long, so there are few: a prompt has a power of
two of places in the cache, 64 or at least 256, the cache of completions grows and the grid shrinks
by factors of four, and the grid shrinks only when its cache grows or has its final size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax import distributed, progress, stopping
from atlas_jax.models import cache as kv
from atlas_jax.models import vocab
from atlas_jax.models.layers import KeysValues
from atlas_jax.models.transformer import Decoder
from atlas_jax.rollout.admission import Admission, Piece, RowState, filled
from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.sampling import Sampling, draw
from atlas_jax.sharding import Sharding, from_global, place_rows, platform
from atlas_jax.types import Completion, Params

CHUNK = 32
"""Number of tokens between two checks for finished rows."""
_SHORTEST = 32  # smallest bucket of prompt lengths
_FEW = 16  # rows of a device below which a smaller grid is not worth a compilation
_ROWS_ON_CPU = 32  # of a device, beyond which a step takes longer as its rows are more
_FEW_CACHED = 64  # places of the cache for short prompts; others have four times as many or more
_ROOM = 128  # largest number of tokens that the first cache of a row holds


class Room(NamedTuple):
    """Sizes of a grid's cache, static in compiled programs."""

    prompt: int
    """Places for a prompt."""
    own: int
    """Places for the tokens of a completion."""


class Shrinking(NamedTuple):
    """Sizes that a grid may take as its rows finish, in rows of a device."""

    factor: int
    fewest: int
    """Rows below which a smaller grid is not worth a compilation."""

    def is_due(self, rows: int) -> bool:
        """Returns whether a grid with so many rows of a device may become smaller."""
        return rows >= self.factor * self.fewest

    def fewer_prompts(self, pieces: list[Piece], sharding: Sharding) -> int:
        """Returns the prompts of a device of the next smaller grid, 0 if there is none.

        Programs count prompts with unfinished rows, so they find its time where a prompt has one.
        """
        share = len(pieces) // sharding.local_replicas
        return -(-share // self.factor) if len(pieces[0].rows) == 1 and self.is_due(share) else 0


class GridPrompts(NamedTuple):
    """Prompts that begin, on the devices."""

    tokens: jax.Array  # [P, S] int32, right-padded
    lengths: jax.Array  # [P] int32


class GridRows(NamedTuple):
    """Options of each row that begins; arrays on the devices."""

    limits: jax.Array  # [P, G] int32, tokens that a row may have
    seeds: jax.Array  # [P, G] uint32, of the row's request
    streams: jax.Array  # [P, G] int32, number of the row in its group


class Admitted(NamedTuple):
    """Prompts that begin in a grid that runs, on the devices."""

    prompts: GridPrompts
    rows: GridRows
    places: jax.Array  # [P] int32, in the device's part of the grid; one outside is none


class _Grid(NamedTuple):
    """Rows that are being decoded, `[P, G]`; arrays on the devices."""

    cache: kv.KVCache
    rows: GridRows
    tokens: jax.Array  # [P, G] int32, sampled last and not yet in the cache
    alive: jax.Array  # [P, G] bool
    time: jax.Array  # [] int32, the step of `tokens`, counted from 0


class _Chunk(NamedTuple):
    """Sampled tokens, `[P, G, C]`; entries after a row's end have no meaning."""

    tokens: jax.Array
    logprobs: jax.Array
    untruncated: jax.Array


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
        if not distributed.max_over_processes(len(requests)):
            return []
        groups = [Piece(r, [RowState(r.max_tokens, i) for i in range(samples)]) for r in requests]
        size = self._prompts_at_once(samples)
        order = list(range(len(requests)))
        if distributed.max_over_processes(len(requests)) > size:
            # Prompts of like length are run together, with little padding.
            order.sort(key=lambda i: len(requests[i].prompt_ids))
        first = _pieces([groups[i] for i in order[:size]], samples, self.decoder.sharding)
        self._decode(params, first, [groups[i] for i in order[size:]], sampling)
        return [
            [self._completion(group.request, row, version) for row in group.rows]
            for group in groups
        ]

    def _prompts_at_once(self, samples: int) -> int:
        """Returns the number of prompts of the largest grid of at most `max_rows` rows."""
        parts = self.decoder.sharding.local_replicas
        most = self.max_rows
        # Places of prompts with several rows are free only when the last row ends, which is late.
        if samples == 1 and platform(self.decoder.sharding.mesh) == "cpu":
            most = min(most, _ROWS_ON_CPU * parts)
        share = most // (samples * parts)
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

    def _decode(
        self, params: Params, pieces: list[Piece], waiting: list[Piece], sampling: Sampling
    ) -> None:
        """Completes the rows of a grid, which may have none of this process, and those waiting."""
        sharding = self.decoder.sharding
        weights = kv.weights(self.decoder, params)
        static = self.decoder, self.stop_ids, sampling
        every = pieces + waiting
        longest = distributed.max_over_processes(max(r.limit for p in every for r in p.rows))
        room = Room(cached_room(_prompt_length(every)), first_room(longest))
        admission = Admission(waiting, len(pieces), sharding)
        shrinking = _shrinking(pieces, sharding)
        inputs = _prompts(pieces, sharding), _rows(pieces, sharding)
        grid, chunk = start(*static, room, params, weights, *inputs)
        _extend(pieces, chunk, 1, self.stop_ids)
        while True:
            # Rows of one token may finish as they begin, so that places are free again.
            while admission.due(pieces):
                places, new = admission.taken(pieces)
                begun = Admitted(
                    prompts=_prompts(new, sharding),
                    rows=_rows(new, sharding),
                    places=place_rows(places, sharding),
                )
                grid, chunk = admit(*static, params, weights, begun, grid)
                _extend(new, chunk, 1, self.stop_ids)
            if not goes_on(any(piece.unfinished for piece in pieces)):
                break
            time = int(grid.time)
            # Rows that prompts wait for are not dropped.
            steps = None if admission.open else shrinking
            grid, pieces = _fitted(grid, pieces, longest, sharding, steps)
            final = kv.capacity(grid.cache) == last_room(longest)
            smaller = shrinking.fewer_prompts(pieces, sharding) if final else 0
            until = admission.until(pieces, smaller)
            grid, chunk = decode(*static, weights, grid, np.int32(until))
            _extend(pieces, chunk, int(grid.time) - time, self.stop_ids)

    def _completion(self, request: Request, row: RowState, version: int) -> Completion:
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


def prompt_room(longest: int) -> int:
    """Returns the length to which prompts of at most `longest` tokens are padded."""
    return bucket(max(longest, _SHORTEST))


def cached_room(length: int) -> int:
    """Returns the places that the cache has for prompts that are padded to `length`."""
    return _FEW_CACHED if length <= _FEW_CACHED else max(4 * _FEW_CACHED, _power_of_two(length))


def first_room(longest: int) -> int:
    """Returns the number of tokens in the first cache of rows of at most `longest` tokens."""
    return min(last_room(longest), _ROOM)


def last_room(longest: int) -> int:
    """Returns the number of tokens in the last cache of rows of at most `longest` tokens."""
    return _power_of_two(max(longest, CHUNK))


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
    room: Room,
    params: Params,
    weights: Params,
    prompts: GridPrompts,
    rows: GridRows,
) -> tuple[_Grid, _Chunk]:
    """Runs the prompts and samples the first token of each row.

    Args:
        decoder: the decoder of `params`.
        stop_ids: the tokens that end a text.
        sampling: the options of sampling.
        room: the sizes of the cache.
        params: the parameters as they are between steps.
        weights: the parameters from `cache.weights`.
        prompts: the prompts.
        rows: the rows.
    """
    prompt_cache, chunk, alive = _first(
        decoder, stop_ids, sampling, room.prompt, params, weights, prompts, rows
    )
    grid = _Grid(
        cache=kv.begun(prompt_cache, prompts.lengths, rows.limits.shape[1], room.own),
        rows=rows,
        tokens=chunk.tokens[..., 0],
        alive=alive,
        time=jnp.int32(0),
    )
    return _placed(decoder, grid, chunk)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def admit(
    decoder: Decoder,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    params: Params,
    weights: Params,
    begun: Admitted,
    grid: _Grid,
) -> tuple[_Grid, _Chunk]:
    """Runs prompts into free places of a grid and samples the first token of each of their rows.

    Args:
        decoder: the decoder of `params`.
        stop_ids: the tokens that end a text.
        sampling: the options of sampling.
        params: the parameters as they are between steps.
        weights: the parameters from `cache.weights`.
        begun: the prompts and their places.
        grid: the grid, whose arrays are donated.
    """
    prompts, rows, places = begun
    sharding = decoder.sharding
    room = grid.cache.prompt[0].keys.shape[2]
    prompt_cache, chunk, alive = _first(
        decoder, stop_ids, sampling, room, params, weights, prompts, rows
    )
    cache = kv.replaced_prompts(
        grid.cache, prompt_cache, prompts.lengths, places, grid.time, sharding
    )
    put = functools.partial(kv.put_rows, sharding, places)
    grid = _Grid(
        cache=cache,
        rows=jax.tree.map(put, grid.rows, rows),
        tokens=put(grid.tokens, chunk.tokens[..., 0]),
        alive=put(grid.alive, alive),
        time=grid.time,
    )
    return _placed(decoder, grid, chunk)


def _first(
    decoder: Decoder,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    room: int,
    params: Params,
    weights: Params,
    prompts: GridPrompts,
    rows: GridRows,
) -> tuple[list[KeysValues], _Chunk, jax.Array]:
    """Returns the cache of prompts, the first token of each row, and the rows that go on."""
    # Prompts are padded little where they are run, and more in the cache, with which `decode` is
    # compiled: that takes longer, and the places that are not used cost less.
    hidden, cache = kv.prefill(decoder, params, *prompts, room)
    count, size = rows.limits.shape
    hidden = jnp.broadcast_to(hidden[:, None], (count, size, hidden.shape[1]))
    ages = jnp.zeros(count, jnp.int32)
    drawn, ended = _sample(kv.resident(decoder), stop_ids, sampling, weights, rows, (hidden, ages))
    return cache, jax.tree.map(lambda x: x[..., None], drawn), (rows.limits > 0) & ~ended


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(
    decoder: Decoder,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    weights: Params,
    grid: _Grid,
    until: jax.Array,
) -> tuple[_Grid, _Chunk]:
    """Samples `CHUNK` tokens of each row, or fewer if no more than `until` prompts have rows left.

    The other arguments are those of `start`; the arrays of `grid` are donated.
    """
    here = kv.resident(decoder)

    def more(carry: tuple[jax.Array, _Grid, _Chunk]) -> jax.Array:
        return (carry[0] < CHUNK) & (jnp.sum(jnp.any(carry[1].alive, axis=1)) > until)

    def step(carry: tuple[jax.Array, _Grid, _Chunk]) -> tuple[jax.Array, _Grid, _Chunk]:
        count, grid, chunk = carry
        hidden, cache = kv.decode(here, weights, grid.cache, grid.tokens, grid.time)
        time = grid.time + 1
        sampled = hidden, time - cache.begins
        drawn, ended = _sample(here, stop_ids, sampling, weights, grid.rows, sampled)
        grid = _Grid(
            cache=cache,
            rows=grid.rows,
            tokens=drawn.tokens,
            alive=grid.alive & ~ended,
            time=time,
        )
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
    everywhere: Any = sharding.replicated
    return _Grid(cache=kv.placements(sharding), rows=rows, tokens=rows, alive=rows, time=everywhere)


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
    weights: Params,
    rows: GridRows,
    sampled: tuple[jax.Array, jax.Array],
) -> tuple[_Chunk, jax.Array]:
    """Draws the next token of each row.

    Args:
        decoder: the decoder of `weights`.
        stop_ids: the tokens that end a text.
        sampling: the options of sampling.
        weights: the parameters from `cache.weights`.
        rows: the rows.
        sampled: the hidden states `[P, G, D]`, and the number of the token in its completion `[P]`.

    Returns:
        The tokens, and whether each ends its row, both `[P, G]`.
    """
    hidden, ages = sampled
    logits = vocab.logits(hidden, decoder.output_table(weights), decoder.sharding)
    keys = jax.vmap(jax.vmap(_key, in_axes=(None, 0, 0)))(ages, rows.seeds, rows.streams)
    drawn = draw(logits, keys, sampling)
    full = ages[:, None] + 1 >= rows.limits
    return _Chunk(*drawn), jnp.isin(drawn.tokens, jnp.asarray(stop_ids, jnp.int32)) | full


def _key(number: jax.Array, seed: jax.Array, stream: jax.Array) -> jax.Array:
    """Returns the random key of a row's token."""
    root = jax.random.fold_in(jax.random.key(seed), stream)
    return jax.random.key_data(jax.random.fold_in(root, number))


def _shrinking(pieces: list[Piece], sharding: Sharding) -> Shrinking:
    """Returns how a grid that begins with these prompts shrinks."""
    on_cpu = platform(sharding.mesh) == "cpu" and len(pieces[0].rows) == 1
    if on_cpu and len(pieces) >= _ROWS_ON_CPU * sharding.local_replicas:
        return Shrinking(factor=2, fewest=8)
    return Shrinking(factor=4, fewest=_FEW)


def _pieces(groups: list[Piece], samples: int, sharding: Sharding) -> list[Piece]:
    """Returns the grid's prompts in this process, as many on each device, with equally many rows.

    Where there are fewer requests than devices, the rows of each are spread over several.
    """
    parts = sharding.local_replicas
    count = distributed.max_over_processes(len(groups))
    spread = min(_power_of_two(parts // count + 1) // 2 or 1, _power_of_two(samples))
    width = -(-samples // spread)
    pieces = [
        Piece(request, rows[first : first + width])
        for request, rows in groups
        for first in range(0, samples, width)
    ]
    height = bucket(-(-count * -(-samples // width) // parts))
    return filled(pieces, parts * height, width)


def _prompts(pieces: list[Piece], sharding: Sharding) -> GridPrompts:
    """Returns the prompts on the devices, padded to one length."""
    tokens = np.zeros((len(pieces), _prompt_length(pieces)), np.int32)
    for i, piece in enumerate(pieces):
        tokens[i, : len(piece.request.prompt_ids)] = piece.request.prompt_ids
    return GridPrompts(place_rows(tokens, sharding), _lengths(pieces, sharding))


def _prompt_length(pieces: list[Piece]) -> int:
    """Returns the length to which the prompts are padded."""
    longest = max(len(p.request.prompt_ids) for p in pieces)
    return prompt_room(distributed.max_over_processes(longest))


def _lengths(pieces: list[Piece], sharding: Sharding) -> jax.Array:
    """Returns the lengths of the prompts on the devices."""
    return place_rows(np.asarray([len(p.request.prompt_ids) for p in pieces], np.int32), sharding)


def _rows(pieces: list[Piece], sharding: Sharding) -> GridRows:
    """Returns the rows on the devices."""
    limits = np.asarray([[r.limit for r in p.rows] for p in pieces], np.int32)
    seeds = np.asarray([[p.request.seed] * len(p.rows) for p in pieces], np.uint32)
    streams = np.asarray([[r.stream for r in p.rows] for p in pieces], np.int32)
    return GridRows(*(place_rows(x, sharding) for x in (limits, seeds, streams)))


def _fitted(
    grid: _Grid, pieces: list[Piece], longest: int, sharding: Sharding, shrinking: Shrinking | None
) -> tuple[_Grid, list[Piece]]:
    """Makes room in the cache for the next chunk, and drops finished rows where that pays."""
    room = kv.capacity(grid.cache)
    final = last_room(longest)
    ages = [len(row.tokens) for piece in pieces for row in piece.rows if not row.done]
    full = distributed.max_over_processes(max(ages, default=0)) - 1 + CHUNK > room
    if (full or room == final) and shrinking:
        grid, pieces = _shrunk(grid, pieces, sharding, shrinking)
    if full:
        cache = kv.grown(grid.cache, min(4 * room, final), int(grid.time))
        grid = grid._replace(cache=cache)
    return grid, pieces


def _extend(pieces: list[Piece], chunk: _Chunk, count: int, stop_ids: tuple[int, ...]) -> None:
    """Appends the first `count` tokens of a chunk to the rows of this process.

    A row that has finished decodes on to the end of the chunk, which is ignored.
    """
    for piece, sampled in zip(pieces, _host(chunk), strict=True):
        for row, *columns in zip(piece.rows, *sampled, strict=True):
            was_done = row.done
            row.extend([x[:count] for x in columns], stop_ids)
            if row.done and not was_done:
                progress.mark()


def _shrunk(
    grid: _Grid, pieces: list[Piece], sharding: Sharding, shrinking: Shrinking
) -> tuple[_Grid, list[Piece]]:
    """Drops finished rows if the others fit into a smaller grid; they stay on their device.

    The rows of a prompt that do not fit beside each other get several copies of it.
    """
    # The grid is split over devices by prompt, so that each device has `share` consecutive prompts.
    parts = sharding.local_replicas
    share = len(pieces) // parts
    height = share
    width = len(pieces[0].rows)
    smaller = None
    by = shrinking.factor
    while shrinking.is_due(height * width):
        height, width = (height, -(-width // by)) if width > 1 else (-(-height // by), 1)
        packed = [_packed(pieces, range(p * share, (p + 1) * share), width) for p in range(parts)]
        # Shapes are those of compiled programs, so all processes must agree on them.
        if distributed.max_over_processes(max(map(len, packed))) > height:
            break
        smaller = height, width, packed
    if smaller is None:
        return grid, pieces
    height, width, packed = smaller
    # Column 0 selects a prompt of the device's part, the others select rows of that prompt. Idle
    # cells select prompt 0 and row 0: they are computed, and ignored because their state is done.
    selection = np.zeros((parts * height, 1 + width), np.int32)
    remaining: list[Piece] = []
    for part, chosen in enumerate(packed):
        for j, (i, numbers) in enumerate(chosen, part * height):
            selection[j, 0] = i - part * share
            selection[j, 1 : 1 + len(numbers)] = numbers
        here = [Piece(pieces[i].request, [pieces[i].rows[k] for k in n]) for i, n in chosen]
        remaining += filled(here, height, width)
    lengths = _lengths(remaining, sharding)
    tokens = [[row.tokens[-1] if row.tokens else 0 for row in p.rows] for p in remaining]
    written = [max((len(r.tokens) for r in p.rows if not r.done), default=1) for p in remaining]
    begins = place_rows(np.asarray(int(grid.time) + 1 - np.asarray(written), np.int32), sharding)
    # Without this mask the copies in idle cells would keep the loop on the devices running.
    alive = [[not row.done for row in p.rows] for p in remaining]
    grid = _Grid(
        cache=kv.selected(grid.cache, place_rows(selection, sharding), lengths, begins, sharding),
        rows=_rows(remaining, sharding),
        tokens=place_rows(np.asarray(tokens, np.int32), sharding),
        alive=place_rows(np.asarray(alive), sharding),
        time=grid.time,
    )
    return grid, remaining


def _packed(pieces: list[Piece], part: range, width: int) -> list[tuple[int, list[int]]]:
    """Returns the unfinished rows of a device as prompts of at most `width` rows.

    Each is the number of the prompt, and the numbers of its rows.
    """
    return [
        (i, pieces[i].unfinished[first : first + width])
        for i in part
        for first in range(0, len(pieces[i].unfinished), width)
    ]


def _host(chunk: _Chunk) -> list[tuple[np.ndarray, ...]]:
    """Returns this process's rows of each array, by prompt."""
    return list(zip(*map(from_global, chunk), strict=True))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
