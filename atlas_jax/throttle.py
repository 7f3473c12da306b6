"""How fast one endpoint is asked: requests at one time, requests in a minute, and pauses.

One `Throttle` stands for one address. Everything that asks there shares it, over batches, threads
and event loops, so that what one request learns holds for all of them.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
import time
from collections.abc import AsyncIterator


class Pace:
    """Lets a number of units pass in a minute, a second's worth of them at once."""

    def __init__(self, per_minute: float) -> None:
        """Makes a pace; 0 is no limit."""
        self._secs_per_unit = 60.0 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    async def wait(self, units: float = 1.0) -> None:
        """Returns when the units before these have passed."""
        start = max(self._free_at, time.monotonic() - 1.0)
        self._free_at = start + units * self._secs_per_unit
        await asyncio.sleep(max(0.0, start - time.monotonic()))

    def correct(self, units: float) -> None:
        """Counts units that were more, or with a minus fewer, than `wait` was told."""
        self._free_at += units * self._secs_per_unit


class Throttle:
    """Places for the requests in flight, fewer of them while the endpoint refuses some.

    Reference: additive increase and multiplicative decrease (Chiu and Jain, 1989), as TCP sets the
    size of its congestion window.
    """

    def __init__(
        self, max_in_flight: int, requests_per_minute: float = 0.0, tokens_per_minute: float = 0.0
    ) -> None:
        """Makes a throttle.

        Args:
            max_in_flight: most places that there are.
            requests_per_minute: requests that begin in a minute; 0 is no limit.
            tokens_per_minute: of prompts and replies, for `tokens`; 0 is no limit.
        """
        self.tokens = Pace(tokens_per_minute)
        """The tokens of a minute, which only who writes prompts and reads replies can count."""
        self._most = max_in_flight
        self._requests = Pace(requests_per_minute)
        self._lock = threading.Lock()
        self._limit = float(max_in_flight)
        self._in_flight = 0
        self._held_until = 0.0
        self._lowered_at = 0.0
        self._waiting: collections.OrderedDict[asyncio.Future[None], None] = (
            collections.OrderedDict()
        )
        self.num_refusals = 0
        """Times in a row that the limit was lowered, nothing having been accepted in between."""

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[float]:
        """Holds a place for one request; yields the time at which it may be sent."""
        await self._requests.wait()
        while True:
            await self._take()
            try:
                while (secs := self._held_until - time.monotonic()) > 0:
                    await asyncio.sleep(secs)
                if self._in_flight <= self._limit:  # it may have been lowered meanwhile
                    yield time.monotonic()
                    return
            finally:
                self._leave()

    def refused(self, sent: float, secs: float) -> None:
        """Holds all requests, and halves the places that there are.

        Requests that were in flight together and are refused together halve them once.

        Args:
            sent: when the refused request was sent, as `place` says.
            secs: how long nothing is to be sent.
        """
        with self._lock:
            now = time.monotonic()
            self._held_until = max(self._held_until, now + secs)
            if sent >= self._lowered_at:
                self._limit = max(min(self._limit, self._in_flight) / 2, 1.0)
                self._lowered_at = now
                self.num_refusals += 1

    def accepted(self) -> None:
        """Lets the places grow by one for as many accepted requests as there are places."""
        with self._lock:
            self.num_refusals = 0
            self._limit = min(self._limit + 1 / self._limit, float(self._most))
            self._wake()

    async def _take(self) -> None:
        with self._lock:
            if self._in_flight < int(self._limit):
                self._in_flight += 1
                return
            turn = asyncio.get_running_loop().create_future()
            self._waiting[turn] = None
        try:
            await turn
        except asyncio.CancelledError:
            with self._lock:
                if turn in self._waiting:
                    del self._waiting[turn]
                    raise
            self._leave()  # the place was given away already
            raise

    def _leave(self) -> None:
        with self._lock:
            self._in_flight -= 1
            self._wake()

    def _wake(self) -> None:
        """Gives free places to those who wait, each in its own event loop."""
        while self._waiting and self._in_flight < int(self._limit):
            turn, _ = self._waiting.popitem(last=False)
            with contextlib.suppress(RuntimeError):  # its loop has been closed
                turn.get_loop().call_soon_threadsafe(_give, turn)
                self._in_flight += 1


def _give(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
