"""One try to bring a version of the weights into the servers, and what shows that it worked.

Each server is paused, loads the version, forgets its prefix cache, takes the version's label and
resumes. Two things show that it serves these weights: checksums of its tensors, which say that they
have changed and are those of the other servers; and a probe, a fixed prompt that it continues twice
and whose log-probabilities the trainer computes too. The prompt spans several blocks of the prefix
cache, so that keys and values of older weights would be found out.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import pathlib
import time
import zlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from atlas_jax.files import write_whole
from atlas_jax.llm_client import ServerError, UnavailableError
from atlas_jax.rollout import capabilities
from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.servers import UNEXPECTED, Server
from atlas_jax.rollout.vllm import VllmEngine, payload
from atlas_jax.types import Completion, Params

LATEST = "latest"
"""File that names the newest version, for servers that are started again with it."""

PROBES = 2
"""Times that a server is asked the probe: the second one finds the prompt in the cache."""

_PROBE_PRIORITY = -1  # below that of completions, so that the probe goes ahead of them
_FEW_SEQUENCES = 32
"""Requests that a server works on at one time, up to which those in flight are recomputed.

A server with more of them ends one soon, and takes the probe then; recomputing the keys and values
of hundreds would cost more than that."""
_ARRIVAL_SECS = 0.05  # for the probe to reach the queue of a server that then resumes
_LATE_SECS = 5.0  # that a push waits for servers that were down, after the others are ready
_PAUSE_SECS = 10.0  # for pausing a server again that is left out


class PushError(Exception):
    """A server whose replies are in order, and which has other weights than it should."""


_FAILURES = (PushError, ServerError, TimeoutError, *UNEXPECTED)
"""What one server may do wrong in a push, without harm to the others."""


class PushOptions(NamedTuple):
    """How weights are pushed."""

    dtype: str
    """dtype of the weights on their way."""
    pause_mode: str
    """`keep` freezes what is in flight and lets it go on with the new weights; `wait` lets it end
    first."""
    tolerance: float
    """Mean absolute difference of the probe's log-probabilities, in nats, above which the server
    is held to have other weights."""
    restart: bool
    """Whether servers load a version by being started again with it, by whoever follows the file
    `latest`."""


class Probe(NamedTuple):
    """What shows that a server has the trainer's weights."""

    request: Request
    sampling: Sampling
    logprobs: Callable[[Params, Sequence[int], np.ndarray], np.ndarray]
    """The trainer's log-probabilities of continuations `[N, tokens]` of one prompt; every process
    calls it together."""


Checksums = Mapping[str, str]
"""Tensor of a server's worker -> checksum."""


class Push:
    """One try, in the pool's thread of the process that talks to the servers.

    Attributes:
        bad: servers that have not the version, with the reason.
        probes: continuations of the probe by each server that resumed.
        checksums: checksums of each server that loaded.
        secs: seconds of each phase, as metrics.
        num_uncleared: servers that could not forget their prefix cache.
    """

    def __init__(
        self,
        engine: VllmEngine,
        options: PushOptions,
        probe: Probe,
        last: Mapping[Server, Checksums],
    ) -> None:
        """Asks nothing yet.

        Args:
            engine: reads what the servers write.
            options: how weights are pushed.
            probe: the probe; its seed is changed for each version.
            last: checksums of the last version, which must change; empty where they need not.
        """
        self._engine = engine
        self._pool = engine.pool
        self._options = options
        self._probe = probe
        self._last = last
        self._paused = asyncio.Event()
        self._must: list[Server] = []
        self.bad: dict[Server, str] = {}
        self.probes: dict[Server, list[Completion]] = {}
        self.checksums: dict[Server, Checksums] = {}
        self.secs: dict[str, float] = {}
        self.num_uncleared = 0

    @property
    def is_whole(self) -> bool:
        """Whether every server that was up has the version, or one that was down if none was."""
        return bool(self.probes) and not any(server in self.bad for server in self._must)

    @property
    def reasons(self) -> list[tuple[str, str]]:
        """Address and reason of each server that has not the version."""
        return [(server.url, why) for server, why in self.bad.items()]

    async def run(self, directory: pathlib.Path, label: str, final: bool) -> None:
        """Brings a version into the servers.

        Servers that are down are tried beside the others and do not delay them.

        Args:
            directory: directory of the version.
            label: label of the version.
            final: whether servers resume although another one has failed.

        Raises:
            OSError: if the file `latest` cannot be written.
        """
        limit = self._pool.options.control_timeout_secs
        end = time.monotonic() + limit
        must = self._must = [server for server in self._pool.servers if server.up]
        late = [
            asyncio.create_task(self._late(directory, label, server))
            for server in self._pool.servers
            if not server.up
        ]
        try:
            await self._each("sync/pause_secs", must, self.pause, end)
            if self._options.restart:
                write_whole(directory.parent / LATEST, f"{directory}\n")
            self._paused.set()
            load = functools.partial(self._take, directory, label)
            await self._each("sync/load_secs", must, load, end)
            if late:
                some = any(server not in self.bad for server in must)
                await asyncio.wait(late, timeout=_LATE_SECS if some else limit)
        finally:
            for task in late:
                task.cancel()
        loaded = [server for server in self._pool.servers if server not in self.bad]
        if final or not any(server in self.bad for server in must):
            ask = functools.partial(self._ask, label)
            await self._each("sync/probe_secs", loaded, ask, time.monotonic() + limit)

    async def _each(
        self,
        name: str,
        servers: Sequence[Server],
        do: Callable[[Server], Coroutine[Any, Any, None]],
        end: float,
    ) -> None:
        """Does one phase at each server that has not failed, and notes its seconds.

        Args:
            name: metric of the phase's seconds.
            servers: where it is done.
            do: function of a server that does it.
            end: time at which a server that is not ready has failed.
        """
        start = time.monotonic()
        tasks = {}
        for server in servers:
            if server not in self.bad:
                tasks[server] = asyncio.create_task(self._noting(server, do(server)))
                server.pushing = tasks[server]
        try:
            if tasks:
                await asyncio.wait(tasks.values(), timeout=max(end - start, 0.0))
            for server, task in tasks.items():
                if task.done():
                    task.result()  # raises what `_noting` does not take for the server's fault
                else:
                    self.bad[server] = f"no answer within {end - start:.0f} s"
        finally:
            for server, task in tasks.items():
                task.cancel()
                server.pushing = None
        self.secs[name] = time.monotonic() - start

    async def _noting(self, server: Server, work: Coroutine[Any, Any, None]) -> None:
        """Does something at one server; its failure is noted and does not touch the others."""
        try:
            await work
        except asyncio.CancelledError:
            if server.up:  # else it was taken out meanwhile
                raise
            self.bad[server] = server.why
        except _FAILURES as error:
            self.bad[server] = _reason(error).removeprefix(server.url)

    async def _late(self, directory: pathlib.Path, label: str, server: Server) -> None:
        """Brings a version into a server that is down, if it can be reached at once."""

        async def bring() -> None:
            async with asyncio.timeout(_LATE_SECS):
                await server.control.get("/health")
                await self._pool.admit(server)  # it may be another one now
            await self.pause(server)
            await self._paused.wait()
            await self._take(directory, label, server)
            del self.bad[server]

        self.bad[server] = server.why
        await self._noting(server, bring())

    async def pause(self, server: Server) -> None:
        """Stops a server; what it is asked meanwhile waits."""
        # What is in flight would not outlive a restart.
        mode = "wait" if self._options.restart else self._options.pause_mode
        await server.control.post("/pause", params={"mode": mode, "clear_cache": "false"})

    async def _pause_again(self, server: Server) -> None:
        """Stops a server that is left out; that it cannot be stopped is only logged."""
        try:
            async with asyncio.timeout(_PAUSE_SECS):
                await self.pause(server)
        except _FAILURES as error:
            logging.warning("%s cannot be paused: %s %s", server.url, type(error).__name__, error)

    async def _take(self, directory: pathlib.Path, label: str, server: Server) -> None:
        """Has a server take the weights and their label."""
        control = server.control
        if self._options.restart:
            await self._restarted(directory, server)
        else:
            how = {"weights_path": str(directory)}
            await control.post("/collective_rpc", {"method": "load_version", "kwargs": how})
        self.num_uncleared += not await self._clear_cache(server)
        await control.post("/update_weight_version", {"new_version": label})
        found = (await control.get("/weight_info"))["weight_version"]
        if found != label:
            raise PushError(f"it has the weights {found!r} instead of {label!r}")
        workers = (await control.post("/collective_rpc", {"method": "weight_checksums"}))["results"]
        checksums = {f"{i}:{n}": c for i, own in enumerate(workers) for n, c in own.items()}
        if checksums == self._last.get(server):
            raise PushError(
                "it has the tensors of the last version, although the trainer's have changed"
            )
        self.checksums[server] = checksums

    async def _clear_cache(self, server: Server) -> bool:
        """Has a server forget its prefix cache; false if requests in flight prevent that.

        No later request reads what is left: its `cache_salt` is another one. Requests that were
        frozen keep their keys and values, unless the server works on few at one time: then they
        are recomputed, and one of them cannot keep the probe waiting.
        """
        few = server.start is not None and server.start.max_num_seqs <= _FEW_SEQUENCES
        params = {"reset_running_requests": "true" if few else "false"}
        try:
            reply = await server.control.post("/reset_prefix_cache", params=params)
        except UnavailableError as error:
            if not error.status:
                raise
            return False
        return reply["success"] is True

    async def _restarted(self, directory: pathlib.Path, server: Server) -> None:
        """Waits until a server has been started with `directory`."""
        secs = self._pool.options.control_timeout_secs
        try:
            async with asyncio.timeout(secs):
                while await _root(server) != str(directory):
                    await asyncio.sleep(0.5)
        except TimeoutError:
            raise PushError(
                f"it does not serve {directory} after {secs:g} s; start it with serve --follow"
            ) from None

    async def _ask(self, label: str, server: Server) -> None:
        """Lets a server go on, with the probe ahead of what waits there."""
        request = self._probe.request
        # Tokens that rounding happens to treat badly should not be drawn at every version.
        request = request._replace(seed=(request.seed + zlib.crc32(label.encode())) % 2**32)
        extra = {"priority": _PROBE_PRIORITY, "cache_salt": label}
        bodies = [payload(request, i, self._probe.sampling, ()) | extra for i in range(PROBES)]
        control = server.control
        asked = [asyncio.create_task(control.post(capabilities.GENERATE, body)) for body in bodies]
        try:
            # In the queue before the server resumes, else running requests may take all places.
            await asyncio.sleep(_ARRIVAL_SECS)
            await control.post("/resume")
            completions = [self._read(request, await reply, label) for reply in asked]
        except _FAILURES:
            await self._pause_again(server)
            raise
        finally:
            for reply in asked:
                reply.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        self.probes[server] = completions

    def _read(self, request: Request, reply: Any, label: str) -> Completion:
        completion = self._engine.read(request, reply, {label: 0})
        if len(completion.token_ids) != request.max_tokens:
            raise PushError(f"its probe ended with {completion.finish_reason!r}")
        return completion

    async def judge(self, differences: Mapping[Server, float]) -> None:
        """Pauses the servers that have other weights than they should, and notes why.

        Args:
            differences: mean absolute difference between the log-probabilities of server and
                trainer on the probe, of each server that answered it.
        """
        for server, by in differences.items():
            if not by <= self._options.tolerance:
                self.bad[server] = (
                    f"its log-probabilities differ by {by:.3g} nats from the trainer's"
                )
        good = {server: by for server, by in differences.items() if server not in self.bad}
        self.bad |= unequal({server: self.checksums[server] for server in good}, good)
        await asyncio.gather(*(self._pause_again(s) for s in differences if s in self.bad))


def unequal(
    checksums: Mapping[Server, Checksums], differences: Mapping[Server, float]
) -> dict[Server, str]:
    """Returns the servers whose tensors are not those of the others, with what differs.

    Servers that divide a model in the same way must have the same tensors. The version that most of
    them have is right; of two, the one whose probe is nearest to the trainer's.
    """
    found = {}
    replicas: dict[frozenset[str], list[Server]] = collections.defaultdict(list)
    for server, own in checksums.items():
        replicas[frozenset(own)].append(server)
    for servers in replicas.values():
        equal: dict[frozenset[tuple[str, str]], list[Server]] = collections.defaultdict(list)
        for server in servers:
            equal[frozenset(checksums[server].items())].append(server)
        right = max(equal.values(), key=lambda group: (len(group), -differences[group[0]]))
        for server in servers:
            if server not in right:
                names = sorted(
                    name for name, c in checksums[server].items() if checksums[right[0]][name] != c
                )
                found[server] = (
                    f"{len(names)} of its tensors differ from those of {right[0].url}, such as "
                    f"{names[0]}"
                )
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, PushError | ServerError | ValueError):
        return str(error)
    return f"unexpected reply: {type(error).__name__}: {error}"


async def _root(server: Server) -> str:
    """Returns the model that a server was started with, "" while it does not answer."""
    try:
        return (await server.control.get("/v1/models"))["data"][0]["root"]
    except ServerError:
        return ""
