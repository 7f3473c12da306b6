"""How fast one endpoint is asked: requests at one time, requests in a minute, and pauses.

One `Throttle` stands for one address. Everything that asks there shares it, over batches, threads
and event loops, so that what one request learns holds for all of them.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import math
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


_NEAR = 0.9  # share of what was refused up to which it is taken up again at once
_PLATEAU = 0.97  # share of the rate that was refused, at which the rate stays for some time
_START = 0.93  # and at which it begins, at most
_PERIOD_SECS = 20.0  # until it is there, at least
_PERIOD_HOLDS = 30.0  # and in pauses, so that these cost little


class _Rate:
    """Requests a second that an endpoint takes, unlimited until it has refused some twice.

    An endpoint may ask for a longer pause than its limit needs, so that who only keeps the pauses
    stays below the limit; who asks evenly is seldom refused. The limit lies between what was
    accepted since the refusal before and what was asked when it refused.

    Reference: the growth is that of CUBIC (RFC 9438), of a rate in the place of a window.
    """

    def __init__(self) -> None:
        self._start = math.inf  # behind the last pause, requests a second
        self._refused = math.inf  # the plateau; infinite where no such rate has been refused
        self._period = _PERIOD_SECS
        self._refused_at = -math.inf
        self._num_accepted = 0
        self._num_paced = 0  # requests that waited for their turn, so that the rate held them up
        self.free_at = 0.0
        """When the next request may be sent."""

    def sent(self, now: float, *, is_paced: bool) -> None:
        """Counts a request that is sent, and whether it had to wait for `free_at`."""
        self._num_paced += is_paced
        self.free_at = now + 1 / self._asked

    def accepted(self) -> None:
        """Counts a request."""
        self._num_accepted += 1

    def idle(self, secs: float) -> None:
        """Leaves out a time in which nothing was asked."""
        self._refused_at += secs

    def refused(self, now: float, held_until: float) -> None:
        """Asks slower, once for all requests that were refused together."""
        asked = self._asked
        secs = max(now - self._refused_at, 1e-3)
        accepted = max(self._num_accepted, 1) / secs
        if asked < math.inf:
            self._refused = _PLATEAU * asked
            self._start = max(min(math.sqrt(accepted * asked), _START * asked), accepted)
        elif secs < math.inf and self._num_accepted:
            self._start = accepted
        self._period = max(_PERIOD_HOLDS * (held_until - now), _PERIOD_SECS)
        self.free_at = held_until
        self._refused_at = now
        self._num_accepted = self._num_paced = 0

    @property
    def _asked(self) -> float:
        """Requests a second that are sent now."""
        if self._refused == math.inf:  # it has not been too fast yet
            return self._start + math.log(2) * self._num_paced  # twice as fast in a second
        x = self._num_paced / (self._period * self._start) - 1
        return self._refused + (self._refused - self._start) * x**3 + self._refused * max(x, 0.0)


class Throttle:
    """Places for the requests in flight, fewer and with time between them where some are refused.

    Reference: additive increase and multiplicative decrease (Chiu and Jain, 1989), as TCP sets the
    size of its congestion window; the fast return to just below what was refused is of CUBIC
    (RFC 9438).
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
        self._refused_limit = math.inf
        self._lowered_at = 0.0
        self._in_flight = 0
        self._idle_since = 0.0
        self._held_until = 0.0
        self._rate = _Rate()
        self._is_paced = False  # whether the next request waits for its turn alone
        self._waiting: collections.OrderedDict[asyncio.Future[None], None] = (
            collections.OrderedDict()
        )
        self._timer: tuple[asyncio.AbstractEventLoop, float] | None = None
        self.num_refusals = 0
        """Times in a row that the limit was lowered, nothing having been accepted in between."""

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[float]:
        """Holds a place for one request; yields the time at which it is sent."""
        await self._requests.wait()
        turn = asyncio.get_running_loop().create_future()
        with self._lock:
            if not self._in_flight and not self._waiting:
                self._rate.idle(time.monotonic() - self._idle_since)
            self._waiting[turn] = None
            self._deal()
        try:
            await turn
            yield time.monotonic()
        finally:
            with self._lock:
                if turn in self._waiting:
                    del self._waiting[turn]
                else:
                    self._in_flight -= 1
                    self._idle_since = time.monotonic()
                self._deal()

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
                self._refused_limit = min(self._limit, self._in_flight)
                self._limit = max(self._refused_limit / 2, 1.0)
                self._lowered_at = now
                self._rate.refused(now, self._held_until)
                self._is_paced = False
                self.num_refusals += 1

    def accepted(self) -> None:
        """Lets the places grow: by one for as many accepted requests as there are places."""
        with self._lock:
            self.num_refusals = 0
            is_below = self._limit < _NEAR * self._refused_limit
            more = 1.0 if is_below else 1 / self._limit
            self._limit = min(self._limit + more, float(self._most))
            self._rate.accepted()
            self._deal()

    def _deal(self) -> None:
        """Gives the places that are free by now to those who wait, each in its own event loop."""
        while self._waiting and self._in_flight < int(self._limit):
            first = next(iter(self._waiting))
            if first.get_loop().is_closed():
                del self._waiting[first]
                continue
            now = time.monotonic()
            at = max(self._held_until, self._rate.free_at)
            if at > now:
                self._is_paced = at > self._held_until
                self._deal_at(first.get_loop(), at)
                return
            del self._waiting[first]
            with contextlib.suppress(RuntimeError):  # its loop is being closed
                first.get_loop().call_soon_threadsafe(_give, first)
                self._in_flight += 1
                self._rate.sent(now, is_paced=self._is_paced)
                self._is_paced = False

    def _deal_at(self, loop: asyncio.AbstractEventLoop, at: float) -> None:
        """Deals at a later time, in an event loop in which somebody waits."""
        if self._timer != (loop, at):
            self._timer = loop, at
            with contextlib.suppress(RuntimeError):  # it is being closed
                loop.call_soon_threadsafe(loop.call_later, at - time.monotonic(), self._ring)

    def _ring(self) -> None:
        with self._lock:
            self._timer = None
            self._deal()


def _give(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
