"""One attempt to load a version of the weights into the servers, with proofs of its success.

Each server is paused, loads the version, clears its prefix cache, takes the version's label and
resumes. Two checks prove that it serves these weights. Checksums of its tensors show that they have
changed and equal those of the other servers. A probe, a fixed prompt that the server continues
twice, is compared with the trainer's log-probabilities. The prompt spans several blocks of the
prefix cache, so it detects keys and values of older weights.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import pathlib
import time
import zlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from absl import logging

from atlas_jax.files import write_whole
from atlas_jax.llm_client import ServerError, UnavailableError
from atlas_jax.rollout import capabilities
from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.servers import UNEXPECTED, Server
from atlas_jax.rollout.vllm import VllmEngine
from atlas_jax.types import Completion, Params

LATEST = "latest"
"""File with the path of the newest version, for servers that are restarted with it."""

PROBES = 2
"""Number of times that a server continues the probe: the second time the prompt is cached."""

_PROBE_PRIORITY = -1  # vLLM serves lower numbers first, so the probe precedes completions
_FEW_SEQUENCES = 32
"""Largest number of concurrent requests of a server at which requests in flight are recomputed.

A server with more concurrent requests soon ends one and takes the probe then. Recomputing the keys
and values of hundreds of requests would cost more than that wait."""
_ARRIVAL_SECS = 0.05  # time in which the probe reaches the queue, before the server resumes
_LATE_SECS = 5.0  # wait for servers that were down, after the others are ready
_PAUSE_SECS = 10.0  # limit for pausing a failed server again


class PushError(Exception):
    """A server that answers correctly but has other weights than it should."""


_FAILURES = (PushError, ServerError, TimeoutError, *UNEXPECTED)
"""Errors of one server in a push, which leave the others unaffected."""


class PushOptions(NamedTuple):
    """Options of a push."""

    dtype: str
    """dtype of the exported weights."""
    pause_mode: str
    """`keep` freezes requests in flight, to continue with the new weights; `wait` lets them end."""
    tolerance: float
    """Largest mean absolute difference of the probe's log-probabilities, in nats."""
    restart: bool
    """True if a version is loaded by restarting the servers, as `serve --follow latest` does."""


class Probe(NamedTuple):
    """A prompt, and the trainer's log-probabilities of its continuations, to check a server."""

    request: Request
    sampling: Sampling
    logprobs: Callable[[Params, Sequence[int], np.ndarray], np.ndarray]
    """The trainer's log-probabilities of continuations `[N, tokens]` of one prompt; every process
    calls it together."""


Checksums = Mapping[str, str]
"""Checksums of the tensors of a server's worker, by name."""


@runtime_checkable
class Loader(Protocol):
    """The way of one version into servers."""

    def begin(self, servers: Sequence[Server]) -> None:
        """Prepares the version for these servers, which are paused.

        Raises:
            OSError: if that fails for all servers.
        """

    async def load(self, server: Server) -> None:
        """Returns when a paused server has the tensors."""

    async def obstacle(self, server: Server) -> str:
        """Returns the reason for which a server cannot have the version later, "" if it can."""


class FileLoader(NamedTuple):
    """A version in files, which servers load in place or are restarted with."""

    directory: pathlib.Path
    restart: bool

    def begin(self, servers: Sequence[Server]) -> None:
        """Names the version where servers that follow look for it."""
        if self.restart:
            write_whole(self.directory.parent / LATEST, f"{self.directory}\n")

    async def obstacle(self, server: Server) -> str:
        """Returns the reason for which a server cannot have the version later, "" if it can."""
        if self.restart and await _root(server) != str(self.directory):
            return f"it does not serve {self.directory}; start it with serve --follow"
        return ""

    async def load(self, server: Server) -> None:
        """Has a server load the files, or waits until it was restarted with them."""
        if not self.restart:
            how = {"weights_path": str(self.directory)}
            await server.control.post("/collective_rpc", {"method": "load_version", "kwargs": how})
            return
        # The caller's limit ends this.
        while await _root(server) != str(self.directory):
            await asyncio.sleep(0.5)


class Push:
    """One attempt, in the pool's thread of the process that talks to the servers.

    Attributes:
        bad: the reasons of the servers that failed.
        probes: the continuations of the probe, by server that resumed.
        checksums: the checksums, by server that loaded the version.
        secs: the seconds of each phase, by metric.
        num_uncleared: the number of servers that could not clear their prefix cache.
        references: token ids of continuations of the probe, with the trainer's log-probabilities.
    """

    def __init__(
        self,
        engine: VllmEngine,
        options: PushOptions,
        probe: Probe,
        last: Callable[[], Mapping[Server, Checksums]],
        loader: Loader,
    ) -> None:
        """Creates an attempt; `run` starts it.

        Args:
            engine: the engine, which parses the servers' replies.
            options: the options of the push.
            probe: the probe, whose seed is changed for each version.
            last: returns the checksums of the last version, by server whose tensors must change.
            loader: the way of the version into the servers.
        """
        self._engine = engine
        self._pool = engine.pool
        self._options = options
        self._probe = probe
        self._last = last
        self._loader = loader
        self._paused = asyncio.Event()
        self._must: list[Server] = []
        self.bad: dict[Server, str] = {}
        self.probes: dict[Server, list[Completion]] = {}
        self.checksums: dict[Server, Checksums] = {}
        self.secs: dict[str, float] = {}
        self.num_uncleared = 0
        self.references: list[tuple[tuple[int, ...], np.ndarray]] = []

    @property
    def is_whole(self) -> bool:
        """True if every server that was up has the version, or any server if none was up."""
        return bool(self.probes) and not any(server in self.bad for server in self._must)

    @property
    def reasons(self) -> list[tuple[str, str]]:
        """Address and reason of each server that failed."""
        return [(server.url, why) for server, why in self.bad.items()]

    async def run(self, label: str, final: bool) -> None:
        """Loads a version into the servers.

        Servers that are down are tried concurrently and do not delay the others.

        Args:
            label: the label of the version.
            final: whether servers resume even if another one has failed.

        Raises:
            OSError: if the version cannot be prepared.
        """
        limit = self._pool.options.control_timeout_secs
        # One limit for pausing and loading together: requests wait during both.
        end = time.monotonic() + limit
        must = self._must = [server for server in self._pool.servers if server.up]
        late = [
            asyncio.create_task(self._late(label, server))
            for server in self._pool.servers
            if not server.up
        ]
        try:
            # Every server is paused before one loads, so that no two serve different versions.
            await self._each("sync/pause_secs", must, self.pause, end)
            self._loader.begin([server for server in must if server not in self.bad])
            self._paused.set()  # servers that were down may load from here on
            load = functools.partial(self._take, label)
            await self._each("sync/load_secs", must, load, end)
            if late:
                some = any(server not in self.bad for server in must)
                await asyncio.wait(late, timeout=_LATE_SECS if some else limit)
        finally:
            for task in late:
                task.cancel()
        # After a failure the servers stay paused: the next attempt has another label, and a server
        # that resumed now would generate with a version that is given up.
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
        """Runs one phase at each server that has not failed, and records its seconds.

        Args:
            name: the metric of the phase's seconds.
            servers: the servers.
            do: the phase, a function of a server.
            end: the time at which a server that is not done has failed.
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
                    task.result()  # raises errors that are not the server's fault
                else:
                    self.bad[server] = f"no answer within {end - start:.0f} s"
        finally:
            for server, task in tasks.items():
                task.cancel()
                server.pushing = None
        self.secs[name] = time.monotonic() - start

    async def _noting(self, server: Server, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` of one server, and records its failure without affecting the others."""
        try:
            await work
        except asyncio.CancelledError:
            if server.up:  # otherwise the health check took it out meanwhile
                raise
            self.bad[server] = server.why
        except _FAILURES as error:
            self.bad[server] = _reason(error).removeprefix(server.url)

    async def _late(self, label: str, server: Server) -> None:
        """Loads a version into a server that was down, if it can be reached at once."""

        async def bring() -> None:
            async with server.loading:
                async with asyncio.timeout(_LATE_SECS):
                    await server.control.get("/health")
                    await self._pool.admit(server)  # the address may have another server now
                await self.pause(server)
                await self._paused.wait()
                await self._take(label, server)
                del self.bad[server]

        # It counts as failed until `bring` has come to its end, which the limit may prevent.
        self.bad[server] = server.why
        await self._noting(server, bring())

    async def pause(self, server: Server) -> None:
        """Pauses a server; new requests wait in its queue."""
        # Requests in flight would be lost in a restart, so they are allowed to end.
        mode = "wait" if self._options.restart else self._options.pause_mode
        await server.control.post("/pause", params={"mode": mode, "clear_cache": "false"})

    async def _pause_again(self, server: Server) -> None:
        """Pauses a failed server again; a failure to pause is only logged."""
        try:
            async with asyncio.timeout(_PAUSE_SECS):
                await self.pause(server)
        except _FAILURES as error:
            logging.warning("%s cannot be paused: %s %s", server.url, type(error).__name__, error)

    async def _take(self, label: str, server: Server) -> None:
        """Makes a server load the weights and take their label."""
        control = server.control
        await self._load(server)
        self.num_uncleared += not await self._clear_cache(server)
        await control.post("/update_weight_version", {"new_version": label})
        found = (await control.get("/weight_info"))["weight_version"]
        if found != label:
            raise PushError(f"it has the weights {found!r} instead of {label!r}")
        workers = (await control.post("/collective_rpc", {"method": "weight_checksums"}))["results"]
        checksums = {f"{i}:{n}": c for i, own in enumerate(workers) for n, c in own.items()}
        if checksums == self._last().get(server):
            raise PushError(
                "it has the tensors of the last version, although the trainer's have changed"
            )
        self.checksums[server] = checksums

    async def rejoin(self, label: str, server: Server) -> str:
        """Loads the version of this push into a server that had no part in it; returns its problem.

        No process of the trainer computes anything for it. The server's tensors must equal those
        of a server that passed all checks, and its continuations of the probe are compared with the
        trainer's log-probabilities as far as their tokens are those that the trainer has computed.
        A server that fails stays paused.
        """
        if not self.references:
            return "the current weights have not been compared with the trainer's yet"
        if problem := await self._loader.obstacle(server):
            return problem
        proven = [own for s, own in self.checksums.items() if s not in self.bad]
        try:
            await self.pause(server)
            await self._take(label, server)
            if self.checksums[server] not in proven:
                raise PushError("its tensors are not those of the servers with these weights")
            await self._ask(label, server)
            by = self._difference(self.probes[server])
            if not by <= self._options.tolerance:
                await self._pause_again(server)
                raise PushError(f"its probe differs by {by:.3g} nats from the trainer's")
        except PushError as error:
            self.bad[server] = str(error)
            return str(error)
        self.bad.pop(server, None)
        return ""

    def _difference(self, probes: Sequence[Completion]) -> float:
        """Returns the mean absolute difference of continuations from those of `references`.

        Only the tokens up to the first one that differs have been computed by the trainer, since
        the next ones depend on it. NaN if the first one differs already.
        """
        found: list[float] = []
        for probe in probes:
            common = [_num_equal(probe.token_ids, tokens) for tokens, _ in self.references]
            best = int(np.argmax(common))
            ours = self.references[best][1][: common[best]]
            theirs = np.asarray(probe.untruncated_logprobs[: common[best]])
            found.extend(np.abs(ours - theirs))
        return float(np.mean(found)) if found else float("nan")

    async def _clear_cache(self, server: Server) -> bool:
        """Clears a server's prefix cache; returns false if requests in flight prevent that.

        Entries that are left are not read again, because later requests have another `cache_salt`.
        Frozen requests keep their keys and values, unless the server runs only a few requests at
        one time. They are then recomputed, so that none of them delays the probe.
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

    async def _load(self, server: Server) -> None:
        secs = self._pool.options.control_timeout_secs
        try:
            async with asyncio.timeout(secs):
                await self._loader.load(server)
        except TimeoutError:
            advice = "; start it with serve --follow" if self._options.restart else ""
            raise PushError(f"it has no new weights after {secs:g} s{advice}") from None

    async def _ask(self, label: str, server: Server) -> None:
        """Resumes a server, with the probe first in its queue."""
        request = self._probe.request
        # Another seed for each version: an unlucky draw, sensitive to rounding, must not recur.
        request = request._replace(seed=(request.seed + zlib.crc32(label.encode())) % 2**32)
        extra = {"priority": _PROBE_PRIORITY, "cache_salt": label}
        sampling = self._probe.sampling
        bodies = [self._engine.body(request, i, sampling) | extra for i in range(PROBES)]
        control = server.control
        asked = [asyncio.create_task(control.post(capabilities.GENERATE, body)) for body in bodies]
        try:
            # The probe is queued before the server resumes, or frozen requests could take all
            # places.
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
        """Pauses the servers with wrong weights, and records the reasons.

        Args:
            differences: the mean absolute difference between the log-probabilities of server and
                trainer on the probe, by server that answered it.
        """
        for server, by in differences.items():
            # Written so that NaN counts as too different.
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
    """Returns the servers whose tensors differ from the others', with a description.

    Servers that split a model in the same way must have the same tensors. The tensors of the
    majority count as right; of two servers, those of the one with the better probe.
    """
    different = {}
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
                different[server] = (
                    f"{len(names)} of its tensors differ from those of {right[0].url}, such as "
                    f"{names[0]}"
                )
    return different


def _num_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the number of equal items before the first different one."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, PushError | ServerError | ValueError):
        return str(error)
    return f"unexpected reply: {type(error).__name__}: {error}"


async def _root(server: Server) -> str:
    """Returns the model of a server's start; "" while it does not answer."""
    try:
        return (await server.control.get("/v1/models"))["data"][0]["root"]
    except ServerError:
        return ""
