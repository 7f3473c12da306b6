"""Clusters in which JAX finds the processes of a run by itself, and what their hosts share."""

import http.server
import os
import sys
import threading

import pytest
from jax._src.clusters import cloud_tpu_cluster

from atlas_jax import hosts
from tests import processes

VARIABLES = (
    "SLURM_STEP_NODELIST", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JOBSET_NAME",
    "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_SKIP_MDS_QUERY", "MEGASCALE_NUM_SLICES",
)  # fmt: skip
CACHE = """
import pathlib, sys
from atlas_jax import hosts
from atlas_jax.options.train import HostsConfig
from atlas_jax.startup import directory
from atlas_jax.types import Address

with hosts.joined(HostsConfig(), Address()):
    print([directory._seen_by_all(pathlib.Path(name)) for name in sys.argv[1:]])
"""
ATTRIBUTES = "/computeMetadata/v1/instance/attributes/"


@pytest.fixture
def bare(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def tpu_vm(bare):
    """A server that answers as the metadata server of Google's machines does."""
    values = {"agent-worker-number": "1", "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'"}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = values.get(self.path.removeprefix(ATTRIBUTES))
            self.send_response(200 if value is not None else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        bare.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        # What JAX sets where libtpu is installed.
        bare.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
        yield values
        server.shutdown()


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_STEP_NODELIST": "a,b", "SLURM_NTASKS": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),  # also of Open MPI 5, which gives no address
        ({"JOBSET_NAME": "grpo"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False),  # not on a machine with TPUs
    ],
)
def test_variables_tell_whether_there_are_several_processes(bare, variables, several):
    for name, value in variables.items():
        bare.setenv(name, value)
    assert hosts._in_cluster_of_several() is several


@pytest.mark.parametrize(
    ("workers", "several"),
    [("10.0.0.1", False), ("10.0.0.1,10.0.0.2", True), ("w:0:10.0.0.1,w:1:10.0.0.2", True)],
)
def test_workers_of_tpu_vms_stand_in_their_metadata(tpu_vm, workers, several):
    tpu_vm["worker-network-endpoints"] = workers
    assert hosts._in_cluster_of_several() is several


@pytest.mark.parametrize("name", ["TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"])
def test_workers_on_kubernetes_stand_in_a_variable(tpu_vm, bare, name):
    bare.setenv(name, "a")
    assert not hosts._in_cluster_of_several()
    bare.setenv(name, "a,b")
    assert hosts._in_cluster_of_several()


def test_a_cache_of_programs_is_kept_where_all_processes_see_it(tmp_path):
    """One directory is that of both, of the other each has its own, and one cannot be made."""
    (tmp_path / "file").touch()
    commands = []
    for i, (flag, _, number) in enumerate(processes.address_flags(2)):
        address = {
            "ATLAS_COORDINATOR": flag.partition("=")[2],
            "ATLAS_NUM_PROCESSES": "2",
            "ATLAS_PROCESS_ID": number.partition("=")[2],
        }
        own = [tmp_path / "both", tmp_path / f"host_{i}", tmp_path / "file" / "below"]
        command = [sys.executable, "-c", CACHE, *map(str, own)]
        commands.append({"args": command, "env": os.environ | address})
    with processes.started(commands, tmp_path / "logs") as run:
        assert run.wait() == [0, 0], run.text(0)
        for i in range(2):
            assert "[True, False, False]" in run.text(i)
