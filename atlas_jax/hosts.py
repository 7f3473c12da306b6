"""Start-up of a run of several processes: they meet, and watch each other until the end."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from atlas_jax import distributed
from atlas_jax.options.train import HostsConfig
from atlas_jax.types import Address
from atlas_jax.watch import Watch, WatchLimits

_ENVIRONMENT = ("ATLAS_COORDINATOR", "ATLAS_NUM_PROCESSES", "ATLAS_PROCESS_ID")
_MARGIN_SECS = 30
"""Seconds by which JAX's own timeouts exceed those of `HostsConfig`.

Ours must expire first, because only our error names the process that failed."""


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
    distributed.arrivals.append(watch.arrive)

    def part(_: Any, error: BaseException | None, __: Any) -> None:
        distributed.arrivals.clear()
        if error is None:
            watch.leave()
        else:
            watch.fail(error)

    with contextlib.ExitStack() as stack:
        # Unlike a callback, it is handed the error, of which the others are told.
        stack.push(part)
        yield


def _with_environment(address: Address) -> Address:
    host, total, index = (os.environ.get(name, "") for name in _ENVIRONMENT)
    # Process 0 counts as given, so a negative number stands for none.
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
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1 or "JOBSET_NAME" in os.environ:
        return True
    return _num_tpu_hosts() > 1


def _num_tpu_hosts() -> int:
    """Returns the number of hosts of the TPU slice, as JAX counts them; 1 without TPUs."""
    from jax._src.clusters import cloud_tpu_cluster as tpu  # JAX has no public name for it

    # Elsewhere the metadata server of Google's machines is not there to be asked.
    if not tpu.running_in_cloud_tpu_vm:
        return 1
    for cluster in (tpu.GkeTpuCluster, tpu.GceTpuCluster):
        if cluster.is_env_present():
            return int(cluster.get_process_count())
    return 1


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
