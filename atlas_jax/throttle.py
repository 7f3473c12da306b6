"""Limits on the requests to one endpoint: requests in flight, requests a minute, and pauses.

One `Throttle` belongs to one address. All requests to it share the throttle, over batches, threads
and event loops, so all of them learn from one refusal.
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
    """A limit on units a minute, with bursts of up to one second's worth."""

    def __init__(self, per_minute: float) -> None:
        """Makes a pace; 0 is no limit."""
        self._secs_per_unit = 60.0 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    async def wait(self, units: float = 1.0) -> None:
        """Waits until the rate allows these units."""
        # Unused time counts for at most a second, or a pause would be followed by a burst.
        start = max(self._free_at, time.monotonic() - 1.0)
        self._free_at = start + units * self._secs_per_unit
        await asyncio.sleep(max(0.0, start - time.monotonic()))

    def correct(self, units: float) -> None:
        """Adds units beyond those announced to `wait`; a negative number gives units back."""
        self._free_at += units * self._secs_per_unit


_NEAR = 0.9  # fraction of the refused limit up to which places grow fast again
_PLATEAU = 0.97  # fraction of the refused rate at which the rate stays for some time
_START = 0.93  # largest fraction of the refused rate at which it begins
_PERIOD_SECS = 20.0  # shortest time until the rate reaches the plateau
_PERIOD_HOLDS = 30.0  # the same in lengths of a pause, so that pauses cost little


class _Rate:
    """Estimated rate of requests that an endpoint accepts, unlimited until its second refusal.

    An endpoint may ask for longer pauses than its limit needs, and a client that only keeps these
    pauses stays below the limit. Evenly spaced requests are seldom refused. The limit lies between
    the rate accepted since the previous refusal and the rate sent at this one.

    Reference: the growth is that of CUBIC (RFC 9438), applied to a rate instead of a window.
    """

    def __init__(self) -> None:
        self._start = math.inf  # requests a second after the last pause
        self._refused = math.inf  # refused rate, the plateau; infinite before a refusal
        self._period = _PERIOD_SECS
        self._refused_at = -math.inf
        self._num_accepted = 0
        self._num_paced = 0  # requests that the rate delayed
        self.free_at = 0.0
        """Time at which the next request may be sent."""

    def sent(self, now: float, *, is_paced: bool) -> None:
        """Counts a sent request; `is_paced` if it had to wait for `free_at`."""
        self._num_paced += is_paced
        self.free_at = now + 1 / self._asked

    def accepted(self) -> None:
        """Counts an accepted request."""
        self._num_accepted += 1

    def idle(self, secs: float) -> None:
        """Excludes a time without requests from the rate."""
        self._refused_at += secs

    def refused(self, now: float, held_until: float) -> None:
        """Lowers the rate, once for all requests that were refused together."""
        asked = self._asked
        secs = max(now - self._refused_at, 1e-3)
        accepted = max(self._num_accepted, 1) / secs
        if asked < math.inf:
            # The limit lies between the two rates, so the search restarts at their geometric mean.
            self._refused = _PLATEAU * asked
            self._start = max(min(math.sqrt(accepted * asked), _START * asked), accepted)
        elif secs < math.inf and self._num_accepted:
            # The second refusal: only now an accepted rate between two refusals is known.
            self._start = accepted
        self._period = max(_PERIOD_HOLDS * (held_until - now), _PERIOD_SECS)
        self.free_at = held_until
        self._refused_at = now
        self._num_accepted = self._num_paced = 0

    @property
    def _asked(self) -> float:
        """Current rate, in requests a second."""
        if self._refused == math.inf:  # no paced rate has been refused yet
            return self._start + math.log(2) * self._num_paced  # doubles in a second
        # A cubic around the plateau: steep at first, flat near the refused rate, then rising again.
        x = self._num_paced / (self._period * self._start) - 1
        return self._refused + (self._refused - self._start) * x**3 + self._refused * max(x, 0.0)


class Throttle:
    """Limit on the requests in flight and on their rate, lowered by refusals.

    Reference: additive increase and multiplicative decrease (Chiu and Jain, 1989), as for TCP's
    congestion window. The fast return to just below the refused limit is that of CUBIC (RFC 9438).
    """

    def __init__(
        self, max_in_flight: int, requests_per_minute: float = 0.0, tokens_per_minute: float = 0.0
    ) -> None:
        """Makes a throttle.

        Args:
            max_in_flight: the largest number of requests in flight.
            requests_per_minute: the number of requests that may begin in a minute; 0 is no limit.
            tokens_per_minute: the limit for `tokens`, prompts and replies; 0 is no limit.
        """
        self.tokens = Pace(tokens_per_minute)
        """Limit on tokens a minute; the caller counts them, since only it knows the texts."""
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
        self._is_paced = False  # whether only the rate, not a pause, delays the next request
        self._waiting: collections.OrderedDict[asyncio.Future[None], None] = (
            collections.OrderedDict()
        )
        self._timer: tuple[asyncio.AbstractEventLoop, float] | None = None
        self.num_refusals = 0
        """Number of times that the limit was lowered since a request was last accepted."""

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[float]:
        """Waits for a place for one request, and yields the time at which it is sent."""
        # Before the queue: a place must not be held while the rate delays the request.
        await self._requests.wait()
        turn = asyncio.get_running_loop().create_future()
        with self._lock:
            if not self._in_flight and not self._waiting:
                self._rate.idle(time.monotonic() - self._idle_since)
            # In the queue before anything is dealt, so that requests keep their order.
            self._waiting[turn] = None
            self._deal()
        try:
            await turn
            yield time.monotonic()
        finally:
            with self._lock:
                # Cancelled before it had a place, so there is none to give back.
                if turn in self._waiting:
                    del self._waiting[turn]
                else:
                    self._in_flight -= 1
                    self._idle_since = time.monotonic()
                self._deal()

    def refused(self, sent: float, secs: float) -> None:
        """Pauses all requests, and halves the limit on requests in flight.

        Requests that were in flight together halve it only once.

        Args:
            sent: the time at which the refused request was sent, from `place`.
            secs: the seconds of the pause.
        """
        with self._lock:
            now = time.monotonic()
            self._held_until = max(self._held_until, now + secs)
            # An earlier request was sent under the limit that has been lowered already.
            if sent >= self._lowered_at:
                # What was really in flight was too much, whatever the limit allowed.
                self._refused_limit = min(self._limit, self._in_flight)
                self._limit = max(self._refused_limit / 2, 1.0)
                self._lowered_at = now
                self._rate.refused(now, self._held_until)
                self._is_paced = False
                self.num_refusals += 1

    def accepted(self) -> None:
        """Raises the limit by one for each `limit` accepted requests, or faster far below it."""
        with self._lock:
            self.num_refusals = 0
            is_below = self._limit < _NEAR * self._refused_limit
            more = 1.0 if is_below else 1 / self._limit
            self._limit = min(self._limit + more, float(self._most))
            self._rate.accepted()
            self._deal()

    def _deal(self) -> None:
        """Gives free places to waiting requests, each in its own event loop."""
        while self._waiting and self._in_flight < int(self._limit):
            first = next(iter(self._waiting))
            if first.get_loop().is_closed():  # its batch has ended without waiting for it
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
        """Schedules `_deal` for a later time, in the event loop of a waiting request."""
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
