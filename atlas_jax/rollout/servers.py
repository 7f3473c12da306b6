"""Pool of the vLLM servers of one role.

A request goes to the server with the fewest requests of this process, and where several have as
few, to the one after the last that was chosen. A server that cannot be reached, or whose health
check fails or hangs, is taken out of the pool, and its requests go to the others. It returns when
it is healthy and serves weights that have passed their probe; if it was started again with others,
the pool has it load the current ones. A server that cannot be reached when the pool opens joins
later.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from absl import logging

from atlas_jax import progress, stopping
from atlas_jax.llm_client import (
    Client,
    ClientOptions,
    RefusedError,
    ServerError,
    UnavailableError,
)
from atlas_jax.rollout import capabilities
from atlas_jax.types import DependencyError

T = TypeVar("T")

UNEXPECTED = (KeyError, IndexError, TypeError, ValueError, AttributeError)
"""Errors of reading a reply that does not have the form of vLLM's."""

_REFUSED_REQUEST = frozenset({400, 413, 422})
"""Statuses for a faulty request, not for missing rights or a wrong address."""

_MOST_LOST = 3
"""Number of servers that go down during one request before it counts as the cause."""

_REACHED_SECS = 0.02
"""Seconds between two looks of a request for weights that are on their way to the servers."""

_PAUSED = "it is paused, and not by this run"
_WAITS = "it waits for new weights"
_STALE = "it has other weights than the current ones"

_CLOSE_SECS = 3.0
"""Seconds that closing waits for requests in flight to give up."""


class Look(NamedTuple):
    """Options of the health checks of a server."""

    every_secs: float = 5.0
    """Seconds between two checks."""
    timeout_secs: float = 10.0
    """Seconds that a server has to answer one check."""
    misses: int = 3
    """Number of consecutive failed checks after which a server is taken out."""
    cpu_engine_secs: float = 300.0
    """Seconds that one step of generation may take on a CPU."""
    patience_secs: float = 30.0
    """Seconds of waiting for a hanging server to answer again if no other one is left."""


class PoolOptions(NamedTuple):
    """Limits of the requests to servers."""

    max_in_flight: int
    """Number of requests that a server has at one time."""
    request_timeout_secs: float
    """Seconds that a completion may take, its wait for a paused server included."""
    control_timeout_secs: float
    """Seconds that pausing, reloading or another control call may take."""
    look: Look = Look()
    first: int = 0
    """Number of the server that gets the first request, another one in each process of a run."""


@dataclasses.dataclass(eq=False)
class Server:
    """The state of one server, which only the pool's thread changes.

    Attributes:
        url: the address.
        client: the client for completions, which retries.
        control: the client for calls that must not be repeated.
        start: the options of its start; None until it has answered.
        up: whether it gets requests.
        why: the reason for which it gets none.
        hangs: whether it is down because it did not answer in time.
        misses: the number of consecutive failed checks.
        versions: versions, by label, of weights that it served and that passed their probe.
        tasks: the completion requests in flight.
        pushing: the task of a push at this server, cancelled when it is taken out.
        loading: the lock of whoever loads weights into it while it is down.
    """

    url: str
    client: Client
    control: Client
    start: capabilities.ServerStart | None = None
    up: bool = True
    why: str = ""
    hangs: bool = False
    misses: int = 0
    versions: dict[str, int] = dataclasses.field(default_factory=dict)
    tasks: set[asyncio.Task[Any]] = dataclasses.field(default_factory=set)
    pushing: asyncio.Task[None] | None = None
    loading: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)


class CompletionReply(NamedTuple):
    """A reply to a completion request."""

    server: Server
    reply: Any
    version: int
    """Version of the weights when the prompt was sent.

    If the prompt's keys and values were cached, weights of this version may have computed them."""


class ServerPool:
    """The servers of one role. Methods may be called from any thread, coroutines from its own."""

    def __init__(
        self, role: str, urls: Sequence[str], options: PoolOptions, api_key: str = ""
    ) -> None:
        """Starts the thread that talks to the servers; `open` sends the first requests.

        Args:
            role: the name of the model that they serve, for messages.
            urls: the addresses of the servers.
            options: the limits of requests.
            api_key: the key for every request; "" for none.
        """
        self.role = role
        self.read_start: Callable[..., capabilities.ServerStart] = capabilities.check_start
        """Function that reads and checks the options of a server's start, for GRPO or another."""
        self.options = options
        self.label: str | None = None
        """Label of the weights that all servers must have; None if no weights are pushed."""
        self.version = 0
        """Version of these weights."""
        self.rejoin: Callable[[Server], Awaitable[str]] | None = None
        """Function that loads the current weights into a server that is down and has others.

        It returns the problem, "" if the server has passed its checks. None if that takes a push.
        """
        self.restarts = False
        """True if each push restarts the servers, which then fail health checks meanwhile."""
        self._check: Callable[[str, capabilities.ServerStart], None] = _accept
        self._is_open = False
        self._closed = False
        self._next = options.first
        self._lock = threading.Lock()
        self._waiting: set[concurrent.futures.Future[Any]] = set()
        self._watches: list[asyncio.Task[None]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name=role)
        self._thread.start()
        self.settled = asyncio.Event()
        """Event that is cleared during a push.

        While it is cleared no request is sent, and `Server.versions` is not up to date."""
        self.servers: list[Server] = self.begin(self._connect(urls, api_key)).result()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Returns the result of a coroutine that runs in the pool's thread.

        The watch of a run's processes grants it the time of one request beyond the stall limit,
        counted from each answer.

        Raises:
            StopRequestedError: as soon as the run is asked to stop.
            DependencyError: if the pool is closed before the coroutine is done.
        """
        return self.result(self.begin(coroutine))

    def result(self, future: concurrent.futures.Future[T]) -> T:
        """Returns the result of what `begin` has begun, with the errors of `run`."""
        try:
            with progress.waiting(self.options.request_timeout_secs):
                return stopping.result(future)
        except concurrent.futures.CancelledError:
            raise self._ended() from None

    async def elsewhere(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Returns the result of a coroutine that runs in the pool's thread, on another loop.

        Raises:
            DependencyError: if the pool is closed before the coroutine is done.
        """
        with progress.waiting(self.options.request_timeout_secs):
            try:
                return await asyncio.wrap_future(self.begin(coroutine))
            except asyncio.CancelledError:
                if is_cancelled():
                    raise
                raise self._ended() from None

    def _ended(self) -> DependencyError:
        return DependencyError(f"the connection to the {self.role} servers was closed")

    def call(self, function: Callable[[], None]) -> None:
        """Calls a function in the pool's thread, and returns when it has returned."""

        async def once() -> None:
            function()

        self.begin(once()).result()

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Starts a coroutine in the pool's thread and returns at once.

        Raises:
            DependencyError: if the pool is closed.
        """
        with self._lock:
            if self._closed:
                coroutine.close()
                raise DependencyError(f"the connection to the {self.role} servers is closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return future

    async def _connect(self, urls: Sequence[str], api_key: str) -> list[Server]:
        self.settled.set()
        options = self.options
        completions = ClientOptions(
            max_in_flight=options.max_in_flight,
            timeout_secs=options.request_timeout_secs,
            retry_timeouts=False,
        )
        once = ClientOptions(timeout_secs=options.control_timeout_secs, max_tries=1)
        servers = [
            Server(url, Client(url, api_key, completions), Client(url, api_key, once))
            for url in urls
        ]
        for server in servers:
            await server.client.__aenter__()
            await server.control.__aenter__()
        return servers

    def open(self, check: Callable[[str, capabilities.ServerStart], None] | None = None) -> None:
        """Checks the model and the routes of every server, and starts the health checks.

        A server that cannot be reached is taken out if another one is left.

        Args:
            check: a function of a server's address and start options, which raises `ValueError` if
                the server has the wrong model.

        Raises:
            ValueError: if no server can be reached, or one does not meet the run's needs.
        """
        self._check = check or _accept
        self.run(self._open())

    async def _open(self) -> None:
        look = self.options.look
        secs = look.misses * look.timeout_secs
        found = await asyncio.gather(
            # A server that hangs must not hold up the start.
            *(asyncio.wait_for(self.admit(server), secs) for server in self.servers),
            return_exceptions=True,
        )
        lost = []
        for server, problem in zip(self.servers, found, strict=True):
            if isinstance(problem, ServerError | TimeoutError):
                lost.append(f"{server.url}: {problem or 'no reply'}")
                self.drop(server, str(problem) or "no reply")
            elif problem is not None:
                raise problem
        if len(lost) == len(self.servers):
            raise ValueError(
                f"cannot use the {self.role} server {'; '.join(lost)}. Start it with "
                "python -m atlas_jax.serve, and look at /health"
            )
        self._is_open = True
        self._watches = [
            asyncio.create_task(watch(server))
            for server in self.servers
            for watch in (self._watch, self._watch_engine)
        ]

    async def admit(self, server: Server) -> None:
        """Reads and checks the options of a server's start.

        Raises:
            ServerError: if the server does not answer.
            ValueError: if it does not meet the run's needs.
        """
        get = server.control.get
        try:
            version = (await get("/version"))["version"]
            paths = (await get("/openapi.json"))["paths"]
            capabilities.check_routes(server.url, version, paths)
            info = await get("/server_info", {"config_format": "json"})
            model = (await get("/v1/models"))["data"][0]
        except RefusedError as error:
            raise ValueError(
                f"the {self.role} server {server.url} refuses {error}; give trainer and server the "
                "same key, and start the server with python -m atlas_jax.serve"
            ) from None
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{server.url} does not answer as a vLLM server ({type(error).__name__}: {error}); "
                "start it with python -m atlas_jax.serve"
            ) from None
        start = self.read_start(server.url, info, model)
        start = start._replace(loads_adapters=capabilities.LOAD_ADAPTER in paths)
        self._check(server.url, start)
        if self._is_open:
            self._check_fits(server, start)
        server.start = start
        if start.policy != capabilities.PRIORITY:
            logging.warning(
                "%s server %s runs with --scheduling-policy %s: the probe of new weights waits "
                "after its queue; start it with python -m atlas_jax.serve",
                *(self.role, server.url, start.policy),
            )
        logging.info("%s server %s: vLLM %s, %s", self.role, server.url, version, start.root)

    def _check_fits(self, server: Server, start: capabilities.ServerStart) -> None:
        """Checks that a server can do what the run has planned with those of its start.

        Raises:
            ValueError: if it takes shorter completions or caches larger blocks than they do.
        """
        others = [s.start for s in self.servers if s.start and s is not server]
        length = min((other.max_model_len for other in others), default=0)
        block = max((other.block_size for other in others), default=start.block_size)
        if start.max_model_len < length or start.block_size > block:
            raise ValueError(
                f"{server.url} has --max-model-len {start.max_model_len} and --block-size "
                f"{start.block_size}, the servers that the run began with {length} and {block}; "
                "start it with these"
            )

    @property
    def starts(self) -> list[capabilities.ServerStart]:
        """The start options of the servers that have answered."""
        return [server.start for server in self.servers if server.start]

    def _choose(self) -> Server:
        """Returns the server for the next request.

        Raises:
            DependencyError: if no server is left.
        """
        up = set(self.up())
        loads = [len(server.tasks) if server in up else None for server in self.servers]
        number = least_loaded(loads, self._next)
        self._next = number + 1
        return self.servers[number]

    def up(self) -> list[Server]:
        """Returns the servers that get requests.

        Raises:
            DependencyError: if no server is left.
        """
        servers = [server for server in self.servers if server.up and not self._closed]
        if not servers:
            reasons = "; ".join(f"{s.url}: {s.why or 'closed'}" for s in self.servers)
            raise DependencyError(f"no {self.role} server is left: {reasons}")
        return servers

    async def wait_for_one(self) -> None:
        """Waits a moment if no server is left but a hanging one may recover.

        Raises:
            DependencyError: if none recovers in time.
        """
        end = time.monotonic() + self.options.look.patience_secs
        while not any(server.up for server in self.servers):
            if time.monotonic() > end or not any(server.hangs for server in self.servers):
                self.up()
            await asyncio.sleep(0.2)

    async def reached(self, version: int) -> None:
        """Waits until the servers have weights of this version or a later one.

        Raises:
            DependencyError: if no server is left.
        """
        while self.version < version:
            await self.wait_for_one()
            await asyncio.sleep(_REACHED_SECS)

    async def ask(
        self, payload: Mapping[str, Any], server: Server | None = None
    ) -> CompletionReply:
        """Returns the answer to a completion request.

        Requests share cached keys and values only if they were sent under the same weights;
        `cache_salt` separates the others.

        Args:
            payload: the body of the request.
            server: the server that is tried first; None takes the one with the fewest requests. If
                it fails, another one is tried.

        Raises:
            RefusedError: if servers refuse this request.
            UnavailableError: if a healthy server fails to answer this request, or several servers
                went down during it.
            DependencyError: if no server is left.
        """
        lost = 0
        while True:
            # A request that began during a push could be computed by two versions.
            await self.settled.wait()
            if server is None or not server.up or self._closed:
                await self.wait_for_one()
                server = self._choose()
            # Read before the request is sent: a push may change both while it waits in the server.
            version = self.version
            salt = {"cache_salt": self.label} if self.label else {}
            body = {**payload, **salt}
            task = asyncio.create_task(server.client.post(capabilities.GENERATE, body))
            server.tasks.add(task)
            try:
                answer = CompletionReply(server, await task, version)
                progress.mark()
                return answer
            except RefusedError as error:
                if error.status in _REFUSED_REQUEST:
                    raise
                self.drop(server, f"says no: {error}")
            except UnavailableError as error:
                await self._drop_unless_well(server, error)
            except asyncio.CancelledError:
                # `drop` cancels the requests of a server, which are then sent to another one.
                if server.up or is_cancelled():
                    raise
            finally:
                server.tasks.discard(task)
            # A request that ends servers must not go through all of them.
            lost += 1
            if lost == _MOST_LOST:
                raise UnavailableError(
                    server.url, 0, f"{lost} servers went down while they worked on it"
                )

    async def _drop_unless_well(self, server: Server, error: UnavailableError) -> None:
        """Takes out a server that did not answer a request; raises the error if it is healthy."""
        # The check tells a server that has failed from a request that it cannot answer.
        problem, hangs = await self._look(self._front(server), self.options.look.timeout_secs)
        if server.up and not problem:
            raise error
        self.drop(server, f"{error}; {problem}", hangs=hangs)

    def drop(self, server: Server, why: str, *, hangs: bool = False) -> None:
        """Takes a server out of the pool; its requests go to the others.

        Args:
            server: the server.
            why: the reason, for messages.
            hangs: whether it may answer again by itself.
        """
        if not server.up:
            return
        logging.error("%s server %s is taken out: %s", self.role, server.url, why)
        _note(server, False, why, hangs)
        # `ask` sends them to another server.
        for task in server.tasks:
            task.cancel()
        if server.pushing:
            server.pushing.cancel()

    def take_back(self, server: Server) -> None:
        """Returns a server to the pool."""
        if not server.up:
            logging.info("%s server %s is back", self.role, server.url)
        _note(server, True)

    async def _watch(self, server: Server) -> None:
        """Checks a server's health for ever, takes it out if it fails, and back if it recovers."""
        look = self.options.look
        while True:
            await asyncio.sleep(look.every_secs)
            # A server that was down may have been replaced, so it must pass all checks again.
            work = self._front(server) if server.up else self._whole(server)
            problem, hangs = await self._look(work, look.timeout_secs)
            if problem == _STALE:
                work = self._load_current(server)
                problem, hangs = await self._look(work, self.options.control_timeout_secs)
            if not problem:
                # During a push the server may have the old weights; the push brings it back itself.
                if not server.up and self.settled.is_set():
                    self.take_back(server)
                server.misses = 0
                continue
            server.misses += 1
            if not server.up:
                server.hangs = hangs
                self._note(server, problem)
            elif server.misses >= look.misses:
                self.drop(server, problem, hangs=hangs)

    def _note(self, server: Server, problem: str) -> None:
        """Records why a server stays out, and logs a reason that is new."""
        if self.settled.is_set() and problem != server.why:
            logging.warning("%s server %s stays out: %s", self.role, server.url, problem)
            server.why = problem

    async def _load_current(self, server: Server) -> str:
        """Loads the current weights into a server that was started with others."""
        async with server.loading:
            label = self.label
            if not self.settled.is_set() or label is None or self.rejoin is None:
                return _WAITS
            problem = await self.rejoin(server)
            if problem or label != self.label or not self.settled.is_set():
                return problem or _WAITS
            server.versions[label] = self.version
        return ""

    async def _watch_engine(self, server: Server) -> None:
        """Checks for ever that a server's engine works and has the right weights.

        An engine answers between two steps of generation, which may take minutes on a CPU.
        """
        look = self.options.look
        misses = 0
        while True:
            await asyncio.sleep(look.every_secs)
            label = self.label
            on_cpu = server.start is not None and server.start.device == "cpu"
            secs = look.cpu_engine_secs if on_cpu else look.misses * look.timeout_secs
            if not server.up or not self.settled.is_set():
                continue
            problem, hangs = await self._look(self._engine(server), secs)
            if not self.settled.is_set() or label != self.label:
                continue  # the engine was busy with a push
            # Without another server, requests wait at a paused one until it is resumed.
            waits = problem == _PAUSED and not any(s.up for s in self.servers if s is not server)
            misses = misses + 1 if problem and not waits else 0
            if hangs or misses >= look.misses:
                self.drop(server, problem, hangs=hangs)
                misses = 0

    async def _look(self, work: Coroutine[Any, Any, str], secs: float) -> tuple[str, bool]:
        """Returns the problem that `work` reports, or "", and whether the server hangs."""
        try:
            async with asyncio.timeout(secs):
                return await work, False
        except TimeoutError:
            return f"its health check got no answer within {secs:g} s", True
        except ServerError as error:
            return f"its health check failed: {error}", False
        except (ValueError, OSError) as error:  # from comparing its model with files of this host
            return str(error), False
        except UNEXPECTED as error:
            return f"its health check is unreadable: {type(error).__name__} {error}", False

    async def _front(self, server: Server) -> str:
        """Checks the front-end process; a server that is being restarted has none."""
        if self.settled.is_set() or not self.restarts:
            await server.control.get("/health")
        return ""

    async def _engine(self, server: Server) -> str:
        """Checks the engine, which may hang although the front end answers."""
        label = self.label
        if (await server.control.get("/is_paused"))["is_paused"]:
            return _PAUSED
        served = (await server.control.get("/weight_info"))["weight_version"]
        if label is not None and (served != label or label not in server.versions):
            return f"it serves the weights {served!r}, not the {label!r} that passed their probe"
        return ""

    async def _whole(self, server: Server) -> str:
        """Makes all checks that a server must pass before it returns to the pool."""
        if not self.settled.is_set():
            return _WAITS
        await server.control.get("/health")
        problem = await self._engine(server)
        if problem == _PAUSED or (problem and not self.rejoin):
            return problem
        await self.admit(server)  # the address may have another server now
        return _STALE if problem else ""

    def close(self) -> None:
        """Cancels requests in flight and ends the thread, even if something hangs."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        ending = asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop)
        try:
            ending.result(2 * _CLOSE_SECS)
        except TimeoutError:
            logging.warning("the connection to the %s servers does not close", self.role)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_SECS)
        # Whoever waits in another thread would wait for ever for a loop that has ended.
        for future in list(self._waiting):
            future.cancel()
        if not self._thread.is_alive():
            self._loop.close()

    async def _disconnect(self) -> None:
        self.settled.set()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_SECS)
        for server in self.servers:
            await server.client.__aexit__(None, None, None)
            await server.control.__aexit__(None, None, None)


def least_loaded(loads: Sequence[int | None], first: int) -> int:
    """Returns the number of the server with the smallest load, None standing for one that is down.

    Of several with the same load it is the first one from number `first` on, counted in a circle.
    """
    order = [number % len(loads) for number in range(first, first + len(loads))]
    return min(
        (number for number in order if loads[number] is not None),
        key=lambda number: loads[number] or 0,
    )


def is_cancelled() -> bool:
    """Returns whether the current task itself was cancelled, not only one that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _note(server: Server, up: bool, why: str = "", hangs: bool = False) -> None:
    """Notes whether a server is in the pool, and else why it is not."""
    server.up, server.why, server.hangs, server.misses = up, why, hangs, 0


def _accept(_: str, __: capabilities.ServerStart) -> None:
    """Accepts any server."""
