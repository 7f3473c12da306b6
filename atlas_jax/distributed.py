"""Start-up of a multi-process JAX run and what processes say to each other."""

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
from atlas_jax.watch import Limits, Watch

_ENVIRONMENT = ("ATLAS_COORDINATOR", "ATLAS_NUM_PROCESSES", "ATLAS_PROCESS_ID")
_CLUSTERS = ("OMPI_MCA_orte_hnp_uri", "JOBSET_NAME")
_MARGIN_SECS = 30
"""What JAX's own limits have more, at least, than those of `HostsConfig`, whose errors name a
process."""

_TEXT_BYTES = 2048
"""Longest text that processes exchange."""

_watches: list[Watch] = []
"""That of this process, in a run of several; JAX's runtime too is one for each process."""


@contextlib.contextmanager
def joined(hosts: HostsConfig, address: Address) -> Iterator[None]:
    """Joins the processes of a run, for as long as it lasts; one process alone joins nothing.

    What `address` lacks comes from the environment variables ATLAS_COORDINATOR,
    ATLAS_NUM_PROCESSES and ATLAS_PROCESS_ID; under SLURM, Open MPI, Kubernetes JobSet and Cloud TPU
    JAX finds it by itself. An error inside ends the other processes too.

    Raises:
        ValueError: if only some of the three are known.
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
    """Returns whether this process has all devices that it sees.

    Under SLURM and Open MPI JAX takes it for one of several of its host, each with one GPU.
    """
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return False
    nodes, tasks = os.environ.get("SLURM_STEP_NUM_NODES"), os.environ.get("SLURM_NTASKS")
    alone = (nodes and nodes == tasks) or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return all(_known(address)) or bool(alone)


def _initialize(hosts: HostsConfig, address: Address) -> None:
    """Starts JAX's runtime; ends the process if the others do not come."""
    # The service would take SIGTERM, which the loop handles and which ends a start at once.
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
        # JAX sends one each half of it, so it may find a process dead after the other half.
        heartbeat_timeout_seconds=3 * hosts.heartbeat_timeout_secs + 2 * _MARGIN_SECS,
        shutdown_timeout_seconds=hosts.heartbeat_timeout_secs + _MARGIN_SECS,
    )
    jax.device_count()  # waits until every process has told its devices
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

    limits = Limits(hosts.heartbeat_timeout_secs, hosts.stall_timeout_secs)
    service: Any = runtime.global_state.client
    watch = Watch(service, jax.process_index(), jax.process_count(), limits)
    watch.start()
    return watch


def arrive(place: str = "") -> None:
    """Notes that this process has come to a place that all come to; see `watch`."""
    for watch in _watches:
        watch.arrive(place)


def is_main() -> bool:
    """Returns whether this process writes the files that are written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of that name."""
    arrive(name)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def vote(flag: bool) -> Callable[[], bool]:
    """Starts to ask all processes, and returns what waits for whether `flag` is true in any.

    Devices do not pause for it: the answer is computed behind what they have been given before.
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
    """Returns `[processes, ...]`: what each process gave, all of one shape and dtype."""
    arrive()
    if jax.process_count() == 1:
        return numbers[None]
    content = np.frombuffer(np.ascontiguousarray(numbers).tobytes(), np.uint8)  # JAX cuts float64
    found = multihost_utils.process_allgather(content)
    return found.view(numbers.dtype).reshape(-1, *numbers.shape)


def gather_rows(rows: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Returns the rows of all processes, in order of the processes; every process must call it.

    Args:
        rows: those of this process, `[counts[process index], ...]`.
        counts: the number of rows of each process, of which some may have none.
    """
    padded = np.zeros((max(counts), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    parts = zip(gather(padded), counts, strict=True)
    return np.concatenate([part[:count] for part, count in parts])


def max_over_processes(number: int) -> int:
    """Returns the highest `number` of all processes; every process must call it."""
    return int(gather(np.asarray(number)).max())


def from_main(values: np.ndarray) -> np.ndarray:
    """Returns the first process's array; every process calls it with one of the same shape."""
    return gather(values)[0]


def gather_texts(text: str) -> list[str]:
    """Returns the text of each process, cut to a length that suffices for an error.

    Every process must call it.
    """
    content = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode()[:_TEXT_BYTES], np.uint8)
    content[: encoded.size] = encoded
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in gather(content)]


@contextlib.contextmanager
def together(*kinds: type[Exception]) -> Iterator[None]:
    """Makes an error inside one process an error of the same kind in all.

    Every process enters it, since the others would wait for one that has left. Where processes have
    errors of different kinds, the first of `kinds` that occurs counts for all.
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
        ValueError: in every process, with the numbers of those where it is false.
    """
    bad = np.flatnonzero(~gather(np.asarray(good)))
    if bad.size:
        raise ValueError(f"process {', '.join(map(str, bad))} of {jax.process_count()}: {problem}")


def check_same(text: str, problem: str) -> None:
    """Checks that every process has the same `text` as process 0.

    Raises:
        ValueError: in every process, with the numbers of those that differ.
    """
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    check_all(bool((gather(digest)[0] == digest).all()), problem)
