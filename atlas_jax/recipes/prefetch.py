"""Batches made ahead of the step that trains on them."""

from __future__ import annotations

import collections
import concurrent.futures
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from atlas_jax import stopping
from atlas_jax.rollout.engine import ChatModel


class Prefetched(NamedTuple):
    """One batch, with the place and the time of its making."""

    batch: Any
    position: int
    """Number of the first question that has not been asked yet."""
    secs: float
    """Seconds that its making took."""


class Prefetcher:
    """Makes batches one after another, up to `depth` of them before they are asked for.

    With depth 0 a batch is made when it is asked for. Otherwise a thread makes the next ones while
    the step trains; a batch is begun with the policy of at most `depth` steps before its own.
    """

    def __init__(self, make: Callable[[ChatModel, int], tuple[Any, int]], depth: int) -> None:
        """Starts nothing yet.

        Args:
            make: a policy and the first question -> a batch and the position after it.
            depth: number of batches that are made ahead.
        """
        self._make = make
        self._depth = depth
        self._end = 0
        self.is_closed = False
        """True once no further batch is wanted; one that has begun may leave."""
        self._worker: ThreadPoolExecutor | None = None
        self._waiting: collections.deque[Future[Prefetched]] = collections.deque()
        self._taken: list[Future[Prefetched]] = []
        """The batch that was asked for last, which may not be done if the run is to stop."""

    def take(self, policy: ChatModel, position: int) -> Prefetched:
        """Returns the batch that begins at `position`, and has the next ones made with `policy`."""
        if not self._depth:
            return self._one(policy, position)
        # The thread starts here, because the position is that of the checkpoint, if there is one.
        if self._worker is None:
            # One thread, since a batch begins with the question after the last one before it.
            self._worker = ThreadPoolExecutor(1, "rollouts")
            self._end = position
        if not self._waiting:
            self._submit(policy)
        self._taken = [self._waiting.popleft()]
        made = stopping.result(self._taken[0])
        # Only now: a batch that is begun with the newest policy is at most `depth` steps old when
        # it is trained on.
        while len(self._waiting) < self._depth:
            self._submit(policy)
        return made

    def _submit(self, policy: ChatModel) -> None:
        assert self._worker is not None
        self._waiting.append(self._worker.submit(self._next, policy))

    def _next(self, policy: ChatModel) -> Prefetched:
        made = self._one(policy, self._end)
        self._end = made.position
        return made

    def _one(self, policy: ChatModel, position: int) -> Prefetched:
        start = time.perf_counter()
        batch, end = self._make(policy, position)
        return Prefetched(batch=batch, position=end, secs=time.perf_counter() - start)

    def close(self) -> None:
        """Cancels the batches that have not begun."""
        self.is_closed = True
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)

    def join(self, secs: float) -> None:
        """Waits at most `secs` seconds for the batch that was being made when this was closed."""
        begun = [future for future in (*self._taken, *self._waiting) if future.running()]
        concurrent.futures.wait(begun, secs)
