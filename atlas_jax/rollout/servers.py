"""The vLLM servers of one role as one thing to ask.

A request goes to the least-loaded server. One that does not answer is taken out, its requests go to
the others, and it comes back when it is healthy and has the weights of the others.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from absl import logging

from atlas_jax.llm_client import Client, ClientOptions, ServerError, UnavailableError
from atlas_jax.rollout import capabilities
from atlas_jax.types import DependencyError

T = TypeVar("T")

_HEALTH_SECS = 5.0


class PoolOptions(NamedTuple):
    """How servers are asked."""

    max_in_flight: int
    """Requests that a server has at one time."""
    request_timeout_secs: float
    """Longest that a completion may take, its wait for a paused server included."""
    control_timeout_secs: float
    """Longest that pausing, reloading or another control call may take."""


@dataclasses.dataclass(eq=False)
class Server:
    """One server.

    Attributes:
        url: its address.
        client: for completions; tries again.
        control: for what must not be repeated.
        up: whether it is asked.
        why: what took it out.
        root: the model that it was started with.
        max_model_len: tokens that a prompt and its completion may have together.
        versions: weights that it served and that passed their probe: label -> version.
        tasks: requests in flight.
    """

    url: str
    client: Client
    control: Client
    up: bool = True
    why: str = ""
    root: str = ""
    max_model_len: int = 0
    versions: dict[str, int] = dataclasses.field(default_factory=dict)
    tasks: set[asyncio.Task[Any]] = dataclasses.field(default_factory=set)


class Pool:
    """Servers of one role; its methods may be called from any thread, coroutines from its own."""

    def __init__(self, role: str, urls: Sequence[str], options: PoolOptions) -> None:
        """Starts the thread that talks to the servers; `open` asks them first.

        VLLM_API_KEY is sent where it is set.
        """
        self.role = role
        self.options = options
        self.label: str | None = None
        """Of the weights that all servers must have; None where nobody pushes any."""
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.settled = asyncio.Event()
        """Whether what servers have written can be judged by `Server.versions`."""
        self.servers = self.run(self._connect(urls))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Returns what a coroutine returns that runs in the pool's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def call(self, function: Callable[[], None]) -> None:
        """Calls a function in the pool's thread."""

        async def once() -> None:
            function()

        self.run(once())

    async def _connect(self, urls: Sequence[str]) -> list[Server]:
        self.settled.set()
        most, patience, control_secs = self.options
        asked = ClientOptions(max_in_flight=most, timeout_secs=patience)
        once = ClientOptions(timeout_secs=control_secs, max_tries=1)
        key = os.environ.get("VLLM_API_KEY", "")
        servers = [Server(url, Client(url, key, asked), Client(url, key, once)) for url in urls]
        for server in servers:
            await server.client.__aenter__()
            await server.control.__aenter__()
        return servers

    def open(self) -> None:
        """Asks every server what it is and can.

        Raises:
            ValueError: if one cannot be reached or lacks what GRPO needs.
        """
        self.run(self._open())

    async def _open(self) -> None:
        for server in self.servers:
            try:
                version = (await server.control.get("/version"))["version"]
                paths = (await server.control.get("/openapi.json"))["paths"]
                capabilities.check_routes(server.url, version, paths)
                info = await server.control.get("/server_info", {"config_format": "json"})
                capabilities.check_start(server.url, info)
                (model,) = (await server.control.get("/v1/models"))["data"]
            except ServerError as error:
                raise ValueError(
                    f"cannot use the {self.role} server {server.url}: {error}. Start it with "
                    "python -m atlas_jax.serve, and look at /health"
                ) from None
            server.root, server.max_model_len = model["root"], model["max_model_len"]
            logging.info("%s server %s: vLLM %s, %s", self.role, server.url, version, server.root)

    def spread(self, sizes: Sequence[int]) -> list[Server]:
        """Returns a server for each group of requests, so that the loads become even.

        Raises:
            DependencyError: if no server is left.
        """
        loads = {server: len(server.tasks) for server in self.up()}
        chosen = []
        for size in sizes:
            server = min(loads, key=lambda s: loads[s])
            loads[server] += size
            chosen.append(server)
        return chosen

    def up(self) -> list[Server]:
        """Returns the servers that are asked.

        Raises:
            DependencyError: if there is none.
        """
        found = [server for server in self.servers if server.up and not self._closed]
        if not found:
            reasons = "; ".join(f"{s.url}: {s.why or 'closed'}" for s in self.servers)
            raise DependencyError(f"no {self.role} server is left: {reasons}")
        return found

    async def ask(self, payload: Mapping[str, Any], server: Server) -> tuple[Server, Any]:
        """Returns who answered a completion request, and the answer.

        Args:
            payload: of the request.
            server: who is asked first; another one if that one fails.

        Raises:
            RefusedError: if the server will not have it.
            DependencyError: if no server is left.
        """
        while True:
            if not server.up or self._closed:
                server = min(self.up(), key=lambda s: len(s.tasks))
            task = asyncio.create_task(server.client.post(capabilities.GENERATE, payload))
            server.tasks.add(task)
            try:
                return server, await task
            except UnavailableError as error:
                self.drop(server, str(error))
            except asyncio.CancelledError:
                if server.up and not self._closed:
                    raise
            finally:
                server.tasks.discard(task)

    def drop(self, server: Server, why: str) -> None:
        """Takes a server out; what it was asked goes to the others."""
        if not server.up:
            return
        logging.error("%s server %s is taken out: %s", self.role, server.url, why)
        server.up, server.why = False, why
        for task in server.tasks:
            task.cancel()

    async def revive(self) -> None:
        """Takes back the servers that are healthy and have the weights of the others."""
        down = [server for server in self.servers if not server.up]
        for server, well in zip(down, await asyncio.gather(*map(self._well, down)), strict=True):
            if well:
                logging.info("%s server %s is back", self.role, server.url)
                server.up, server.why = True, ""

    async def _well(self, server: Server) -> bool:
        try:
            async with asyncio.timeout(_HEALTH_SECS):
                await server.control.get("/health")
                paused = (await server.control.get("/is_paused"))["is_paused"]
                label = (await server.control.get("/weight_info"))["weight_version"]
        except (ServerError, TimeoutError):
            return False
        return not paused and self.label in (None, label)

    def close(self) -> None:
        """Gives up what is in flight and ends the thread."""
        self._closed = True
        self.run(self._disconnect())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _disconnect(self) -> None:
        self.settled.set()
        tasks = [task for server in self.servers for task in server.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self.servers:
            await server.client.__aexit__(None, None, None)
            await server.control.__aexit__(None, None, None)
