"""Weights on their way to the servers: written to a directory, loaded in place, and probed.

A version is exported to a new directory beside the last one and checked against what the servers
loaded at their start. Then each server is paused, reloads, forgets its prefix cache, takes the
version's label and resumes; and what it then says of a fixed prompt is scored by the trainer. A
server where any of this fails stays paused.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging

from atlas_jax import distributed
from atlas_jax.checkpoint import hf, writer
from atlas_jax.files import write_whole
from atlas_jax.llm_client import ServerError, UnavailableError
from atlas_jax.models.transformer import Decoder
from atlas_jax.rollout import capabilities
from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.servers import Server
from atlas_jax.rollout.vllm import VllmEngine, payload
from atlas_jax.types import Completion, DependencyError, Metrics, Params

_ATTEMPTS = 2

LATEST = "latest"
"""File that names the newest version, for servers that are started again with it."""


@runtime_checkable
class WeightSync(Protocol):
    """Brings a policy into the servers; `DiskSync` does it by files, NCCL would by the network."""

    def push(self, params: Params, version: int) -> Metrics:
        """Returns when every server that is up serves these weights."""

    def close(self) -> None:
        """Frees what the last version takes."""


class SyncOptions(NamedTuple):
    """How weights are pushed."""

    directory: str
    """Where versions go; servers read it under the same path."""
    dtype: str
    pause_mode: str
    """`keep` freezes what is in flight and lets it go on with the new weights; `wait` lets it end
    first."""
    tolerance: float
    """Mean absolute difference of the probe's log-probabilities, in nats, above which the server
    is held to have other weights."""
    restart: bool = False
    """Servers that cannot reload in place are started again with a version by whoever follows the
    file `latest` of the directory."""


class Probe(NamedTuple):
    """What shows that a server has the trainer's weights."""

    request: Request
    sampling: Sampling
    score: Callable[[Params, Sequence[int], np.ndarray], np.ndarray]
    """The trainer's log-probabilities of a prompt's continuation; every process calls it."""


class DiskSync:
    """Pushes by files that the servers read; every process calls it together."""

    def __init__(
        self,
        engine: VllmEngine,
        decoder: Decoder,
        files: hf.ModelFiles,
        options: SyncOptions,
        probe: Probe,
    ) -> None:
        """Reads what the servers loaded at their start; the first push makes the directory.

        Raises:
            ValueError: if a server was started with a model of other tensors.
        """
        self._pool = engine.pool
        self._engine = dataclasses.replace(engine, stop_ids=())
        self._decoder = decoder
        self._files = files
        self._options = options
        self._probe = probe
        self._root = pathlib.Path(options.directory)
        self._shapes = dict(writer.tensors(decoder))
        for server in self._pool.servers:
            self._check_start(server)

    def _check_start(self, server: Server) -> None:
        if not os.path.isdir(server.root):
            return
        tied = self._decoder.config.tie_embeddings
        loaded = hf.stored_shapes(hf.open_source(server.root), tied)
        different = _differences(loaded, self._shapes)
        if different:
            raise ValueError(
                f"{self._pool.role} server {server.url} was started with {server.root}, whose "
                f"tensors are not those of the model that trains: {different}; start it with the "
                "same model"
            )

    def push(self, params: Params, version: int) -> Metrics:
        """Brings the weights into every server and returns bytes and seconds by phase.

        A server that fails is tried again from a fresh export, then taken out, still paused.

        Raises:
            DependencyError: if no server is left.
        """
        jax.block_until_ready(params)
        start, pool = time.perf_counter(), self._pool
        wanted = distributed.from_main(np.asarray([server.up for server in pool.servers]))
        pool.call(pool.settled.clear)
        for attempt in range(_ATTEMPTS):
            label, final = f"{version}.{attempt}", attempt == _ATTEMPTS - 1
            well, reasons, values = self._attempt(params, label, wanted, final)
            for server, ok in zip(pool.servers, well, strict=True):
                if ok:
                    server.versions[label] = version
            whole = well.any() and well[wanted].all()
            if whole or final:
                break
            logging.error("weights of step %d, first try: %s", version, "; ".join(reasons))
        pool.call(functools.partial(self._settle, well, label, reasons))
        if not well.any():
            raise DependencyError(
                f"the weights of step {version} reached no {pool.role} server, which stay paused: "
                + "; ".join(reasons)
            )
        if distributed.is_main():
            self._remove(keep=f"v{label}")
        values["sync/servers"] = int(well.sum()), 1
        values["sync/total_secs"] = time.perf_counter() - start, 1
        return values

    def _attempt(
        self, params: Params, label: str, wanted: np.ndarray, final: bool
    ) -> tuple[np.ndarray, list[str], Metrics]:
        """Returns which servers have the weights, why others have not, and metrics."""
        start, servers = time.perf_counter(), self._pool.servers
        problem = self._export(params, label)
        values: Metrics = {
            "sync/export_secs": (time.perf_counter() - start, 1),
            "sync/bytes": (sum(writer.num_bytes(t, self._options.dtype) for t in self._tensors), 1),
        }
        if problem:
            return np.zeros(len(servers), bool), [problem], values
        run = _Load(self._engine, self._options, self._probe)
        if distributed.is_main():
            must = [s for s, up in zip(servers, wanted, strict=True) if up]
            self._pool.run(run.load(self._root / f"v{label}", label, must, final))
        values |= {name: (secs, 1) for name, secs in run.secs.items()}
        difference = self._difference(params, run)
        values["sync/probe_diff"] = float(np.nanmax(difference, initial=0.0)), 1
        well = difference <= self._options.tolerance
        for server, ok, by in zip(servers, well, difference, strict=True):
            if not ok and server in run.probes:
                run.bad[server] = (
                    f"its log-probabilities differ by {by:.3g} nats from the trainer's"
                )
                self._pool.run(run.pause(server))
        reasons = [f"{server.url}: {why}" for server, why in run.bad.items()]
        return well, reasons, values

    def _difference(self, params: Params, run: _Load) -> np.ndarray:
        """Returns the mean absolute difference of each server's probe; NaN where there is none."""
        servers, size = self._pool.servers, self._probe.request.max_tokens
        tokens = np.zeros((len(servers), size), np.int32)
        logprobs = np.full((len(servers), size), np.nan, np.float32)
        for i, server in enumerate(servers):
            if server in run.probes:
                tokens[i] = run.probes[server].token_ids
                logprobs[i] = run.probes[server].untruncated_logprobs
        tokens, logprobs = distributed.from_main(tokens), distributed.from_main(logprobs)
        prompt = self._probe.request.prompt_ids
        found = [
            np.nan
            if np.isnan(theirs).any()
            else np.abs(self._probe.score(params, prompt, ids) - theirs).mean()
            for ids, theirs in zip(tokens, logprobs, strict=True)
        ]
        return np.asarray(found)

    def _settle(self, well: np.ndarray, label: str, reasons: list[str]) -> None:
        """Lets completions be judged, in the pool's thread."""
        self._pool.label = label
        for server, ok in zip(self._pool.servers, well, strict=True):
            if ok:
                server.up, server.why = True, ""
            else:
                why = next((r for r in reasons if r.startswith(server.url)), "did not load")
                self._pool.drop(server, why)
        self._pool.settled.set()

    @property
    def _tensors(self) -> list[writer.Tensor]:
        return [writer.Tensor(*item) for item in self._shapes.items()]

    def _export(self, params: Params, label: str) -> str:
        """Writes a version, and returns what is wrong with it, "" if nothing."""
        target, partial = self._root / f"v{label}", self._root / f".v{label}.partial"
        processes, problem = jax.process_count(), ""
        if distributed.is_main():
            problem = _problem(lambda: self._prepare(partial))
        distributed.barrier(f"sync {label}")
        files = [self._tensors[i::processes] for i in range(processes)]
        write = functools.partial(
            writer.write, params, self._decoder, partial, self._options.dtype, files,
            lambda i: i == jax.process_index(),
        )  # fmt: skip
        if not distributed.any_process(bool(problem)):
            problem = _problem(write)
        if not distributed.any_process(bool(problem)) and distributed.is_main():
            problem = _problem(lambda: self._finish(partial, target))
        failed = distributed.any_process(bool(problem))
        return problem or ("another process could not write" if failed else "")

    def _prepare(self, partial: pathlib.Path) -> None:
        shared = self._root / "files"
        if not shared.exists():
            hf.write_files(str(shared), self._files)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in shared.iterdir():
            os.link(path, partial / path.name)

    def _finish(self, partial: pathlib.Path, target: pathlib.Path) -> None:
        check_manifest(partial, self._shapes, self._options.dtype)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)

    def _remove(self, keep: str) -> None:
        """Removes the versions that no server is to load any more."""
        for path in (*self._root.glob("v*"), *self._root.glob(".v*")):
            if path.name != keep:
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Removes what was written, unless a server would be started with it again."""
        if not distributed.is_main() or self._options.restart:
            return
        self._remove(keep="")
        shutil.rmtree(self._root / "files", ignore_errors=True)
        with contextlib.suppress(OSError):  # not made yet, or with other files in it
            self._root.rmdir()


class _Load:
    """One try to bring a version into the servers, in the pool's thread."""

    def __init__(self, engine: VllmEngine, options: SyncOptions, probe: Probe) -> None:
        self._engine = engine
        self._options = options
        self._probe = probe
        self.bad: dict[Server, str] = {}
        self.probes: dict[Server, Completion] = {}
        self.secs: dict[str, float] = {}

    async def load(
        self, directory: pathlib.Path, label: str, must: Sequence[Server], final: bool
    ) -> None:
        """Fills `bad`, `probes` and `secs`.

        Args:
            directory: of the version.
            label: of the version.
            must: servers that ought to succeed; if one does not, none resumes.
            final: they resume all the same.
        """
        await self._each("sync/pause_secs", self.pause)
        if self._options.restart:
            write_whole(directory.parent / LATEST, f"{directory}\n")
        await self._each("sync/load_secs", functools.partial(self._take, directory, label))
        if any(server in self.bad for server in must) and not final:
            return
        await self._each("sync/probe_secs", functools.partial(self._ask, label))

    async def _each(self, name: str, do: Callable[[Server], Coroutine[Any, Any, None]]) -> None:
        start = time.perf_counter()
        servers = [s for s in self._engine.pool.servers if s not in self.bad]
        results = await asyncio.gather(*map(do, servers), return_exceptions=True)
        for server, result in zip(servers, results, strict=True):
            if isinstance(result, ServerError):
                self.bad[server] = str(result)
            elif result is not None:
                raise result
        self.secs[name] = time.perf_counter() - start

    async def pause(self, server: Server) -> None:
        """Stops a server; what it is asked meanwhile waits."""
        # What is in flight would not outlive a restart.
        mode = "wait" if self._options.restart else self._options.pause_mode
        await server.control.post("/pause", params={"mode": mode, "clear_cache": "false"})

    async def _take(self, directory: pathlib.Path, label: str, server: Server) -> None:
        """Has a server take the weights and their label."""
        control = server.control
        if self._options.restart:
            await self._restarted(directory, server)
        else:
            how = {"weights_path": str(directory)}
            await control.post("/collective_rpc", {"method": "load_version", "kwargs": how})
        await control.post("/reset_prefix_cache")
        await control.post("/update_weight_version", {"new_version": label})
        found = (await control.get("/weight_info"))["weight_version"]
        if found != label:
            raise UnavailableError(server.url, 0, f"has weights {found} instead of {label}")

    async def _restarted(self, directory: pathlib.Path, server: Server) -> None:
        """Waits until a server has been started with `directory`."""
        secs = self._engine.pool.options.control_timeout_secs
        try:
            async with asyncio.timeout(secs):
                while await _root(server) != str(directory):
                    await asyncio.sleep(0.5)
        except TimeoutError:
            why = f"does not serve {directory} after {secs:g} s; start it with serve --follow"
            raise UnavailableError(server.url, 0, why) from None

    async def _ask(self, label: str, server: Server) -> None:
        await server.control.post("/resume")
        request, sampling = self._probe.request, self._probe.sampling
        body = payload(request, 0, sampling, ())
        reply = await server.control.post(capabilities.GENERATE, body)
        completion = self._engine.read(request, reply, {label: 0})
        if len(completion.token_ids) != request.max_tokens:
            raise UnavailableError(server.url, 0, f"probe: {completion.finish_reason}")
        self.probes[server] = completion


async def _root(server: Server) -> str:
    """Returns the model that a server was started with, "" while it does not answer."""
    try:
        return (await server.control.get("/v1/models"))["data"][0]["root"]
    except ServerError:
        return ""


def check_manifest(directory: pathlib.Path, shapes: Mapping[str, Any], dtype: str) -> None:
    """Checks that a directory holds exactly the tensors that a server loaded at its start.

    vLLM itself keeps the old content of a tensor that lacks, and says nothing.

    Raises:
        ValueError: names what is missing, unknown, or of another shape or dtype.
    """
    source = hf.SafetensorsSource(str(directory))
    different = _differences(source.shapes, shapes)
    stored = {name: found for name in source.shapes if (found := source.dtype(name)) != dtype}
    if different or stored:
        raise ValueError(f"{directory} does not fit the servers: {different or stored}")


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Returns which names and shapes differ, "" if none."""
    parts = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": sorted(
            name for name in expected.keys() & found.keys() if found[name] != expected[name]
        ),
    }
    return "; ".join(f"{kind} {', '.join(names[:5])}" for kind, names in parts.items() if names)


def _problem(do: Callable[[], None]) -> str:
    """Does it, and returns what went wrong, "" if nothing."""
    try:
        do()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
