"""Runs of two processes, each with half the devices of one process beside them."""

import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests import processes
from tests.e2e import test_grpo, test_sft
from tests.rollout import served

STEPS = 4
ADDRESSES = ("10.213.7.1", "10.213.7.2")
LIMIT = 12  # hosts.heartbeat_timeout_secs
SFT = {"max_steps": STEPS, "save_steps": 2, "per_device_train_batch_size": 1,
       "hosts.heartbeat_timeout_secs": LIMIT}  # fmt: skip
GRPO = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "scale_rewards": "batch", "rollout.refill_rounds": 1, "sync_ref_model": False,
        "num_iterations": 1, "hosts.heartbeat_timeout_secs": LIMIT}  # fmt: skip

EPISODES = """
import asyncio

async def ask(policy, question):
    number = int(question.text[1:])
    await policy.say(f"{question.text} plan", max_tokens=3)
    if number % 4 == 1:
        raise KeyError("no such tool")
    if number % 4 == 2:
        await asyncio.sleep(600)
    await policy.say(f"hint {number}", role="tool", max_tokens=3)
    for _ in range(number):
        await policy.say("answer", max_tokens=3)
"""  # turns of different numbers, so that a process waits for the other one
sft_inputs, grpo_inputs = test_sft.inputs, test_grpo.inputs


def commands(base, num_processes, devices, **options):
    """Returns the command of each process of a run with this many devices each."""
    flags = [f"--config.{k}={v}" for k, v in options.items()]
    environment = base["env"] | {"XLA_FLAGS": processes.xla_flags(devices)}
    joins = processes.address_flags(num_processes) if num_processes > 1 else [[]]
    return [{"args": [*base["args"], *flags, *join], "env": environment} for join in joins]


@pytest.fixture(scope="module")
def sft(sft_inputs):
    """Returns `(output, processes, devices, **options) -> commands` of an SFT run."""

    def make(output, num_processes=2, devices=4, **options):
        base = test_sft.command(sft_inputs, output)
        return commands(base, num_processes, devices, **SFT | options)

    return make


@pytest.fixture(scope="module")
def whole(sft, tmp_path_factory):
    """Returns the output of an uninterrupted SFT run of so many processes, made once."""

    @functools.cache
    def make(num_processes):
        output = tmp_path_factory.mktemp(f"whole{num_processes}")
        processes.finish(sft(output, num_processes, 8 // num_processes), output / "logs")
        return output

    return make


def assert_same_run(output, other):
    """Both have the same metrics and the same model, but for the order of sums."""
    mine, theirs = test_grpo.metrics(output), test_grpo.metrics(other)
    assert [line.keys() for line in mine] == [line.keys() for line in theirs]
    for line, expected in zip(mine, theirs, strict=True):
        for name, value in expected.items():
            ours = np.nan if line[name] is None else line[name]
            np.testing.assert_allclose(ours, np.nan if value is None else value, 1e-4, 1e-6, name)
    final = [
        safetensors.numpy.load_file(path / "final/model.safetensors") for path in (output, other)
    ]
    assert final[0].keys() == final[1].keys()
    for name, tensor in final[0].items():
        np.testing.assert_allclose(tensor, final[1][name], 1e-4, 1e-5, err_msg=name)


def assert_bitwise(output, other):
    assert test_grpo.metrics(output) == test_grpo.metrics(other)
    names = "final/model.safetensors", "final/config.json"
    assert all((output / n).read_bytes() == (other / n).read_bytes() for n in names)


def saved(output, step):
    return lambda: (output / "checkpoints" / str(step)).exists()


def test_sft_on_two_processes_equals_one(whole):
    assert_same_run(whole(2), whole(1))
    log = (whole(2) / "training.log").read_text()
    assert [log.count(f"step {i}/{STEPS} loss") for i in range(1, STEPS + 1)] == [1] * STEPS
    assert len(list(whole(2).glob("events.out.tfevents*"))) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGKILL, id="killed"), pytest.param(signal.SIGSTOP, id="hanging")],
)
def test_a_lost_process_ends_the_other_by_name_and_the_run_continues(sft, whole, tmp_path, number):
    output = tmp_path / "run"
    with processes.started(sft(output, save_steps=1), tmp_path / "logs") as run:
        run.wait_until(saved(output, 1))
        run.processes[1].send_signal(number)
        assert run.processes[0].wait(10 * LIMIT) == 1, run.text(0)[-5000:]
    error = f"process 1 on {socket.gethostname()} has given no sign of life"
    assert error in run.text(0)
    assert error in (output / "training.log").read_text()
    assert not (output / "final").exists()
    processes.finish(sft(output), tmp_path / "again")
    assert_bitwise(output, whole(2))


def test_the_loss_of_process_0_ends_the_other(sft, tmp_path):
    output = tmp_path / "run"
    with processes.started(sft(output, save_steps=1), tmp_path / "logs") as run:
        run.wait_until(saved(output, 1))
        run.processes[0].kill()
        assert run.processes[1].wait(10 * LIMIT)
    assert "coordination service" in run.text(1)
    assert not (output / "final").exists()


def test_sigterm_of_one_process_stops_all_and_one_host_continues(sft, whole, tmp_path):
    output = tmp_path / "run"
    with processes.started(sft(output), tmp_path / "logs") as run:
        run.wait_until(lambda: "step 1/" in run.text(0))
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.wait(300) == [75, 75]
    begun = [int(path.name) for path in (output / "checkpoints").iterdir()]
    assert 1 <= max(begun) < STEPS
    alone = {"train_batch_size": 16, "gradient_accumulation_steps": 0, "mesh.tensor": 2}
    processes.finish(sft(output, 1, 4, **alone), tmp_path / "again")
    assert_same_run(output, whole(2))


@pytest.fixture
def network(tmp_path):
    """Two network namespaces with a cable between them: host-0 and host-1, each with an address."""
    names = [f"atlas{os.getpid()}-{i}" for i in range(2)]
    files = [pathlib.Path("/etc/netns", name, "hosts") for name in names]

    def ip(*words, check=True):
        subprocess.run(["ip", *words], check=check, capture_output=True, text=True)

    allowed = os.geteuid() == 0 and shutil.which("ip")
    if not allowed or subprocess.run(["ip", "netns", "add", names[0]], check=False).returncode:
        pytest.skip("this machine does not let tests make network namespaces")
    try:
        for i, (name, file) in enumerate(zip(names, files, strict=True)):
            if i:
                ip("netns", "add", name)
            file.parent.mkdir(parents=True)
            file.write_text(f"127.0.0.1 localhost\n{ADDRESSES[i]} host-{i}\n")
        ends = ["netns", names[0], "type", "veth", "peer", "cable", "netns", names[1]]
        ip("link", "add", "cable", *ends)
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name, file in zip(names, files, strict=True):
            ip("netns", "delete", name, check=False)
            shutil.rmtree(file.parent, ignore_errors=True)


def on_hosts(network, asked):
    """Returns the commands as two hosts run them, each with its own name and address."""
    inside = 'hostname "$0" && exec "$@"'
    for i, (name, command) in enumerate(zip(network, asked, strict=True)):
        flags = [f.replace("127.0.0.1:", f"{ADDRESSES[0]}:") for f in command["args"]]
        enter = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", inside, f"host-{i}"]
        command["args"] = [*enter, *flags]
    return asked


@pytest.mark.long
def test_a_host_that_is_cut_off_ends_both_by_name_and_both_continue(sft, whole, network, tmp_path):
    output = tmp_path / "run"
    with processes.started(on_hosts(network, sft(output, save_steps=1)), tmp_path / "logs") as run:
        run.wait_until(saved(output, 1))
        subprocess.run(["ip", "-n", network[1], "link", "set", "cable", "down"], check=True)
        assert all(run.wait(10 * LIMIT))
    assert "process 1 on host-1 has given no sign of life" in run.text(0)
    assert "process 0 on host-0, which holds the coordination service" in run.text(1)
    subprocess.run(["ip", "-n", network[1], "link", "set", "cable", "up"], check=True)
    processes.finish(on_hosts(network, sft(output)), tmp_path / "again")
    assert_bitwise(output, whole(2))


def test_processes_with_other_options_or_another_directory_are_refused(sft, tmp_path):
    for change in ("--config.seed=7", f"--config.output_dir={tmp_path / 'other'}"):
        asked = sft(tmp_path / "run")
        asked[1]["args"].append(change)
        with processes.started(asked, tmp_path / "logs") as run:
            assert all(run.wait(300))
        for process in range(2):
            assert "process 1 of 2: its options differ" in run.text(process)


def rollouts(output, step):
    """The samples of a step without what depends on the order of sums, in order of questions."""
    lines = []
    for path in sorted((output / "rollouts").glob(f"step_{step:06d}_*")):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
    keep = ("question_id", "member", "reward", "advantage", "trains", "teaching", "messages")
    return [
        {k: line.get(k) for k in keep}
        | {k: v["token_ids"] for k, v in line.items() if isinstance(v, dict) and "token_ids" in v}
        for line in lines
    ]


def grpo_of_one_and_two(grpo_inputs, directory, protocol, options):
    """Runs GRPO on one process and on two, which write the same; returns their outputs."""
    outputs = []
    for number in (1, 2):
        outputs.append(directory / str(number))
        base = test_grpo.command(grpo_inputs, outputs[-1], protocol)
        asked = commands(base, number, 4 // number, **options)
        processes.finish(asked, directory / f"logs{number}")
    assert_same_run(*outputs)
    for step in (1, 2):
        one, two = (rollouts(output, step) for output in outputs)
        assert len(one) == 32
        assert one == two
    return outputs


def test_grpo_on_two_processes_equals_one(grpo_inputs, tmp_path):
    outputs = grpo_of_one_and_two(grpo_inputs, tmp_path, "teaching", GRPO)
    assert len(list((outputs[1] / "rollouts").iterdir())) == 4


@pytest.mark.long
def test_grpo_with_fewer_questions_than_processes_equals_one(grpo_inputs, tmp_path):
    """One question a step, and one in the evaluation: process 1 has none, and trains half."""
    options = GRPO | {
        "num_generations": 32, "data.eval_path": grpo_inputs / "questions.jsonl",
        "rollout.eval_limit": 1, "eval_steps": 1,
    }  # fmt: skip
    outputs = grpo_of_one_and_two(grpo_inputs, tmp_path, "teaching", options)
    files = sorted(path.name for path in (outputs[1] / "rollouts").iterdir())
    assert files == [f"step_00000{step}_process_0.jsonl" for step in (1, 2)]
    assert sum("eval/student_accuracy" in line for line in test_grpo.metrics(outputs[1])) == 2


@pytest.mark.long
def test_grpo_through_vllm_on_two_processes_equals_one(grpo_inputs, vllm_server, tmp_path):
    options = GRPO | {
        "model_name_or_path": vllm_server.root, "rollout.backend": "vllm",
        "rollout.teacher_servers": vllm_server.url, "rollout.sync_dtype": "float32",
        "rollout.probe_tolerance": 1e-3, "num_iterations": 2,
    }  # fmt: skip
    grpo_of_one_and_two(grpo_inputs, tmp_path, "direct", options)
    first = served.trainer(vllm_server.root)
    with served.connected(first, [vllm_server.url], tmp_path / "back") as link:
        link.sync.push(first.params, 0)


@pytest.mark.parametrize(
    "backend", [pytest.param("local"), pytest.param("vllm", marks=pytest.mark.long)]
)
def test_episodes_on_two_processes_equal_one(grpo_inputs, request, tmp_path, monkeypatch, backend):
    (tmp_path / "tools_of_mine.py").write_text(EPISODES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    options = GRPO | {
        "rollout.protocol": "tools_of_mine:ask", "rollout.episode_timeout_secs": 2.0,
        "rollout.max_turns": 8, "max_new_tokens": 24, "max_seq_length": 64,
        "data.length_buckets": "(64,)", "reward.max_failed_frac": 0.9,
    }  # fmt: skip
    if backend == "vllm":
        server = request.getfixturevalue("vllm_server")
        options |= {
            "model_name_or_path": server.root, "rollout.backend": "vllm",
            "rollout.teacher_servers": server.url, "rollout.sync_dtype": "float32",
            "rollout.probe_tolerance": 1e-3,
        }  # fmt: skip
    outputs = grpo_of_one_and_two(grpo_inputs, tmp_path, "direct", options)
    lines = [line for line in test_grpo.metrics(outputs[1]) if "loss/total" in line]
    assert len(lines) == 2
    for line in lines:
        assert abs(line["rollout/mismatch_kl"]) < 1e-6
        assert line["rollout/failed_frac"] >= line["reward/failed_frac"] > 0
        assert line["rollout/observed_tokens"] > 0
    for sample in (s for step in (1, 2) for s in rollouts(outputs[1], step)):
        kind = int(sample["messages"][0]["content"][1]) % 4
        assert (sample["reward"] is None) == (kind in (1, 2))
        assert (sample["completion"] == []) == (kind in (1, 2))
        assert sample["trains"] == (kind in (0, 3))
    if backend == "vllm":
        first = served.trainer(server.root)
        with served.connected(first, [server.url], tmp_path / "back") as link:
            link.sync.push(first.params, 0)


def test_a_checkpoint_is_restored_bitwise_on_other_meshes(whole):
    from atlas_jax import step
    from atlas_jax.checkpoint import hf
    from atlas_jax.checkpoint.manager import Checkpoints
    from atlas_jax.config import MeshConfig
    from tests import tiny

    checkpoints = Checkpoints(str(whole(2)))
    source = str(whole(2) / "final")
    for devices, mesh in (
        (8, MeshConfig(data=2, fsdp=2, tensor=2)),
        (4, MeshConfig(data=2, tensor=2)),
        (1, MeshConfig()),
    ):
        decoder, _ = tiny.load(source, mesh, jax.devices()[:devices])
        abstract = step.abstract(decoder.shapes, decoder.placements())
        params = checkpoints.restore_params(STEPS, abstract)
        expected = hf.load(hf.SafetensorsSource(source), decoder)
        for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
            assert ours.sharding == theirs.sharding
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
