"""Synchronization of the servers' weights, through files that the servers read.

A version is exported to a new directory and compared with the tensors that the servers loaded at
their start; `push` then loads it into them. A failed attempt is repeated once with a fresh export.
A server that fails twice stays paused and is taken out of the pool.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging

from atlas_jax import distributed, stopping
from atlas_jax.checkpoint import hf, writer
from atlas_jax.models.transformer import Decoder
from atlas_jax.rollout.identity import check_manifest
from atlas_jax.rollout.push import PROBES, Checksums, Probe, Push, PushOptions
from atlas_jax.rollout.servers import Server
from atlas_jax.rollout.versions import Versions
from atlas_jax.rollout.vllm import VllmEngine
from atlas_jax.types import DependencyError, Metrics, Params

_ATTEMPTS = 2


@runtime_checkable
class WeightSync(Protocol):
    """Loads a policy's weights into the servers, through files (`DiskSync`) or another channel."""

    def push(self, params: Params, version: int) -> Metrics:
        """Returns when every server that is up serves these weights."""

    def close(self) -> None:
        """Frees the resources of the last version."""


class _Attempt(NamedTuple):
    """One attempt. All fields but `push` are the same in every process."""

    push: Push
    well: list[bool]
    """True for each server that has passed the checks of its weights."""
    whole: bool
    """True if every server that was up has the weights."""
    reasons: str
    """Problems of the attempt; "" if none."""
    written: np.ndarray | None
    """Checksums of the written tensors; None if writing failed."""
    values: Metrics


class DiskSync:
    """Weight synchronization through files; all processes must call it together."""

    def __init__(
        self,
        engine: VllmEngine,
        decoder: Decoder,
        files: hf.ModelFiles,
        versions: Versions,
        options: PushOptions,
        probe: Probe,
    ) -> None:
        """Creates the synchronization; `push` runs it."""
        self._pool = engine.pool
        self._pool.restarts = options.restart
        # The probe must have all its tokens, so nothing ends it.
        self._engine = dataclasses.replace(engine, stop_ids=())
        self._decoder = decoder
        self._files = files
        self._versions = versions
        self._options = options
        self._probe = probe
        self._shapes = dict(writer.tensors(decoder))
        self._written: np.ndarray | None = None
        """Checksums of the written tensors of the last version that servers loaded."""
        self._latest = ""
        """Label of the last version that servers were told to load."""
        self._served: dict[Server, Checksums] = {}
        """Checksums by server that loaded it, in the process that talks to them."""

    def push(self, params: Params, version: int) -> Metrics:
        """Loads the weights into every server and returns bytes and seconds by phase.

        A server that fails is tried again with a fresh export, then taken out, still paused.

        Raises:
            DependencyError: in every process, if no server is left.
            StopRequestedError: in every process, as soon as one of them is asked to stop.
        """
        # Otherwise the time of the training step would count as time of the export.
        jax.block_until_ready(params)
        start = time.perf_counter()
        servers = self._pool.servers
        for attempt in range(_ATTEMPTS):
            label = f"{version}.{attempt}"
            done = self._attempt(params, label, final=attempt == _ATTEMPTS - 1)
            # A label is recorded even if the attempt is repeated, because completions in flight
            # may carry it.
            for server, ok in zip(servers, done.well, strict=True):
                if ok:
                    server.versions[label] = version
            if done.whole:
                break
            logging.error("weights of step %d, try %d: %s", version, attempt + 1, done.reasons)
        self._pool.call(lambda: self._settle(done, label, version))
        # After the pool is settled, so that whoever waits for it goes on.
        if not any(done.well):
            raise DependencyError(
                f"the weights of step {version} reached no {self._pool.role} server, which stay "
                f"paused: {done.reasons}"
            )
        # Kept only now: what the next version must differ from is what servers have.
        self._written = done.written
        self._served = {
            server: done.push.checksums[server]
            for server, ok in zip(servers, done.well, strict=True)
            if ok and server in done.push.checksums
        }
        done.values["sync/servers"] = sum(done.well), 1
        done.values["sync/total_secs"] = time.perf_counter() - start, 1
        return done.values

    def _attempt(self, params: Params, label: str, final: bool) -> _Attempt:
        start = time.perf_counter()
        servers = self._pool.servers
        problem, written = self._export(params, label)
        push = Push(self._engine, self._options, self._probe, self._must_change(written))
        values: Metrics = {
            "sync/export_secs": (time.perf_counter() - start, 1),
            "sync/bytes": (sum(writer.num_bytes(t, self._options.dtype) for t in self._tensors), 1),
        }
        if written is None:
            return _Attempt(
                push=push,
                well=[False] * len(servers),
                whole=False,
                reasons=problem,
                written=written,
                values=values,
            )
        if distributed.is_main():
            self._latest = label
        problem = self._on_main(lambda: push.run(self._versions.path(label), label, final))
        # Only process 0 talks to the servers, but computing the probe's log-probabilities takes all
        # processes, so the push is split around it.
        differences = self._differences(params, push)
        problem = self._on_main(lambda: push.judge(differences)) or problem
        well = [server in differences and server not in push.bad for server in servers]
        reasons = "; ".join(filter(None, (problem, *map(": ".join, push.reasons))))
        shared = distributed.from_main(np.asarray([push.is_whole and not problem, *well]))
        values |= {name: (secs, 1) for name, secs in push.secs.items()}
        values["sync/uncleared_caches"] = push.num_uncleared, 1
        values["sync/probe_diff"] = max(differences.values(), default=0.0), 1
        return _Attempt(
            push=push,
            well=[bool(ok) for ok in shared[1:]],
            whole=bool(shared[0]),
            reasons=distributed.gather_texts(reasons)[0],
            written=written,
            values=values,
        )

    def _on_main(self, make: Callable[[], Coroutine[Any, Any, None]]) -> str:
        """Runs a coroutine in the pool of process 0, and returns its problem; "" if none.

        Raises:
            StopRequestedError: in every process, if process 0 was asked to stop.
        """
        with distributed.together(stopping.StopRequestedError):
            if distributed.is_main():
                return _problem(lambda: self._pool.run(make()))
        return ""

    def _must_change(self, written: np.ndarray | None) -> dict[Server, Checksums]:
        """Returns the last checksums of the servers whose tensors must have changed.

        A server with a less precise dtype than the exported one may round the change away.
        """
        if self._written is None or written is None or np.array_equal(self._written, written):
            return {}
        exact = (self._options.dtype, "float32")
        return {s: c for s, c in self._served.items() if s.start and s.start.dtype in exact}

    def _differences(self, params: Params, push: Push) -> dict[Server, float]:
        """Returns the mean absolute difference of each server's probe from the trainer's."""
        request = self._probe.request
        servers = self._pool.servers
        shape = len(servers), PROBES, request.max_tokens
        tokens = np.zeros(shape, np.int32)
        logprobs = np.full(shape, np.nan, np.float32)
        for i, server in enumerate(servers):
            for j, completion in enumerate(push.probes.get(server, ())):
                tokens[i, j] = completion.token_ids
                logprobs[i, j] = completion.untruncated_logprobs
        tokens = distributed.from_main(tokens)
        logprobs = distributed.from_main(logprobs)
        # Process 0 alone has the answers; the others see from the numbers who gave one.
        answered = [not np.isnan(own).any() for own in logprobs]
        if not any(answered):
            return {}
        rows = tokens.reshape(-1, request.max_tokens)
        ours = self._probe.logprobs(params, request.prompt_ids, rows).reshape(shape)
        means = np.abs(ours - logprobs).mean(axis=(1, 2))
        push.references = [
            (tuple(tokens[i, j].tolist()), ours[i, j])
            for i in range(len(servers))
            for j in range(PROBES)
            if answered[i]
        ]
        return {s: float(means[i]) for i, s in enumerate(servers) if answered[i]}

    def _settle(self, done: _Attempt, label: str, version: int) -> None:
        """Reopens the pool for requests, with its new label, in the pool's thread."""
        pool = self._pool
        pool.label = label
        pool.version = version
        # Only process 0 talks to servers; to the others a server is back when it has the label.
        if distributed.is_main():
            pool.rejoin = functools.partial(done.push.rejoin, self._versions.path(label), label)
        for server, ok in zip(pool.servers, done.well, strict=True):
            if ok:
                pool.take_back(server)
            else:
                pool.drop(server, done.push.bad.get(server, done.reasons))
        pool.settled.set()

    @property
    def _tensors(self) -> list[writer.Tensor]:
        return [writer.Tensor(*item) for item in self._shapes.items()]

    def _export(self, params: Params, label: str) -> tuple[str, np.ndarray | None]:
        """Writes a version.

        Returns:
            The problem ("" if none), and the checksums of the written tensors (None after one).
        """
        problem = _problem(lambda: self._begin(label)) if distributed.is_main() else ""
        if problem := distributed.gather_texts(problem)[0]:
            return problem, None
        processes = jax.process_count()
        try:
            written = writer.write(
                params,
                self._decoder,
                self._versions.partial(label),
                self._options.dtype,
                # One file for each process, written at the same time.
                [self._tensors[i::processes] for i in range(processes)],
                lambda i: i == jax.process_index(),
                stoppable=True,
            )
        except writer.WriteError as error:
            return str(error), None
        # Requests and health checks end in every process before process 0 pauses the servers.
        self._pool.call(self._pool.settled.clear)
        problem = _problem(lambda: self._finish(label)) if distributed.is_main() else ""
        problem = distributed.gather_texts(problem)[0]
        return problem, None if problem else written

    def _begin(self, label: str) -> None:
        # Servers that reload have the old version in memory; a restarting server may still read it.
        self._versions.remove_all(keep=self._latest if self._options.restart else "")
        self._versions.begin(label, self._files)

    def _finish(self, label: str) -> None:
        check_manifest(self._versions.partial(label), self._shapes, self._options.dtype)
        self._versions.finish(label)

    def close(self) -> None:
        """Removes the versions, except one with which a server may be restarted."""
        if distributed.is_main() and not self._options.restart:
            self._versions.close()


def _problem(do: Callable[[], object]) -> str:
    """Calls a function and returns its error as a text; "" if none."""
    try:
        do()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
