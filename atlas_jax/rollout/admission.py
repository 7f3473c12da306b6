"""Prompts of local generation that wait for places of the running grid, and the rows so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from atlas_jax import distributed
from atlas_jax.rollout.engine import Request
from atlas_jax.sharding import Sharding


@dataclasses.dataclass
class RowState:
    """The completion of one row so far."""

    limit: int = 0
    stream: int = 0
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


class Piece(NamedTuple):
    """Rows of one prompt of the grid: those of a request, or a part of them."""

    request: Request
    rows: list[RowState]

    @property
    def unfinished(self) -> list[int]:
        """Numbers of the rows that go on."""
        return [i for i, row in enumerate(self.rows) if not row.done]


class Admission:
    """Prompts that wait for places of the grid; the calls of all processes agree.

    A prefill stops all rows, and its time falls little below a number of prompts, so it waits for a
    quarter of the grid, or of this process's part of it.
    """

    def __init__(self, waiting: list[Piece], size: int, sharding: Sharding) -> None:
        """Keeps the prompts in order.

        Args:
            waiting: prompts of this process.
            size: the number of this process's prompts in the grid.
            sharding: the placement of the grid.
        """
        self._waiting = waiting
        self._parts = sharding.local_replicas
        self._sharding = sharding
        self._share = size // self._parts
        self._batch = max(self._share // 4, 1)
        self.open = bool(distributed.max_over_processes(len(waiting)))

    def due(self, pieces: list[Piece]) -> bool:
        """Returns whether prompts are to be admitted, because a process has enough places."""
        if not self.open:
            return False
        free = sum(min(len(x), self._batch) for x in self._free(pieces))
        wanted = min(len(self._waiting), -(-self._batch * self._parts // 2))
        return distributed.any_process(0 < wanted <= free)

    def taken(self, pieces: list[Piece]) -> tuple[np.ndarray, list[Piece]]:
        """Returns the places of a batch of prompts on their devices, and the prompts.

        They replace finished ones in `pieces`. Entries of the batch without a prompt have a place
        outside the device's part.
        """
        width = len(pieces[0].rows)
        places = np.full(self._parts * self._batch, self._share, np.int32)
        new: list[Piece] = []
        for part, free in enumerate(self._free(pieces)):
            chosen = self._waiting[: min(len(free), self._batch)]
            del self._waiting[: len(chosen)]
            for i, (place, piece) in enumerate(zip(free, chosen, strict=False), len(new)):
                places[i] = place
                pieces[part * self._share + place] = piece
            new += filled(chosen, self._batch, width)
        self.open = bool(distributed.max_over_processes(len(self._waiting)))
        return places, new

    def until(self, pieces: list[Piece], smaller: int) -> int:
        """Returns the number of unfinished prompts, of all devices, at which decoding pauses.

        Args:
            pieces: the grid's prompts.
            smaller: the number of a device's prompts to which the grid may shrink when none waits;
                0 if it may not.
        """
        if not self.open and not smaller:
            return 0
        alive = sum(bool(piece.unfinished) for piece in pieces)
        alive = int(distributed.gather(np.asarray(alive)).sum())
        left = len(pieces) // self._parts - self._batch if self.open else smaller
        # At least one prompt must end: places may be free where none waits.
        return max(min(left * self._sharding.num_replicas, alive - 1), 0)

    def _free(self, pieces: list[Piece]) -> list[list[int]]:
        """Returns the numbers of the finished prompts in each device's part."""
        parts = range(0, len(pieces), self._share)
        finished = [not piece.unfinished for piece in pieces]
        return [[i for i in range(self._share) if finished[first + i]] for first in parts]


def filled(pieces: list[Piece], count: int, width: int) -> list[Piece]:
    """Returns the pieces with `width` rows each, and as many more as make `count`.

    The rows that are added have finished.
    """
    nothing = Request((0,), 0, 0)
    pieces = pieces + [Piece(nothing, [])] * (count - len(pieces))
    idle = RowState(done=True)
    return [Piece(p.request, p.rows + [idle] * (width - len(p.rows))) for p in pieces]
