"""How a run finds its servers' key, its probe, and the way of its weights."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from atlas_jax import distributed
from atlas_jax.checkpoint import hf
from atlas_jax.config import GRPOConfig
from atlas_jax.hosts import joined
from atlas_jax.options.train import HostsConfig
from atlas_jax.recipes import grpo, vllm_backend
from atlas_jax.rollout import versions
from atlas_jax.rollout.engine import Request
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.model import open_frozen
from atlas_jax.types import Address
from tests import processes, stand_in, words
from tests.rollout import served

WORDS = tuple(f"w{i}" for i in range(8))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return words.save(tmp_path_factory.mktemp("model"), WORDS, hidden_size=16)


def test_the_key_is_that_of_the_environment_or_what_serve_left(tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert vllm_backend.server_key(str(tmp_path)) == ""
    (tmp_path / "server_token").write_text("of-the-run\n")
    (tmp_path / "server_token").chmod(0o600)
    assert vllm_backend.server_key(str(tmp_path)) == "of-the-run"
    monkeypatch.setenv("VLLM_API_KEY", "of the environment")
    assert vllm_backend.server_key(str(tmp_path)) == "of the environment"


@pytest.mark.parametrize(("block", "room", "size"), [(16, 500, 36), (128, 500, 288), (128, 60, 60)])
def test_the_probe_spans_blocks_of_the_cache_as_far_as_there_is_room(block, room, size):
    prompt = vllm_backend.probe_prompt(words.tokenizer(WORDS), block, room)
    assert len(prompt) == size
    assert len(set(prompt)) > 5


def test_probes_of_several_servers_are_one_batch_on_any_devices(path):
    ids = np.asarray([[4, 5, 6], [7, 8, 9], [4, 5, 6], [10, 11, 12], [5, 5, 5]], np.int32)
    found = []
    for devices in (jax.devices()[:1], jax.devices()):
        model = open_frozen(Compute.of(served.CONFIG, devices), path)
        params = hf.load(model.source, model.decoder)
        logprobs_fn = grpo.make_logprobs_fn(model.decoder, served.CONFIG, 1)
        found.append(
            vllm_backend.probe_logprobs(served.CONFIG, model, logprobs_fn)(params, (5, 6), ids)
        )
    assert found[0].shape == ids.shape
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    np.testing.assert_array_equal(found[0][0], found[0][2])
    assert np.abs(found[0][0] - found[0][1]).max() > 0


def with_servers(config, urls, **options):
    rollout = dataclasses.replace(config.rollout, teacher_servers=urls, **options)
    return dataclasses.replace(config, rollout=rollout)


@pytest.mark.parametrize(
    ("urls", "options", "where"),
    [
        ("http://127.0.0.1:1,http://localhost:2", {}, "memory"),
        ("http://127.0.0.1:1,http://other:2", {}, "run/weights"),
        ("http://127.0.0.1:1", {"weight_sync": "restart"}, "run/weights"),
        ("http://127.0.0.1:1", {"sync_dir": "SYNC"}, "sync"),
    ],
)
def test_weights_go_through_memory_if_all_servers_are_here(
    path, tmp_path, monkeypatch, urls, options, where
):
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(versions, "_MEMORY", tmp_path / "memory")
    options = {k: str(tmp_path / "sync") if v == "SYNC" else v for k, v in options.items()}
    config = dataclasses.replace(GRPOConfig(), output_dir=str(tmp_path / "run"))
    model = served.trainer(path).model
    found = vllm_backend.choose_versions(with_servers(config, urls, **options), model)
    assert str(found.root.relative_to(tmp_path)).startswith(where)
    found.close()


@pytest.mark.parametrize(
    ("request_seeds", "device", "seeded"),
    [
        ("cpu", "cpu", True),
        ("cpu", "cuda", False),
        ("always", "cuda", True),
        ("never", "cpu", False),
    ],
)
def test_completions_have_seeds_where_they_are_asked_for(
    path, tmp_path, request_seeds, device, seeded
):
    with stand_in.running(path) as ((url, server),):
        server.device = device
        config = with_servers(GRPOConfig(), url, request_seeds=request_seeds, protocol="direct")
        config = dataclasses.replace(config, output_dir=str(tmp_path))
        model = open_frozen(Compute.of(config, jax.devices()[:1]), path)
        backend = vllm_backend.make_vllm_backend(config, model, None, lambda *_: None)
        try:
            request = Request((5, 6), 4, seed=0, num_samples=3)
            backend._policy(0).generate([request], served.SAMPLING)
        finally:
            backend.close()
    asked = [body["sampling_params"] for *_, body in server.calls if body]
    assert len(asked) == 3
    assert len({params.get("seed") for params in asked}) == (3 if seeded else 1)
    assert all(("seed" in params) == seeded for params in asked)


def main():
    """One of two processes on hosts of their own."""
    port, process = sys.argv[1:]
    address = Address(f"127.0.0.1:{port}", 2, int(process))
    with joined(HostsConfig(), address):
        socket.sethostname(f"host-{process}")  # not before: the processes meet by their names
        vllm_backend.check_loopback(with_servers(GRPOConfig(), "http://host-0:1"))
        try:
            vllm_backend.check_loopback(
                with_servers(GRPOConfig(), "http://host-0:1,http://localhost:2")
            )
        except ValueError as error:
            sys.stdout.write(f"refused: {error}\n")
            sys.stdout.flush()
        distributed.barrier("both have gone on")


def test_an_address_that_is_another_server_on_each_host_is_refused(tmp_path):
    enter = ["unshare", "--uts"]
    allowed = os.geteuid() == 0 and shutil.which("unshare")
    if not allowed or subprocess.run([*enter, "true"], check=False).returncode:
        pytest.skip("this machine does not let tests name hosts")
    code = "import tests.recipes.test_vllm_backend as t; t.main()"
    port = str(processes.free_port())
    environment = os.environ | {"XLA_FLAGS": processes.xla_flags(1)}
    commands = [
        {
            "args": [*enter, sys.executable, "-c", code, port, str(i)],
            "env": environment,
        }
        for i in range(2)
    ]
    run = processes.finish(commands, tmp_path)
    wanted = "refused: rollout.teacher_servers has http://localhost:2, which is another server on"
    for process in range(2):
        assert f"{wanted} each of the hosts host-0, host-1" in run.text(process)
