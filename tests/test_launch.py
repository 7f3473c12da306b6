"""Launch scripts: they parse, and with programs that stand for a cluster's they train."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
import yaml

from tests import processes
from tests.e2e import test_sft

inputs = test_sft.inputs

SSH = """#!/usr/bin/env bash
while [[ $1 == -o ]]; do shift 2; done
shift
exec bash -c "$*"
"""
SRUN = """#!/usr/bin/env bash
tasks=$SLURM_JOB_NUM_NODES
while [[ $1 == --* ]]; do [[ $1 != --ntasks=* ]] || tasks=${1#*=}; shift; done
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=$tasks SLURM_STEP_NUM_NODES=$tasks
export SLURM_LOCALID=0
pids=()
for i in $(seq 0 $((tasks - 1))); do SLURM_PROCID=$i "$@" & pids+=($!); done
trap 'interrupted=yes; kill -TERM "${pids[@]}"' TERM
worst=0
for pid in "${pids[@]}"; do
  while interrupted=; code=0; wait "$pid" || code=$?; [ -n "$interrupted" ]; do :; done
  [ "$code" = 0 ] || worst=$code
done
exit "$worst"
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" >>"$SCONTROL_LOG"\n'


@pytest.fixture
def environment(tmp_path):
    """The environment of a cluster's host: programs of its own come first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("ssh", SSH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {
        "PATH": path, "XLA_FLAGS": "", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": os.getcwd(),
        "SCONTROL_LOG": str(tmp_path / "scontrol"), "PORT": str(processes.free_port()),
    }  # fmt: skip


def settings(inputs, output, **changes):
    """`key=value` of a short run."""
    flags = test_sft.command(inputs, output)["args"][4:]
    values = dict(flag.removeprefix("--config.").split("=", 1) for flag in flags)
    values |= {"max_steps": 3, "save_steps": 1, "compilation_cache_dir": inputs / "xla"} | changes
    return [f"{k}={v}" for k, v in values.items()]


def test_scripts_have_no_mistakes_that_shellcheck_finds():
    scripts = [*pathlib.Path("launch").glob("*.sh"), *pathlib.Path("launch").glob("*.sbatch")]
    assert len(scripts) >= 7
    check = ["shellcheck", "--shell=bash", "--severity=warning", "--external-sources"]
    folder = pathlib.Path(sys.executable).parent
    subprocess.run([folder / check[0], *check[1:], *scripts], check=True)


def test_over_ssh_each_host_runs_a_process_and_the_end_of_the_script_lets_them_save(
    inputs, environment, tmp_path
):
    hosts, output = tmp_path / "hosts", tmp_path / "run"
    hosts.write_text("127.0.0.1  # the first\n\nuser@localhost\n")
    script = ["launch/multihost.sh", "--hosts", hosts, "1", "configs/run/quickstart_sft.py"]
    command = {"args": [*script, *settings(inputs, output, max_steps=100)], "env": environment}
    with processes.started([command], tmp_path / "logs") as run:
        run.wait_until(lambda: "[0] " in run.text(0) and "step 1/" in run.text(0))
        run.processes[0].send_signal(signal.SIGTERM)
        assert run.wait(120) == [75], run.text(0)[-3000:]
    assert "stopped at step" in run.text(0)
    log = (output / "training.log").read_text()
    assert "2 x" in log
    missing = subprocess.run(
        [*script[:2], "nowhere", *script[3:]], capture_output=True, check=False
    )
    assert b"nowhere cannot be read" in missing.stderr


def test_under_slurm_a_job_saves_before_its_time_is_over_and_goes_back_to_the_queue(
    inputs, environment, tmp_path
):
    output = tmp_path / "run"
    script = ["bash", "launch/slurm_train.sbatch", "configs/run/quickstart_sft.py"]
    command = {"args": [*script, *settings(inputs, output, max_steps=100)], "env": environment}
    with processes.started([command], tmp_path / "logs") as run:
        run.wait_until(lambda: "step 1/" in run.text(0))
        run.processes[0].send_signal(signal.SIGUSR1)
        assert run.wait(120) == [75], run.text(0)[-3000:]
    again = pathlib.Path(environment["SCONTROL_LOG"])
    assert again.read_text() == f"requeue {os.getpid()}\n"
    steps = [int(path.name) for path in (output / "checkpoints").iterdir()]
    last = max(steps)
    more = settings(inputs, output, max_steps=last + 1)
    refused = {"args": [*script, *more[:-1], "max_steps=-7"], "env": environment}
    with processes.started([refused], tmp_path / "refused") as run:
        assert run.wait(120) == [1]
    assert again.read_text().count("requeue") == 2, "a failure is tried again"
    processes.finish([{"args": [*script, *more], "env": environment}], tmp_path / "more")
    assert (output / "final" / "model.safetensors").exists()
    assert again.read_text().count("requeue") == 2


def test_the_jobset_tells_each_pod_where_the_first_one_is():
    found = yaml.safe_load(pathlib.Path("launch/k8s_jobset.yaml").read_text())
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    values = {e["name"]: e.get("value") for e in container["env"]}
    name = found["metadata"]["name"]
    assert values["ATLAS_COORDINATOR"].split(":")[0] == f"{name}-{job['name']}-0-0.{name}"
    assert int(values["ATLAS_NUM_PROCESSES"]) == spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"
    assert pathlib.Path(container["command"][0]).exists()
    assert pathlib.Path(container["command"][2]).exists()
