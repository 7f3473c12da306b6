"""Synchronization of the servers' weights, through files that the servers read.

A version is exported to a new directory and compared with the tensors that the servers loaded at
their start, and loaded into them. A failed attempt is repeated once with a fresh export. A server
that fails twice stays paused and is taken out of the pool.

`push` does that while the training waits. `begin` only starts it: it copies the parameters on their
devices, and a thread does the rest beside the training, of which only the comparison of the probe
with the trainer's log-probabilities may be left to `finish`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from atlas_jax import distributed, stopping
from atlas_jax.checkpoint import hf, outgoing, writer
from atlas_jax.models.transformer import Decoder
from atlas_jax.rollout.identity import check_manifest
from atlas_jax.rollout.push import PROBES, Checksums, FileLoader, Loader, Probe, Push, PushOptions
from atlas_jax.rollout.servers import Server
from atlas_jax.rollout.versions import Versions
from atlas_jax.rollout.vllm import VllmEngine
from atlas_jax.sharding import platform
from atlas_jax.step import joined
from atlas_jax.types import DependencyError, Metrics, Params

_ATTEMPTS = 2
_CLOSE_SECS = 10.0  # for the thread of a transfer to end, once its connections are closed


@runtime_checkable
class WeightSync(Protocol):
    """Loads a policy's weights into the servers, through files (`DiskSync`) or another channel."""

    def push(self, params: Params, version: int) -> Metrics:
        """Returns when every server that is up serves these weights."""

    def begin(self, params: Params, version: int) -> None:
        """Starts the same, and returns when the parameters may change."""

    def finish(self) -> Metrics:
        """Waits for what was begun and checks it; returns no metrics if nothing was."""

    def close(self) -> None:
        """Frees the resources of the last version."""


class Values(Protocol):
    """The tensors of a version that this process writes."""

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields each tensor with its name."""

    @property
    def checksums(self) -> np.ndarray:
        """Numbers that change with the tensors of any process, once all have been yielded."""


Source = Callable[[], Values]
"""The tensors of a version, again for each attempt."""


class Prepared(NamedTuple):
    """A version that servers can load."""

    loader: Loader | None
    """None if it could not be prepared."""
    problem: str
    """The reason; "" if there is none."""
    checksums: Callable[[], np.ndarray]
    """Returns the checksums of the trainer's tensors, once they are on their way."""


class _Late(NamedTuple):
    """A version that a thread brings to the servers."""

    version: int
    params: Params
    """A copy of the parameters, in the dtype of the export."""
    work: concurrent.futures.Future[tuple[_Attempt, dict[Server, float] | None]]
    blocked_secs: float


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
    """Checksums of the trainer's tensors; None if they could not be sent."""
    values: Metrics


class SyncParts(NamedTuple):
    """The parts of a weight synchronization that it keeps."""

    engine: VllmEngine
    decoder: Decoder
    files: hf.ModelFiles
    versions: Versions
    options: PushOptions
    probe: Probe


class DiskSync:
    """Weight synchronization through files; all processes must call it together."""

    def __init__(self, parts: SyncParts) -> None:
        """Creates the synchronization; `push` runs it."""
        self._pool = parts.engine.pool
        self._pool.restarts = parts.options.restart
        # The probe must have all its tokens, so nothing ends it.
        self._engine = dataclasses.replace(parts.engine, stop_ids=())
        self._decoder = parts.decoder
        self._files = parts.files
        self._versions = parts.versions
        self._options = parts.options
        self._probe = parts.probe
        self._shapes = dict(writer.tensors(parts.decoder))
        self._files_of = outgoing.order(parts.decoder, jax.process_count())
        """The tensors of each process's file."""
        self._written: np.ndarray | None = None
        """Checksums of the written tensors of the last version that servers loaded."""
        self._latest = ""
        """Label of the last version that servers were told to load."""
        self._served: dict[Server, Checksums] = {}
        """Checksums by server that loaded it, in the process that talks to them."""
        self._late: _Late | None = None
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        self._distrust = ""
        """Reason for which nothing that was written lately may be trained on."""
        self._closed = False
        self._score_secs = 0.0
        """Seconds of the last comparison of probes."""

    def push(self, params: Params, version: int) -> Metrics:
        """Loads the weights into every server and returns bytes and seconds by phase.

        A server that fails is tried again with a fresh export, then taken out, still paused.

        Raises:
            DependencyError: in every process, if no server is left.
            StopRequestedError: in every process, as soon as one of them is asked to stop.
        """
        self._check_trust()
        # Otherwise the time of the training step would count as time of the export.
        jax.block_until_ready(params)
        start = time.perf_counter()
        source = self._source(params)
        done = self._deliver(source, version, functools.partial(self._differences, params))
        done.values["sync/blocked_secs"] = time.perf_counter() - start, 1
        return done.values

    def begin(self, params: Params, version: int) -> None:
        """Starts to load the weights into every server, in a run of one process.

        Raises:
            DependencyError: if what servers have written lately cannot be trusted.
        """
        self._check_trust()
        jax.block_until_ready(params)
        start = time.perf_counter()
        # The next update waits for this copy alone: it takes over the parameters.
        copy = _copied(params, self._options.dtype, self._decoder)
        source = self._beside(copy)
        if self._thread is None:
            self._thread = concurrent.futures.ThreadPoolExecutor(1, "weights")
        work = self._thread.submit(self._deliver_beside, source, version, copy)
        self._late = _Late(
            version=version, params=copy, work=work, blocked_secs=time.perf_counter() - start
        )

    def finish(self) -> Metrics:
        """Waits for the transfer that was begun, compares the probes and returns as `push` does.

        A server whose probe differs has taken part in what was written since. That is found here
        and not before, so the run ends: it continues with the same command, and without the server.

        Raises:
            DependencyError: if no server is left, or one whose probe differs was used.
            StopRequestedError: as soon as the run is asked to stop.
        """
        self._check_trust()
        late, self._late = self._late, None
        if late is None:
            return {}
        start = time.perf_counter()
        done, differences = stopping.result(late.work)
        if differences is None:
            differences = self._differences(late.params, done.push)
        used = set(done.push.probes) - done.push.bad.keys()
        problem = self._on_main(lambda: done.push.judge(differences))
        wrong = {server.url: why for server, why in done.push.bad.items() if server in used}
        if wrong or problem:
            self._distrust = (
                f"weights of step {late.version} that {self._pool.role} servers have used are not "
                f"the trainer's: {problem or wrong}; the batches that they have begun are given up"
            )
            self._check_trust()
        done.values["sync/probe_diff"] = max(differences.values(), default=0.0), 1
        done.values["sync/score_secs"] = self._score_secs, 1
        waited = time.perf_counter() - start
        done.values["sync/blocked_secs"] = late.blocked_secs + waited, 1
        return done.values

    def _check_trust(self) -> None:
        # Raised again whenever weights are asked for: an evaluation that fails does not end a run.
        if self._distrust:
            raise DependencyError(self._distrust)

    def _source(self, params: Params) -> Source:
        """Returns the tensors of the parameters; every process calls it together."""
        return functools.partial(outgoing.Outgoing, params, self._decoder, self._options.dtype)

    def _beside(self, copy: Params) -> Source:
        """Returns the tensors of a copy of the parameters, for the thread that sends them."""
        if jax.device_count() == 1 and platform(self._decoder.sharding.mesh) == "cpu":
            return self._source(copy)
        # An accelerator would compute them only after the next step, and of programs that run on
        # several devices two threads could begin each first on another device.
        values = outgoing.Outgoing(copy, self._decoder, self._options.dtype, keep=True)
        values.dispatch()
        return lambda: values

    def _deliver_beside(
        self, source: Source, version: int, params: Params
    ) -> tuple[_Attempt, dict[Server, float] | None]:
        """Loads weights into the servers while the trainer computes.

        Returns:
            The attempt, and the differences of the probes where another thread than the trainer's
            may compute them: on several devices two programs could wait for each other.
        """
        done = self._deliver(source, version, lambda push: dict.fromkeys(push.probes, 0.0))
        alone = jax.device_count() == 1
        return done, self._differences(params, done.push) if alone else None

    def _deliver(
        self, source: Source, version: int, compare: Callable[[Push], dict[Server, float]]
    ) -> _Attempt:
        """Brings a version to the servers, and opens the pool for requests again.

        Args:
            source: the tensors.
            version: the version.
            compare: returns the differences of the probes, by server that has answered.
        """
        start = time.perf_counter()
        servers = self._pool.servers
        for attempt in range(_ATTEMPTS):
            label = f"{version}.{attempt}"
            done = self._attempt(source, label, attempt, compare)
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
        return done

    def _attempt(
        self,
        source: Source,
        label: str,
        attempt: int,
        compare: Callable[[Push], dict[Server, float]],
    ) -> _Attempt:
        start = time.perf_counter()
        servers = self._pool.servers
        ready = self._prepare(source, label, attempt)
        values: Metrics = {
            "sync/export_secs": (time.perf_counter() - start, 1),
            "sync/bytes": (sum(writer.num_bytes(t, self._options.dtype) for t in self._tensors), 1),
        }
        push = Push(
            engine=self._engine,
            options=self._options,
            probe=self._probe,
            last=lambda: self._must_change(ready.checksums()),
            loader=ready.loader or FileLoader(self._versions.path(label), False),
        )
        if ready.loader is None:
            return _Attempt(
                push=push,
                well=[False] * len(servers),
                whole=False,
                reasons=ready.problem,
                written=None,
                values=values,
            )
        final = attempt == _ATTEMPTS - 1
        problem = self._on_main(lambda: push.run(label, final))
        # Only process 0 talks to the servers, but computing the probe's log-probabilities takes all
        # processes, so the push is split around it.
        differences = compare(push)
        values["sync/score_secs"] = self._score_secs, 1
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
            written=ready.checksums() if any(shared[1:]) else None,
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

    def _must_change(self, written: np.ndarray) -> dict[Server, Checksums]:
        """Returns the last checksums of the servers whose tensors must have changed.

        A server with a less precise dtype than the exported one may round the change away.
        """
        if self._written is None or np.array_equal(self._written, written):
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
        start = time.perf_counter()
        ours = self._probe.logprobs(params, request.prompt_ids, rows).reshape(shape)
        self._score_secs = time.perf_counter() - start
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
            pool.rejoin = functools.partial(done.push.rejoin, label)
        for server, ok in zip(pool.servers, done.well, strict=True):
            if ok:
                pool.take_back(server)
            else:
                pool.drop(server, done.push.bad.get(server, done.reasons))
        pool.settled.set()

    @property
    def _tensors(self) -> list[writer.Tensor]:
        return [writer.Tensor(*item) for item in self._shapes.items()]

    def _prepare(self, source: Source, label: str, attempt: int) -> Prepared:
        """Writes a version."""
        values = source()

        def failed(problem: str) -> Prepared:
            return Prepared(None, problem, lambda: np.zeros(0))

        problem = _problem(lambda: self._begin(label)) if distributed.is_main() else ""
        if problem := distributed.gather_texts(problem)[0]:
            return failed(problem)
        try:
            self._write(values, self._versions.partial(label))
        except writer.WriteError as error:
            return failed(str(error))
        # Requests and health checks end in every process before process 0 pauses the servers.
        self._pool.call(self._pool.settled.clear)
        problem = _problem(lambda: self._finish(label)) if distributed.is_main() else ""
        if problem := distributed.gather_texts(problem)[0]:
            return failed(problem)
        if distributed.is_main():
            self._latest = label
        return Prepared(self._loader_of(label), "", lambda: values.checksums)

    def _gives_up(self) -> bool:
        return self._closed or stopping.requested()

    def _begin(self, label: str) -> None:
        # Servers that reload have the old version in memory; a restarting server may still read it.
        self._versions.remove_all(keep=self._latest if self._options.restart else "")
        self._versions.begin(label, self._files)

    def _write(self, values: Iterable[tuple[str, np.ndarray]], directory: pathlib.Path) -> None:
        outgoing.write_own(values, directory, self._options.dtype, self._files_of, self._gives_up)

    def _loader_of(self, label: str) -> Loader:
        return FileLoader(self._versions.path(label), self._options.restart)

    def _finish(self, label: str) -> None:
        check_manifest(self._versions.partial(label), self._shapes, self._options.dtype)
        self._versions.finish(label)

    def close(self) -> None:
        """Gives up what was begun, and removes the versions.

        One with which a server may be restarted is kept.
        """
        self._closed = True
        if self._thread is not None:
            # Ends what the thread waits for.
            self._pool.close()
            if self._late is not None:
                concurrent.futures.wait([self._late.work], _CLOSE_SECS)
            self._thread.shutdown(wait=False)
        if distributed.is_main() and not self._options.restart:
            self._versions.close()


def _problem(do: Callable[[], object]) -> str:
    """Calls a function and returns its error as a text; "" if none."""
    try:
        do()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@functools.partial(jax.jit, static_argnums=1)
def _cast(params: Params, dtype: str | None) -> Params:
    # Without a copy the result could be the arrays themselves, which the next step donates.
    return jax.tree.map(lambda p: jnp.copy(p if dtype is None else p.astype(dtype)), params)


def _copied(params: Params, dtype: str, decoder: Decoder) -> Params:
    """Returns a copy in `dtype`, for the trainer's log-probabilities of these weights."""
    if decoder.lora is None:
        return _cast(params, dtype)
    from atlas_jax.models import lora

    # No step changes what the factors are added to, which is not copied.
    base, factors = lora.split(params)
    return joined(base, _cast(factors, None))
