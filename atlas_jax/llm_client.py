"""An async client of OpenAI-compatible HTTP servers: vLLM for rollouts, any endpoint for judges.

It posts JSON and returns JSON. Connection errors, time-outs and 5xx are retried with exponential
back-off and jitter, or after the time in `Retry-After`; every other refusal is final. If a server
reports too many requests (429, and 529 of Anthropic), nothing more is sent to it until the time
that it names. A vLLM server that refuses requests because it is paused is asked again until it has
resumed. Neither refusal counts as a try. Imports no JAX.
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import json
import math
import random
import re
import time
import types
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

from atlas_jax import extras, masking
from atlas_jax.throttle import Pace, Throttle

with extras.importing("judges", "the client of HTTP servers"):
    import aiohttp
    import yarl

__all__ = [
    "Client",
    "ClientOptions",
    "Pace",
    "RefusedError",
    "ServerError",
    "Throttle",
    "Tries",
    "UnavailableError",
]

_TRANSIENT = frozenset({408, 425, 500, 502, 503, 504})
_BUSY = frozenset({429, 529})  # too many requests for a healthy server
_RETRY_DELAY = re.compile(r'"retryDelay":\s*"([\d.]+)s"')  # in the body of Google's 429
Payload = Mapping[str, Any] | Callable[[], Mapping[str, Any]]
"""The JSON to post, or a function that makes it for each try."""

_CLOCK_SECS = 2.0  # difference between a server's clock and ours that is tolerated
_SHOWN = 300  # characters of a reply that an error message quotes
_PAUSED = ("engine_paused", "Generation is paused")  # in the body of vLLM's 503
_PAUSED_SECS = 0.5  # mean wait between two requests to a paused server


class ClientOptions(NamedTuple):
    """Limits and retries of the requests to one server."""

    max_in_flight: int = 64
    """Number of requests in flight; further ones wait in the client."""
    timeout_secs: float = 600.0
    """Seconds that one try may take, its connection included.

    A request waits as long for a paused server to resume. A server may also refuse all requests as
    too many for as long, counted from the end of the pause that it asked for."""
    connect_timeout_secs: float = 10.0
    """Seconds that opening a connection may take."""
    max_tries: int = 4
    """Number of tries of one request; 1 means no retry."""
    retry_timeouts: bool = True
    """True to retry a request that got no reply within `timeout_secs`."""
    backoff_secs: float = 0.5
    """Mean seconds before the second try; doubled before each further one."""
    max_backoff_secs: float = 30.0
    """Largest number of seconds between two tries, `Retry-After` included.

    It also limits the pause for a server that reports too many requests."""
    requests_per_minute: float = 0.0
    """Number of tries that begin in a minute; 0 is no limit."""
    max_failures_in_row: int = 0
    """Number of consecutive failed tries, over all requests, after which the server counts as down.

    Every further request then fails at once. 0 is no limit. Refusals of too many requests do not
    count."""
    trust_env: bool = False
    """True to use the proxy of the environment, unless the server is on this host."""


class ServerError(Exception):
    """A request without a usable reply.

    Attributes:
        url: the URL of the request.
        status: the status of the last reply, 0 if there was none.
        body: the start of the last reply, or the error if there was none.
    """

    def __init__(self, url: str, status: int, body: str) -> None:
        # Secrets are masked before the text is cut, since cutting could leave a part of one.
        shown = " ".join(masking.hide(body[: 4 * _SHOWN])[:_SHOWN].split())  # errors have one line
        super().__init__(f"{masking.hide(url)}: {status or 'no reply'}: {shown}")
        self.url = url
        self.status = status
        self.body = body


class RefusedError(ServerError):
    """A final refusal of a healthy server; a retry would not help."""


class UnavailableError(ServerError):
    """A server that, after every try, cannot be reached or reports an error."""


class Tries:
    """Budget of requests for one call that makes several posts."""

    def __init__(self, most: int) -> None:
        """Allows `most` requests."""
        self.left = most
        self.made = 0


class Client:
    """A client of one server, to be used in `async with` inside one event loop."""

    def __init__(
        self,
        base_url: str,
        api_key: str = "",
        options: ClientOptions | None = None,
        admit: Callable[[], str] = str,
        refund: Callable[[], None] = lambda: None,
        throttle: Throttle | None = None,
    ) -> None:
        """Makes a client, which is not connected yet.

        Args:
            base_url: the address, to which paths are appended, with or without a trailing slash.
            api_key: a bearer token, or ""; it is never part of an error or a log.
            options: limits and retries; None takes the defaults.
            admit: a function called before each try; a text that it returns is the reason for
                which the try is not made.
            refund: a function called for each try that the server refused as one too many.
            throttle: the throttle shared by the clients of this address; None makes one.
        """
        self.base_url = base_url.rstrip("/")
        self.num_retries = 0  # tries after the first, over all requests
        self._options = options or ClientOptions()
        self._api_key = api_key
        self._admit = admit
        self._refund = refund
        self._throttle = throttle or Throttle(
            self._options.max_in_flight, self._options.requests_per_minute
        )
        self._failures_in_row = 0
        self._busy_since = math.inf  # time at which the server should have accepted requests again
        self._given_up = ""
        self._proxy: str | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._proxy = _proxy(self.base_url) if self._options.trust_env else None
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
            # The throttle alone limits the requests in flight.
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(
                total=self._options.timeout_secs, sock_connect=self._options.connect_timeout_secs
            ),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if self._session:
            await self._session.close()
        self._session = None

    async def post(
        self,
        path: str,
        payload: Payload | None = None,
        params: Mapping[str, str] | None = None,
        tries: Tries | None = None,
    ) -> Any:
        """Returns the JSON reply to a POST; None if the reply is empty.

        Args:
            path: the path after the address.
            payload: the JSON to send; a function is called for each try.
            params: the parameters of the query.
            tries: the budget of a call with several posts; None allows `max_tries`.

        Raises:
            RefusedError: if a retry would not change the status.
            UnavailableError: if every try brought a connection error, a time-out, 429, 5xx, or a
                reply that is not JSON.
        """
        return await self._request("POST", path, payload, params, tries)

    async def get(self, path: str, params: Mapping[str, str] | None = None) -> Any:
        """Returns the JSON reply to a GET, with the errors of `post`."""
        return await self._request("GET", path, None, params, None)

    async def get_text(self, path: str) -> str:
        """Returns the body of the reply to a GET, which is tried once and waits for no place.

        Raises:
            UnavailableError: if there is no reply, or its status is not 200.
        """
        url = f"{self.base_url}{path}"
        try:
            async with self._opened.get(url, allow_redirects=False, proxy=self._proxy) as reply:
                body = await reply.text(errors="replace")
                status = reply.status
        except (aiohttp.ClientError, OSError) as error:
            raise UnavailableError(url, 0, f"{type(error).__name__}: {error}") from None
        if status != 200:
            raise UnavailableError(url, status, self._without_key(body))
        return body

    @property
    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the client is not open; use it in `async with`")
        return self._session

    def _without_key(self, body: str) -> str:
        # Some servers repeat the key in their refusal, which goes into logs.
        return body.replace(self._api_key, masking.HIDDEN) if self._api_key else body

    async def _request(
        self,
        method: str,
        path: str,
        payload: Payload | None,
        params: Mapping[str, str] | None,
        tries: Tries | None,
    ) -> Any:
        url = f"{self.base_url}{path}"
        wait = 0.0
        failure = UnavailableError(url, 0, "not tried")
        tries = tries or Tries(self._options.max_tries)
        attempt = 0
        while tries.left:
            if attempt:
                self.num_retries += 1
                await asyncio.sleep(max(wait, self._backoff(attempt)))
            attempt += 1
            try:
                reply = await self._taken_up(method, url, payload, params, tries)
                self._failures_in_row = 0
                return reply
            except _TransientError as later:
                self._failures_in_row += 1
                failure = later.failure
                wait = min(later.wait, self._options.max_backoff_secs)
                if later.final:
                    break
        raise failure

    async def _taken_up(
        self,
        method: str,
        url: str,
        payload: Payload | None,
        params: Mapping[str, str] | None,
        tries: Tries,
    ) -> Any:
        """Returns the reply to one try, repeated while the server refuses it as paused or busy."""
        end = time.monotonic() + self._options.timeout_secs
        while True:
            async with self._throttle.place() as sent:
                # Inside the place: what ended the calls before may have come while this one waited.
                self._check(url)
                tries.left -= 1
                tries.made += 1
                try:
                    reply = await self._once(method, url, payload, params)
                    self._accepted()
                    return reply
                except RefusedError:  # a final answer, for which the server had capacity
                    self._accepted()
                    raise
                except _PausedError as paused:
                    tries.left += 1
                    tries.made -= 1
                    _check_patience(end, paused)
                    # Spread at random, so that waiting requests do not all return at one time.
                    wait = _PAUSED_SECS * random.uniform(0.5, 1.5)
                except _BusyError as busy:
                    tries.left += 1
                    tries.made -= 1
                    self.num_retries += 1
                    self._refund()
                    self._hold(busy, sent)
                    wait = 0.0
            await asyncio.sleep(wait)

    def _accepted(self) -> None:
        self._throttle.accepted()
        self._busy_since = math.inf

    def _hold(self, busy: _BusyError, sent: float) -> None:
        """Pauses all requests to the server for the time that it names.

        Raises:
            UnavailableError: if it has refused everything for too long.
        """
        secs = busy.wait or self._backoff(self._throttle.num_refusals + 1)
        secs = min(secs, self._options.max_backoff_secs)
        now = time.monotonic()
        # Counted from the end of the pause: silence that the server asked for is no fault of it.
        self._busy_since = min(self._busy_since, now + secs)
        if now - self._busy_since > self._options.timeout_secs:
            self._given_up = f"{busy.failure.body}: nothing else for {now - self._busy_since:.0f} s"
            raise busy.failure
        self._throttle.refused(sent, secs)

    def _check(self, url: str) -> None:
        """Raises an error if the next try must not be made."""
        most = self._options.max_failures_in_row
        if most and self._failures_in_row >= most:
            why = f"given up after {self._failures_in_row} failures in a row"
            raise UnavailableError(url, 0, why)
        if self._given_up:
            raise UnavailableError(url, 429, self._given_up)
        if why := self._admit():
            raise RefusedError(url, 0, why)

    async def _once(
        self,
        method: str,
        url: str,
        payload: Payload | None,
        params: Mapping[str, str] | None,
    ) -> Any:
        try:
            # A redirect could lead a key to another server, or from https to http.
            async with self._opened.request(
                method,
                url,
                json=payload() if callable(payload) else payload,
                params=params,
                allow_redirects=False,
                proxy=self._proxy,
            ) as reply:
                body = await reply.text(errors="replace")
                location = reply.headers.get("Location", "")
                wait = _retry_after(reply.headers, body)
                status = reply.status
        except aiohttp.ConnectionTimeoutError:
            why = f"no connection within {self._options.connect_timeout_secs:g} s"
            raise _TransientError(UnavailableError(url, 0, why)) from None
        except TimeoutError:
            why = f"no reply within {self._options.timeout_secs:g} s"
            failure = UnavailableError(url, 0, why)
            raise _TransientError(failure, final=not self._options.retry_timeouts) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _TransientError(
                UnavailableError(url, 0, f"{type(error).__name__}: {error}")
            ) from None
        return self._read(url, status, body, wait, location)

    def _read(self, url: str, status: int, body: str, wait: float, location: str) -> Any:
        """Returns the JSON of a reply.

        Args:
            url: the URL of the request.
            status: the status of the reply.
            body: the body of the reply.
            wait: the seconds after which the server allows the next request.
            location: the target of a redirect.

        Raises:
            RefusedError: if the status is final.
            _TransientError: if a retry may help, or the body is not JSON.
            _BusyError: if the server reports too many requests.
            _PausedError: if the server is a paused vLLM server.
        """
        shown = self._without_key(body)
        if status == 503 and any(sign in body for sign in _PAUSED):
            raise _PausedError(UnavailableError(url, status, shown))
        if status in _BUSY:
            raise _BusyError(UnavailableError(url, status, shown), wait)
        if status in _TRANSIENT or status >= 500:
            raise _TransientError(UnavailableError(url, status, shown), wait)
        if 300 <= status < 400:
            raise RefusedError(url, status, f"moved to {location}; give that address")
        if status >= 400:
            raise RefusedError(url, status, shown)
        try:
            return json.loads(body) if body.strip() else None
        except (ValueError, RecursionError):
            raise _TransientError(UnavailableError(url, status, f"not JSON: {shown}")) from None

    def _backoff(self, attempt: int) -> float:
        """Returns a wait in seconds before try number `attempt`, counted from 0."""
        mean = self._options.backoff_secs * 2 ** (attempt - 1)
        return min(mean * random.uniform(0.5, 1.5), self._options.max_backoff_secs)


class _TransientError(Exception):
    """A failed try after which a retry may help."""

    def __init__(
        self, failure: UnavailableError, wait: float = 0.0, *, final: bool = False
    ) -> None:
        super().__init__(str(failure))
        self.failure = failure
        self.wait = wait
        self.final = final


class _PausedError(Exception):
    """A refusal of a paused server, which will resume."""

    def __init__(self, failure: UnavailableError) -> None:
        super().__init__(str(failure))
        self.failure = failure


class _BusyError(Exception):
    """A refusal of a server because of too many requests."""

    def __init__(self, failure: UnavailableError, wait: float) -> None:
        super().__init__(str(failure))
        self.failure = failure
        self.wait = wait  # seconds; 0 if the server names none


def _retry_after(headers: Mapping[str, str], body: str) -> float:
    """Returns the seconds after which a server allows the next request; 0 if it names none.

    It may name milliseconds (OpenAI, Azure), seconds or a date (RFC 9110, 10.2.3), or write them
    into the body (Google).
    """
    told = headers.get("Retry-After", "")
    delay = _RETRY_DELAY.search(body)
    options = (
        _number(headers.get("retry-after-ms", "")) / 1000,
        _number(told),
        _until(told, headers.get("Date", "")),
        _number(delay[1]) if delay else 0.0,
    )
    return next((secs for secs in options if secs > 0), 0.0)


def _number(text: str) -> float:
    """Returns the finite number of at least 0 that a text states; 0 for any other text."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0 < value < math.inf else 0.0


def _until(date: str, now: str) -> float:
    """Returns the seconds until an HTTP date; 0 if it has passed or is not a date.

    Args:
        date: the date.
        now: the server's date of writing, which is used if its clock differs from ours.
    """
    end = _timestamp(date)
    if end is None:
        return 0.0
    here = time.time()
    there = _timestamp(now)
    is_wrong = there is not None and abs(there - here) > _CLOCK_SECS
    return max(end - (there if is_wrong and there is not None else here), 0.0)


def _timestamp(date: str) -> float | None:
    try:
        parsed = email.utils.parsedate_to_datetime(date)
    except (ValueError, TypeError, OverflowError):
        return None
    if parsed.tzinfo is None:
        parsed = parsed.replace(tzinfo=datetime.UTC)
    return parsed.timestamp()


def _proxy(base_url: str) -> str | None:
    """Returns the proxy of the environment for an address; None for one on this host."""
    url = yarl.URL(base_url)
    host = url.host or ""
    # A proxy would look for the server on its own host.
    if host in ("localhost", "::1") or host.startswith("127."):
        return None
    if urllib.request.proxy_bypass(f"{host}:{url.port}"):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(url.scheme) or proxies.get("all")


def _check_patience(end: float, paused: _PausedError) -> None:
    """Checks that the server may be asked again; raises as final what retries would wait out."""
    if time.monotonic() > end:
        raise _TransientError(paused.failure, final=True) from None
