"""`launch/launch_with_server.sh`: servers of SmolLM2 and GRPO against them, on the CPU.

One run of four steps: stopped by Ctrl-C after the first, then its trainer is killed, and then the
same command once more.
"""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests import terminal, vllm_servers
from tests.assets import smollm2_gguf

STEPS = 4
SCRIPT = pathlib.Path.cwd() / "launch/launch_with_server.sh"
CONFIG = "configs/run/quickstart_grpo.py"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    target = tmp_path_factory.mktemp("smollm2") / "model"
    convert = [sys.executable, "tools/convert_checkpoint.py", str(smollm2_gguf()), str(target)]
    subprocess.run(convert, check=True, env=os.environ | {"PYTHONPATH": "."})
    return target


def command(smollm2, output):
    """Returns the command of the run."""
    values = {
        "model_name_or_path": smollm2, "student_model": smollm2, "output_dir": output,
        "max_steps": STEPS, "num_generations": 2, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "max_new_tokens": 24, "max_probe_tokens": 12,
        "rollout.max_answer_tokens": 16, "max_prompt_length": 200, "max_seq_length": 256,
        "data.length_buckets": "(256,)", "temperature": 0.7, "top_p": 0.95, "beta": 0.0,
        "learning_rate": 1e-3, "weight_decay": 1.0, "save_steps": 1, "eval_steps": 0,
        "data.eval_path": "",
        "rollout.sync_dtype": "float32", "rollout.probe_tolerance": 1e-3,
    }  # fmt: skip
    words = [f"{name}={value}" for name, value in values.items()]
    return [str(SCRIPT), "1", "1", CONFIG, *words]


def environment(port):
    """Returns the environment of the script."""
    flags = "--max-model-len 512 --dtype float32"
    found = os.environ | {"PORT": str(port), "VLLM_FLAGS": flags}
    for name in ("XLA_FLAGS", "VLLM_API_KEY"):
        found.pop(name, None)
    return found


def start(smollm2, output, port):
    """Starts the run and returns its process; what it prints goes to a file."""
    with (output.parent / "printed.log").open("ab") as printed:
        return subprocess.Popen(
            command(smollm2, output), env=environment(port), stdout=printed,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def interrupt(smollm2, output, port, pipe=""):
    """Runs it in a terminal, types Ctrl-C in the second step, and returns what was seen."""
    seen = {}
    with terminal.opened(output.parent, environment(port)) as window:
        window.type(f"{shlex.join(command(smollm2, output))} {pipe}\n")
        window.wait_for(r"step 1/")
        seen["started"] = descendants(window.shell)
        window.type(terminal.CTRL_C)
        seen["code"] = window.code()
        seen["text"] = window.text
        # The shell of the terminal is not of the run.
        del seen["started"][window.shell.pid]
        seen["left"] = left(seen["started"], secs=1)
    seen["saved"] = max(int(path.name) for path in (output / "checkpoints").iterdir())
    return seen


def lines(output):
    path = output / "metrics.jsonl"
    found = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in found]


def trainer_pid(process):
    children = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip
    (pid,) = [line.split()[0] for line in children.splitlines() if "atlas_jax.train" in line]
    return int(pid)


def descendants(process):
    """Returns the command lines of all that descends from a process, by process id."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in table.stdout.splitlines()]
    family, size = {process.pid}, 0
    while len(family) > size:
        size = len(family)
        family |= {int(pid) for pid, parent, _ in rows if int(parent) in family}
    return {int(pid): args for pid, _, args in rows if int(pid) in family}


def left(started, secs):
    """Returns which of the processes have not ended after so many seconds."""
    for _ in range(10 * secs):
        found = {p: args for p, args in started.items() if pathlib.Path(f"/proc/{p}").exists()}
        if not found:
            break
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def run(smollm2, tmp_path_factory):
    """The output directory of the whole story, and what was seen on the way."""
    output = tmp_path_factory.mktemp("run") / "grpo"
    port = vllm_servers.free_port()
    seen = {"interrupt": interrupt(smollm2, output, port, "|& tee piped.log")}
    step = seen["interrupt"]["saved"] + 1
    process = start(smollm2, output, port)
    try:
        while process.poll() is None and not (output / "checkpoints" / str(step)).exists():
            time.sleep(0.1)
        assert process.poll() is None, (output.parent / "printed.log").read_text()[-4000:]
        seen["started"] = descendants(process)
        os.kill(trainer_pid(process), signal.SIGKILL)
        seen["killed"] = process.wait(180)
        seen["left"] = left(seen["started"], secs=20)
        seen["before"] = lines(output)
        process = start(smollm2, output, port)
        seen["finished"] = process.wait()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(180)
    assert seen["finished"] == 0, (output.parent / "printed.log").read_text()[-4000:]
    return output, seen


@pytest.mark.long
def test_ctrl_c_in_a_terminal_saves_though_tee_is_gone_and_then_ends_the_servers(run):
    _, seen = run
    found = seen["interrupt"]
    assert found["code"] == 75
    assert 1 <= found["saved"] < STEPS - 1
    assert "SIGINT: training is told to save and end, then the servers end" in found["text"]
    for part in ("atlas_jax.serve", "VLLM::EngineCore", "atlas_jax.train"):
        assert any(part in args for args in found["started"].values())
    assert not found["left"]
    assert "Traceback" not in found["text"]


@pytest.mark.long
def test_a_kill_ends_the_servers_and_is_the_exit_code(run):
    _, seen = run
    for part in ("atlas_jax.serve", "VLLM::EngineCore"):
        assert sum(part in args for args in seen["started"].values()) == 2
    assert seen["killed"] == 128 + signal.SIGKILL
    assert not seen["left"]


@pytest.mark.long
def test_the_same_command_continues_and_brings_the_servers_to_its_version(run):
    output, seen = run
    log = (output / "training.log").read_text()
    assert f"at step {seen['interrupt']['saved']}" in log
    assert f"at step {seen['interrupt']['saved'] + 1}" in log
    found = {line["step"]: line for line in lines(output) if "loss/total" in line}
    assert sorted(found) == list(range(1, STEPS + 1))
    assert found[STEPS]["sync/servers"] == 1
    for step in range(1, STEPS + 1):
        (path,) = (output / "rollouts").glob(f"step_{step:06d}*")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        written = [s["completion"] for s in samples if s["completion"]["token_ids"]]
        assert {c["weights_version"] for c in written} == {step - 1}
        assert {s["guided"]["weights_version"] for s in samples if s["guided"]["token_ids"]} == {0}


@pytest.mark.long
def test_server_and_trainer_agree_at_every_step(run):
    """Sampled at temperature 0.7 and top_p 0.95, in float32; every update changes every matrix."""
    output, _ = run
    found = [line for line in lines(output) if "loss/total" in line]
    assert len(found) == STEPS
    for line in found:
        assert line["sync/probe_diff"] <= 1e-4
        assert 0 <= line["rollout/mismatch_kl"] <= 1e-8


@pytest.mark.long
def test_logs_are_kept_for_each_process(run):
    output, _ = run
    assert {path.name.rpartition("_")[0] for path in (output / "logs").glob("*_server_*")} == {
        "student_server", "teacher_server",
    }  # fmt: skip
    assert f"step {STEPS}/{STEPS}" in (output / "logs" / "training.log").read_text()


@pytest.mark.long
def test_a_fresh_server_continues_from_the_export(run, tmp_path):
    output, _ = run
    with vllm_servers.running([output / "final"], tmp_path, "--max-model-len", "512") as (server,):
        payload = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        reply = server.post("/v1/completions", payload | {"model": str(output / "final")})
    assert "Paris" in reply["choices"][0]["text"]


def test_a_taken_port_is_an_error_before_anything_starts(tmp_path, vllm_server):
    port = int(vllm_server.url.rpartition(":")[2])
    process = start(vllm_server.root, tmp_path / "grpo", port)
    assert process.wait(60) == 2
    assert f"port {port} is taken" in (tmp_path / "printed.log").read_text()


@pytest.mark.long
def test_the_end_of_the_terminal_lets_training_save_and_then_ends_the_servers(smollm2, tmp_path):
    output = tmp_path / "grpo"
    with terminal.opened(tmp_path, environment(vllm_servers.free_port())) as window:
        window.type(shlex.join(command(smollm2, output)) + "\n")
        window.wait_for(r"step 1/")
        started = descendants(window.shell)
        del started[window.shell.pid]  # which has ended for this process only when it is waited for
        window.close()
        assert not left(started, secs=600)
    assert max(int(path.name) for path in (output / "checkpoints").iterdir()) >= 1
    assert "stopped at step" in (output / "training.log").read_text()
