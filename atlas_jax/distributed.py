"""Start-up of a multi-process JAX run and what processes say to each other."""

from __future__ import annotations

import os

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from atlas_jax.types import Metrics

_ENVIRONMENT = ("ATLAS_COORDINATOR", "ATLAS_NUM_PROCESSES", "ATLAS_PROCESS_ID")
_CLUSTERS = ("SLURM_JOB_NUM_NODES", "OMPI_MCA_orte_hnp_uri", "JOBSET_NAME", "TPU_WORKER_HOSTNAMES")


def start(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the processes of a run; does nothing for a run of one process.

    Arguments that are not given come from the environment variables ATLAS_COORDINATOR,
    ATLAS_NUM_PROCESSES and ATLAS_PROCESS_ID; under SLURM, Open MPI, Kubernetes JobSet and Cloud TPU
    JAX finds them by itself.

    Args:
        coordinator: `HOST:PORT` of process 0.
        num_processes: how many processes the run has.
        process_id: which of them this is, from 0.

    Raises:
        ValueError: if only some of the three are known.
    """
    host, total, index = (os.environ.get(name, "") for name in _ENVIRONMENT)
    coordinator = coordinator or host
    num_processes = num_processes or int(total or 0)
    process_id = process_id if process_id >= 0 else int(index or -1)
    given = (bool(coordinator), num_processes > 0, process_id >= 0)
    if all(given):
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif any(given):
        raise ValueError(
            f"--coordinator={coordinator!r} --num_processes={num_processes} "
            f"--process_id={process_id}: give all three, or none"
        )
    elif _in_cluster_of_several():
        jax.distributed.initialize()
    logging.info("process %d of %d", jax.process_index(), jax.process_count())


def _in_cluster_of_several() -> bool:
    if "SLURM_JOB_NUM_NODES" in os.environ:
        return int(os.environ.get("SLURM_NTASKS", "1")) > 1
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or any(name in os.environ for name in _CLUSTERS[1:3])


def is_main() -> bool:
    """Returns whether this process writes the files that are written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of that name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Returns whether `flag` is true in any process; every process must call it."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(jax.numpy.asarray(flag)).any())


def max_over_processes(number: int) -> int:
    """Returns the highest `number` of all processes; every process must call it."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(jax.numpy.asarray(number)).max())


def sum_over_processes(metrics: Metrics) -> Metrics:
    """Returns the sums of `(sum, weight)` metrics; every process has the same names."""
    if jax.process_count() == 1:
        return metrics
    values = np.asarray([metrics[name] for name in sorted(metrics)], np.float64)
    total = multihost_utils.process_allgather(values.view(np.uint32)).view(np.float64).sum(0)
    return {name: tuple(total[i]) for i, name in enumerate(sorted(metrics))}


def from_main(values: np.ndarray) -> np.ndarray:
    """Returns the first process's array; every process calls it with one of the same shape."""
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.broadcast_one_to_all(values))
