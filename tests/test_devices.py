"""A host whose GPUs JAX does not use; `nvidia-smi` is a stand-in that lists eight."""

import os
import re
import subprocess
import sys

import jax
import pytest

from atlas_jax import devices
from tests import processes
from tests.e2e import test_sft

inputs = test_sft.inputs
NVIDIA_SMI = """#!/usr/bin/env bash
for i in {0..7}; do echo "GPU $i: NVIDIA H100 80GB HBM3 (UUID: GPU-$i)"; echo "  MIG 1g.10gb"; done
"""
EXTRA = (
    "error: this host has 8 GPUs, and JAX runs on its CPU; JAX needs "
    'pip install -e ".[cuda]" and a driver of 580 or newer (nvidia-smi) for them; or set '
    "JAX_PLATFORMS=cpu to train on the CPU"
)


@pytest.fixture
def gpu_host(tmp_path):
    """The environment of a host with GPUs, where nobody has chosen a platform."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": os.getcwd()}
    environment["XLA_FLAGS"] = processes.xla_flags(1)
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", devices.WANTED):
        environment.pop(name, None)
    return environment


def train(inputs, output, environment, command=None):
    flags = test_sft.command(inputs, output)["args"]
    words = [*command, *flags[4:]] if command else flags
    return subprocess.run(
        [*words, "--config.max_steps=1"], capture_output=True, text=True, check=False,
        env=environment, timeout=600,
    )  # fmt: skip


@pytest.mark.parametrize(
    "command", [None, ["launch/launch.sh", "8", "configs/run/quickstart_sft.py"]]
)
def test_gpus_that_jax_does_not_use_are_an_error_that_names_the_extra(
    inputs, gpu_host, tmp_path, command
):
    result = train(inputs, tmp_path / "run", gpu_host, command)
    assert result.returncode == 1
    assert EXTRA in result.stderr.splitlines()
    assert not (tmp_path / "run").exists()


def checked(environment):
    """Checks the devices in a process of its own."""
    code = "from atlas_jax import cli, devices; cli.tool(devices.check)"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize("choice", [{"JAX_PLATFORMS": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}])
def test_a_cpu_that_was_chosen_is_none_to_complain_of(gpu_host, choice):
    assert EXTRA in checked(gpu_host).stderr.splitlines()
    result = checked(gpu_host | choice)
    assert result.returncode == 0, result.stderr


def test_another_number_of_devices_than_was_asked_for_is_an_error(inputs, tmp_path):
    two = os.environ | {"XLA_FLAGS": processes.xla_flags(2)}
    result = train(inputs, tmp_path / "run", two | {devices.WANTED: "8"})
    assert result.returncode == 1
    line = next(x for x in result.stderr.splitlines() if x.startswith("error: "))
    assert line.startswith("error: 8 devices were asked for, and JAX has 2 (")
    assert checked(two | {devices.WANTED: "2"}).returncode == 0


def test_evaluation_wants_the_gpus_too(inputs, gpu_host, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    model = inputs / "model"
    words = [f"--teacher={model}", f"--student={model}", f"--data={tmp_path / 'q.jsonl'}"]
    result = subprocess.run(
        [sys.executable, "-m", "atlas_jax.evaluate", *words, f"--output={tmp_path / 'e.json'}"],
        capture_output=True, text=True, check=False, env=gpu_host,
    )  # fmt: skip
    assert EXTRA in result.stderr.splitlines()


def test_chips_of_tpus_are_counted_and_other_accelerators_are_not(tmp_path):
    assert devices._count_tpus(str(tmp_path)) == 0
    (tmp_path / "dev" / "accel").mkdir(parents=True)  # Linux's directory for other accelerators
    (tmp_path / "dev" / "accel" / "accel0").touch()
    assert devices._count_tpus(str(tmp_path)) == 0
    for i in range(4):
        (tmp_path / "dev" / f"accel{i}").touch()
    assert devices._count_tpus(str(tmp_path)) == 4


@pytest.mark.parametrize(
    "platform,version,says",
    [
        ("gpu", (0, 11, 0), r"0\.11\.1 is needed, and Python 3\.12 .*\[cuda\]"),
        ("tpu", (0, 10, 2), r"slow on a TPU.*\[tpu\]"),
        ("gpu", (0, 11, 1), "^$"),
        ("cpu", (0, 10, 2), "^$"),
    ],
)
def test_a_jax_that_is_too_old_for_the_devices_is_named(monkeypatch, platform, version, says):
    monkeypatch.setattr(jax, "__version_info__", version)
    assert re.search(says, devices.old_jax(platform))
