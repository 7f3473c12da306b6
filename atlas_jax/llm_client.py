"""An async client of OpenAI-compatible HTTP servers: vLLM for rollouts, any endpoint for judges.

It posts JSON and returns JSON. Connection errors, time-outs, 429 and 5xx are tried again with
exponential back-off and jitter, or after what `Retry-After` says; every other refusal is final.
A vLLM server that refuses requests because it is paused is asked again until it has resumed.
Imports no JAX.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import aiohttp

from atlas_jax import masking

_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_SHOWN = 300  # characters of a reply that an error message repeats
_PAUSED = ("engine_paused", "Generation is paused")  # in the body of vLLM's 503
_PAUSED_SECS = 0.5  # mean wait between two requests to a paused server


class ClientOptions(NamedTuple):
    """How one server is asked."""

    max_in_flight: int = 64
    """Requests that the server has at one time; the others wait here."""
    timeout_secs: float = 600.0
    """Longest that one try may take, its connection included; also the longest that a request
    waits for a paused server to resume."""
    connect_timeout_secs: float = 10.0
    """Longest that opening a connection may take."""
    max_tries: int = 4
    """Tries of one request; 1 repeats nothing."""
    retry_timeouts: bool = True
    """Whether a request is tried again that got no reply within `timeout_secs`."""
    backoff_secs: float = 0.5
    """Mean wait before the second try; doubled before each further one."""
    max_backoff_secs: float = 30.0
    """Longest wait between two tries, `Retry-After` included."""
    requests_per_minute: float = 0.0
    """Tries that begin in a minute; 0 is no limit."""
    max_failures_in_row: int = 0
    """Tries in a row that may fail, over all requests, before the server counts as down and every
    request fails at once; 0 is no limit."""


class ServerError(Exception):
    """A request that brought no usable reply.

    Attributes:
        url: of the request.
        status: of the last reply, 0 where there was none.
        body: the start of the last reply, or what went wrong instead of one.
    """

    def __init__(self, url: str, status: int, body: str) -> None:
        # Secrets are hidden before the text is cut, which could leave a part of one.
        shown = " ".join(masking.hide(body[: 4 * _SHOWN])[:_SHOWN].split())  # errors have one line
        super().__init__(f"{masking.hide(url)}: {status or 'no reply'}: {shown}")
        self.url, self.status, self.body = url, status, body


class RefusedError(ServerError):
    """The server is well and will not do what it was asked; asking again would not help."""


class UnavailableError(ServerError):
    """The server cannot be reached or is in trouble, after every try."""


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


class Tries:
    """The requests that one call may make, over all that it asks for."""

    def __init__(self, most: int) -> None:
        """Allows `most` requests."""
        self.left = most
        self.made = 0


class Client:
    """Connections to one server; use it in `async with`, inside one event loop."""

    def __init__(
        self,
        base_url: str,
        api_key: str = "",
        options: ClientOptions | None = None,
        admit: Callable[[], str] = str,
    ) -> None:
        """Makes a client; nothing is connected yet.

        Args:
            base_url: what paths are appended to, with or without a slash at its end.
            api_key: sent as a bearer token unless empty; never part of an error or a log.
            options: None takes the defaults.
            admit: called before each try; what it returns unless empty is why there is none.
        """
        self.base_url = base_url.rstrip("/")
        self.num_retries = 0  # tries after the first, over all requests
        self._options = options or ClientOptions()
        self._api_key = api_key
        self._slots = asyncio.Semaphore(self._options.max_in_flight)
        self._admit = admit
        self._pace = Pace(self._options.requests_per_minute)
        self._failures_in_row = 0
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
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
        payload: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        tries: Tries | None = None,
    ) -> Any:
        """Returns the JSON reply to a POST; None where the reply is empty.

        Args:
            path: appended to the address.
            payload: sent as JSON.
            params: of the query.
            tries: requests that are left of a call with several posts; None allows `max_tries`.

        Raises:
            RefusedError: for a status that another try would not change.
            UnavailableError: after the last try, each of which brought a connection error, a
                time-out, 429, 5xx, or a reply that is not JSON.
        """
        return await self._request("POST", path, payload, params, tries)

    async def get(self, path: str, params: Mapping[str, str] | None = None) -> Any:
        """Returns the JSON reply to a GET; raises as `post` does."""
        return await self._request("GET", path, None, params, None)

    async def _request(
        self,
        method: str,
        path: str,
        payload: Mapping[str, Any] | None,
        params: Mapping[str, str] | None,
        tries: Tries | None,
    ) -> Any:
        url, wait = f"{self.base_url}{path}", 0.0
        failure = UnavailableError(url, 0, "not tried")
        tries = tries or Tries(self._options.max_tries)
        attempt = 0
        while tries.left:
            if attempt:
                self.num_retries += 1
                await asyncio.sleep(max(wait, self._backoff(attempt)))
            attempt += 1
            try:
                reply = await self._resumed(method, url, payload, params, tries)
                self._failures_in_row = 0
                return reply
            except _TransientError as later:
                self._failures_in_row += 1
                failure, wait = later.failure, min(later.wait, self._options.max_backoff_secs)
                if later.final:
                    break
        raise failure

    async def _resumed(
        self,
        method: str,
        url: str,
        payload: Mapping[str, Any] | None,
        params: Mapping[str, str] | None,
        tries: Tries,
    ) -> Any:
        """Returns the reply to one try; the time that the server is paused does not count."""
        end = time.monotonic() + self._options.timeout_secs
        while True:
            try:
                async with self._slots:
                    self._check(url)
                    if self._options.requests_per_minute:
                        await self._pace.wait()
                    tries.left -= 1
                    tries.made += 1
                    return await self._once(method, url, payload, params)
            except _PausedError as paused:
                tries.left += 1
                tries.made -= 1
                if time.monotonic() > end:
                    raise _TransientError(paused.failure, final=True) from None
            await asyncio.sleep(_PAUSED_SECS * random.uniform(0.5, 1.5))

    def _check(self, url: str) -> None:
        """Raises what stands against a try."""
        most = self._options.max_failures_in_row
        if most and self._failures_in_row >= most:
            why = f"given up after {self._failures_in_row} failures in a row"
            raise UnavailableError(url, 0, why)
        if why := self._admit():
            raise RefusedError(url, 0, why)

    async def _once(
        self,
        method: str,
        url: str,
        payload: Mapping[str, Any] | None,
        params: Mapping[str, str] | None,
    ) -> Any:
        if self._session is None:
            raise RuntimeError("the client is not open; use it in `async with`")
        try:
            # A redirect could lead a key to another server, or from https to http.
            async with self._session.request(
                method, url, json=payload, params=params, allow_redirects=False
            ) as reply:
                body = await reply.text(errors="replace")
                location = reply.headers.get("Location", "")
                retry_after = reply.headers.get("Retry-After", "")
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
        shown = body.replace(self._api_key, masking.HIDDEN) if self._api_key else body
        if status == 503 and any(sign in body for sign in _PAUSED):
            raise _PausedError(UnavailableError(url, status, shown))
        if status in _TRANSIENT or status >= 500:
            raise _TransientError(UnavailableError(url, status, shown), _seconds(retry_after))
        if 300 <= status < 400:
            raise RefusedError(url, status, f"moved to {location}; give that address")
        if status >= 400:
            raise RefusedError(url, status, shown)
        try:
            return json.loads(body) if body.strip() else None
        except ValueError:
            raise _TransientError(UnavailableError(url, status, f"not JSON: {shown}")) from None

    def _backoff(self, attempt: int) -> float:
        """Returns a wait in seconds before try number `attempt`, counted from 0."""
        mean = self._options.backoff_secs * 2 ** (attempt - 1)
        return min(mean * random.uniform(0.5, 1.5), self._options.max_backoff_secs)


class _TransientError(Exception):
    """A try that failed in a way that may pass."""

    def __init__(
        self, failure: UnavailableError, wait: float = 0.0, *, final: bool = False
    ) -> None:
        super().__init__(str(failure))
        self.failure = failure
        self.wait = wait
        self.final = final


class _PausedError(Exception):
    """A refusal of a server that is paused and will resume."""

    def __init__(self, failure: UnavailableError) -> None:
        super().__init__(str(failure))
        self.failure = failure


def _seconds(header: str) -> float:
    """Returns the seconds of a `Retry-After` header; dates and nonsense are 0."""
    try:
        return max(float(header), 0.0)
    except ValueError:
        return 0.0
