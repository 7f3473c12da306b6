"""Start-up of a multi-process JAX run, and communication between its processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atlas_jax.options.model import HostsConfig
from atlas_jax.types import Address
from atlas_jax.watch import Watch, WatchLimits

_ENVIRONMENT = ("ATLAS_COORDINATOR", "ATLAS_NUM_PROCESSES", "ATLAS_PROCESS_ID")
_CLUSTERS = ("OMPI_MCA_orte_hnp_uri", "JOBSET_NAME")
_MARGIN_SECS = 30
"""Seconds by which JAX's own timeouts exceed those of `HostsConfig`.

Ours must expire first, because only our error names the process that failed."""

_TEXT_BYTES = 2048
"""Largest number of bytes of a text that processes exchange."""

_watches: list[Watch] = []
"""The watch of this process; empty in a single-process run.

It is a module global because JAX's distributed runtime is one per process too."""


@contextlib.contextmanager
def joined(hosts: HostsConfig, address: Address) -> Iterator[None]:
    """Joins this process to the others of its run; a single process joins nothing.

    Parts of `address` that are not given are read from the environment variables
    ATLAS_COORDINATOR, ATLAS_NUM_PROCESSES and ATLAS_PROCESS_ID. Under SLURM, Open MPI, Kubernetes
    JobSet and Cloud TPU, JAX finds them by itself. An error in the block ends the other processes
    too.

    Raises:
        ValueError: if only some of the three parts are given.
    """
    address = _with_environment(address)
    if not all(_known(address)) and not _in_cluster_of_several():
        yield
        return
    _initialize(hosts, address)
    watch = _start_watch(hosts)
    _watches.append(watch)

    def part(_: Any, error: BaseException | None, __: Any) -> None:
        _watches.clear()
        if error is None:
            watch.leave()
        else:
            watch.fail(error)

    with contextlib.ExitStack() as stack:
        stack.push(part)
        yield


def _with_environment(address: Address) -> Address:
    host, total, index = (os.environ.get(name, "") for name in _ENVIRONMENT)
    full = Address(
        address.coordinator or host,
        address.num_processes or int(total or 0),
        address.process_id if address.process_id >= 0 else int(index or -1),
    )
    if any(_known(full)) and not all(_known(full)):
        raise ValueError(
            f"--coordinator={full.coordinator!r} --num_processes={full.num_processes} "
            f"--process_id={full.process_id}: give all three, or none"
        )
    return full


def _known(address: Address) -> tuple[bool, bool, bool]:
    return bool(address.coordinator), address.num_processes > 0, address.process_id >= 0


def _in_cluster_of_several() -> bool:
    if "SLURM_STEP_NODELIST" in os.environ:
        return int(os.environ.get("SLURM_NTASKS", "1")) > 1
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or any(name in os.environ for name in _CLUSTERS)


def _has_all_devices(address: Address) -> bool:
    """Returns whether this process uses all devices that it sees.

    Under SLURM and Open MPI, JAX assumes several processes per host with one GPU each.
    """
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return False
    nodes = os.environ.get("SLURM_STEP_NUM_NODES")
    tasks = os.environ.get("SLURM_NTASKS")
    alone = (nodes and nodes == tasks) or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return all(_known(address)) or bool(alone)


def _initialize(hosts: HostsConfig, address: Address) -> None:
    """Starts JAX's runtime; ends the process if the others do not join in time."""
    # JAX would install its own SIGTERM handler. `stopping` handles SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    explicit = address._asdict() if all(_known(address)) else {}
    names = {"coordinator": "coordinator_address"}
    limit = threading.Timer(hosts.start_timeout_secs, _give_up, [hosts, address])
    limit.daemon = True
    limit.start()
    jax.distributed.initialize(
        **{names.get(name, name): value for name, value in explicit.items()},
        local_device_ids=[] if _has_all_devices(address) else None,
        initialization_timeout=hosts.start_timeout_secs + _MARGIN_SECS,
        # JAX sends a heartbeat every half timeout, so it may notice a death half a timeout early.
        heartbeat_timeout_seconds=3 * hosts.heartbeat_timeout_secs + 2 * _MARGIN_SECS,
        shutdown_timeout_seconds=hosts.heartbeat_timeout_secs + _MARGIN_SECS,
    )
    jax.device_count()  # waits until every process has announced its devices
    limit.cancel()
    logging.info("process %d of %d", jax.process_index(), jax.process_count())


def _give_up(hosts: HostsConfig, address: Address) -> None:
    logging.error(
        "process %d of %d waited %d s (hosts.start_timeout_secs) for the others at %s in vain; "
        "look whether each of them has started and reaches that address",
        *(address.process_id, address.num_processes, hosts.start_timeout_secs),
        address.coordinator or "the coordinator",
    )
    logging.flush()
    os._exit(1)


def _start_watch(hosts: HostsConfig) -> Watch:
    from jax._src import distributed as runtime  # JAX has no public name for its service

    limits = WatchLimits(hosts.heartbeat_timeout_secs, hosts.stall_timeout_secs)
    service: Any = runtime.global_state.client
    watch = Watch(service, jax.process_index(), jax.process_count(), limits)
    watch.start()
    return watch


def arrive(place: str = "") -> None:
    """Records that this process has reached a point that all processes reach; see `watch`."""
    for watch in _watches:
        watch.arrive(place)


def is_main() -> bool:
    """Returns whether this process writes the files that only one process writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has reached the barrier of that name."""
    arrive(name)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def vote(flag: bool) -> Callable[[], bool]:
    """Starts a vote, and returns a function that waits for whether `flag` is true in any process.

    Devices do not pause for it: the vote is computed after the work that is already queued.
    """
    arrive()
    if jax.process_count() == 1:
        return lambda: flag
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()), "all"), PartitionSpec("all"))
    flags = np.full(jax.local_device_count(), flag)
    found = _any(jax.make_array_from_process_local_data(sharding, flags))
    return lambda: bool(found)


_any = jax.jit(jnp.any)


def any_process(flag: bool) -> bool:
    """Returns whether `flag` is true in any process; every process must call it."""
    return vote(flag)()


def gather(numbers: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes, `[processes, ...]`; they share one shape and dtype."""
    arrive()
    if jax.process_count() == 1:
        return numbers[None]
    content = np.frombuffer(
        np.ascontiguousarray(numbers).tobytes(), np.uint8
    )  # as bytes, because JAX would cast float64
    found = multihost_utils.process_allgather(content)
    return found.view(numbers.dtype).reshape(-1, *numbers.shape)


def gather_rows(rows: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Returns the rows of all processes, in order of the processes; every process must call it.

    Args:
        rows: the rows of this process, `[counts[process index], ...]`.
        counts: the number of rows of each process, which may be 0.
    """
    padded = np.zeros((max(counts), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    parts = zip(gather(padded), counts, strict=True)
    return np.concatenate([part[:count] for part, count in parts])


def max_over_processes(number: int) -> int:
    """Returns the highest `number` of all processes; every process must call it."""
    return int(gather(np.asarray(number)).max())


def from_main(values: np.ndarray) -> np.ndarray:
    """Returns process 0's array; every process must call it, with an array of the same shape."""
    return gather(values)[0]


def gather_texts(text: str) -> list[str]:
    """Returns the text of each process, cut to `_TEXT_BYTES`.

    Every process must call it.
    """
    content = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode()[:_TEXT_BYTES], np.uint8)
    content[: encoded.size] = encoded
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in gather(content)]


@contextlib.contextmanager
def together(*kinds: type[Exception]) -> Iterator[None]:
    """Raises an error of the block in one process as an error of the same kind in all.

    Every process must enter it, since the others would wait for one that has left. If processes
    have errors of different kinds, all raise the first of `kinds` that occurs.
    """
    problem: Exception | None = None
    try:
        yield
    except kinds as error:
        problem = error
    has = gather(np.asarray([isinstance(problem, kind) for kind in kinds]))  # [processes, kinds]
    for kind, failed in zip(kinds, has.T, strict=True):
        if not failed.any():
            continue
        if isinstance(problem, kind):
            raise problem
        others = ", ".join(map(str, np.flatnonzero(failed)))
        raise kind(f"process {others} cannot go on; its log says why")


def check_all(good: bool, problem: str) -> None:
    """Checks that `good` is true in every process.

    Raises:
        ValueError: in every process, with the numbers of the processes in which it is false.
    """
    bad = np.flatnonzero(~gather(np.asarray(good)))
    if bad.size:
        raise ValueError(f"process {', '.join(map(str, bad))} of {jax.process_count()}: {problem}")


def check_same(text: str, problem: str) -> None:
    """Checks that every process has the same `text` as process 0.

    Raises:
        ValueError: in every process, with the numbers of the processes that differ.
    """
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    check_all(bool((gather(digest)[0] == digest).all()), problem)
