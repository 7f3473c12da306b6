"""Load of vLLM servers, read from their Prometheus page while they work.

A page that cannot be read in time is left out: these numbers describe a run and decide nothing.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from absl import logging

from atlas_jax import extras
from atlas_jax.llm_client import ServerError
from atlas_jax.rollout.servers import Server, ServerPool
from atlas_jax.types import Metrics

with extras.importing("vllm", "the metrics of vLLM"):
    from prometheus_client import parser

_EVERY_SECS = 2.0
_PAGE_SECS = 5.0
"""Most seconds that a page may take."""

_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_KV_USE = "vllm:kv_cache_usage_perc"
_PREEMPTIONS = "vllm:num_preemptions_total"
_READ = (_RUNNING, _WAITING, _KV_USE, _PREEMPTIONS)

_NAMES = {
    "teacher": (
        "rollout/teacher_running",
        "rollout/teacher_waiting",
        "rollout/teacher_kv_use",
        "rollout/teacher_preemptions",
    ),
    "student": (
        "rollout/student_running",
        "rollout/student_waiting",
        "rollout/student_kv_use",
        "rollout/student_preemptions",
    ),
}
"""Role -> the names of its metrics, in the order of `Load`."""


class Load(NamedTuple):
    """State of one server at one time."""

    running: float
    """Number of requests that it computes."""
    waiting: float
    """Number of requests that wait in its queue."""
    kv_use: float
    """Share of its blocks of keys and values that is in use, from 0 to 1."""
    preemptions: float
    """Number of times that a request had to make room for others, since the server's start."""


def read(page: str) -> Load:
    """Returns the load that a page in Prometheus's text format states.

    Raises:
        ValueError: if the page is not in that format, or a number is missing.
    """
    # A page has hundreds of lines of histograms, which would be parsed too.
    lines = [line for line in page.splitlines() if line.startswith(_READ)]
    found: dict[str, list[float]] = {name: [] for name in _READ}
    for family in parser.text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            if sample.name in found:
                found[sample.name].append(sample.value)
    missing = [name for name, values in found.items() if not values]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    # A server with several engines has a line for each.
    return Load(
        running=sum(found[_RUNNING]),
        waiting=sum(found[_WAITING]),
        kv_use=sum(found[_KV_USE]) / len(found[_KV_USE]),
        preemptions=sum(found[_PREEMPTIONS]),
    )


class ServerMetrics:
    """Metrics of the servers of a pool, read in its thread until it is closed."""

    def __init__(self, pool: ServerPool, reads: bool = True) -> None:
        """Begins to read.

        Args:
            pool: the servers.
            reads: false in processes that leave it to another one; their metrics have no weight.
        """
        self._pool = pool
        self._lock = threading.Lock()
        self._loads: list[Load] = []
        self._preemptions = 0.0
        self._before: dict[Server, float] = {}
        self._failed: set[Server] = set()
        self._num_rounds = 0
        if reads:
            pool.call(self._start)

    def take(self) -> Metrics:
        """Returns the metrics since the last call.

        They are means over the servers and over the times at which one of them had a request. Their
        weight is 0 if there was none.
        """
        with self._lock:
            loads, self._loads = self._loads, []
            preemptions, self._preemptions = self._preemptions, 0.0
            rounds, self._num_rounds = self._num_rounds, 0
        running, waiting, kv_use, preempted = _NAMES[self._pool.role]
        return {
            running: (sum(load.running for load in loads), len(loads)),
            waiting: (sum(load.waiting for load in loads), len(loads)),
            kv_use: (sum(load.kv_use for load in loads), len(loads)),
            preempted: (preemptions, 1 if rounds else 0),
        }

    def _start(self) -> None:
        self._task = asyncio.create_task(self._read_for_ever())

    async def _read_for_ever(self) -> None:
        while True:
            start = time.monotonic()
            servers = [server for server in self._pool.servers if server.up]
            found = await asyncio.gather(*map(self._read, servers))
            loads = {s: load for s, load in zip(servers, found, strict=True) if load is not None}
            with self._lock:
                self._add(loads)
            await asyncio.sleep(max(_EVERY_SECS - (time.monotonic() - start), 0.1))

    async def _read(self, server: Server) -> Load | None:
        try:
            async with asyncio.timeout(_PAGE_SECS):
                load = read(await server.control.get_text("/metrics"))
        except (ServerError, TimeoutError, ValueError) as error:
            if server not in self._failed:
                logging.warning("no metrics of %s: %s", server.url, str(error) or "no reply")
                self._failed.add(server)
            return None
        self._failed.discard(server)
        return load

    def _add(self, loads: Mapping[Server, Load]) -> None:
        """Adds what one round has read."""
        self._num_rounds += bool(loads)
        if any(load.running + load.waiting for load in loads.values()):
            self._loads += loads.values()
        for server, load in loads.items():
            # A counter that has become smaller belongs to a server that was started again.
            before = self._before.get(server, load.preemptions)
            self._preemptions += load.preemptions - (before if before <= load.preemptions else 0.0)
            self._before[server] = load.preemptions
