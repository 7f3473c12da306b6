"""LoRA adapters alone, at stand-ins of servers: who has which, and what a fault costs."""

import contextlib
import dataclasses
import json
import threading
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

from atlas_jax.options.train import LoraOptions
from atlas_jax.rollout import capabilities
from atlas_jax.rollout.capabilities import ADAPTER_NAME, LOAD_ADAPTER, ServerStart
from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.types import DependencyError
from tests import stand_in
from tests.rollout import served
from tests.rollout.test_push import OPTIONS, PROMPT, asked, eventually, texts, up

LORA = LoraOptions(rank=2, alpha=3.0, rslora=True)


@pytest.fixture(scope="module")
def one(old):
    """The model with factors."""
    return served.adapted(old, LORA, 1)


@pytest.fixture(scope="module")
def two(old):
    """The same model with other factors."""
    return served.adapted(old, LORA, 2)


def connected(ours, urls, directory, **options):
    return served.connected(
        ours, urls, directory, prompt=PROMPT, options=OPTIONS, lora=LORA, **options
    )


@pytest.fixture
def link(one, tmp_path):
    """Returns a context with servers that take adapters, and the way to them."""

    @contextlib.contextmanager
    def make(count, **options):
        model = str(one.model.source.path)
        with stand_in.running(model, count, max_lora_rank=8) as servers:
            urls = [url for url, _ in servers]
            with connected(one, urls, tmp_path, **options) as found:
                yield found, [server for _, server in servers]

    return make


def told(server):
    """What the workers of a server were told to do, and where."""
    bodies = asked(server, "/collective_rpc")
    return [(b["method"], b["kwargs"]) for b in bodies if b["method"].startswith("load")]


def check_written(ours, written, version):
    assert {c.weights_version for c in written} == {version}
    for completion in written:
        found = ours.logprobs(completion.prompt_ids, np.asarray(completion.token_ids))
        np.testing.assert_allclose(completion.untruncated_logprobs, found, atol=0.01)


def test_servers_write_with_the_factors_that_were_pushed_and_load_nothing_else(link, one, two):
    with link(2) as (found, servers):
        for version, ours in ((1, one), (2, two), (3, one)):
            values = found.sync.push(ours.params, version)
            assert values["sync/servers"] == (2, 1)
            assert values["sync/probe_diff"][0] < 1e-5
            check_written(ours, texts(found), version)
        greedy = [Request((5, 6, 7), 8, seed=0)]
        ((theirs,),) = found.engine.generate(greedy, Sampling(0.0))
        ((wanted,),) = one.generate(greedy, Sampling(0.0))
        assert theirs.token_ids == wanted.token_ids
        (version,) = found.sync._versions.root.glob("v*")
        assert sorted(path.name for path in version.iterdir() if path.name[0] != ".") == [
            "adapter_config.json", "adapter_model.safetensors",
        ]  # fmt: skip
        tensors = safetensors.numpy.load_file(version / "adapter_model.safetensors")
        assert values["sync/bytes"] == (sum(t.nbytes for t in tensors.values()), 1)
        said = json.loads((version / "adapter_config.json").read_text())
        assert (said["r"], said["lora_alpha"], said["use_rslora"]) == (2, 3, True)
        for server in servers:
            # The name is told once, and never with `load_inplace`.
            (body,) = asked(server, LOAD_ADAPTER)
            assert body.keys() == {"lora_name", "lora_path"}
            assert [(method, how["number"]) for method, how in told(server)] == (
                [("load_adapter", 1)] * 3
            )
            assert {body["model"] for body in asked(server)} == {ADAPTER_NAME}
            assert list(server.adapters) == [1]


def test_completions_in_flight_go_on_with_the_new_factors(link, one, two):
    with link(1) as (found, (server,)):
        found.sync.push(one.params, 1)
        server.secs_per_token = 0.05
        before = len(asked(server))
        written = []
        requests = [Request((5, 6, 7 + i), 60, seed=i) for i in range(2)]
        endless = dataclasses.replace(found.engine, stop_ids=())
        ask = threading.Thread(
            target=lambda: written.extend(endless.generate(requests, served.SAMPLING))
        )
        ask.start()
        while len(asked(server)) < before + 2:
            time.sleep(0.01)
        time.sleep(0.2)
        found.sync.push(two.params, 2)
        ask.join(60)
        for (completion,) in written:
            assert [version for version, _ in completion.version_spans] == [1, 2]
            assert completion.finish_reason == "length"
        # The tokens are of one number, whose tensors have changed under them.
        assert list(server.adapters) == [1]


def test_a_server_that_was_started_again_gets_the_adapter_without_a_push(link, one, two):
    with link(2) as (found, servers):
        found.sync.push(one.params, 1)
        found.sync.push(two.params, 2)
        servers[0].begin_anew()
        eventually(lambda: len(asked(servers[0], LOAD_ADAPTER)) == 2)
        eventually(lambda: up(found) == [True, True])
        assert len(told(servers[0])) == 3
        check_written(two, texts(found), 2)
        assert found.sync.push(one.params, 3)["sync/servers"] == (2, 1)


def test_a_run_that_continues_takes_its_name_at_servers_that_know_it(link, one, two, tmp_path):
    with link(1) as (found, (server,)):
        found.sync.push(one.params, 1)
        url = found.pool.servers[0].url
        with connected(one, [url], tmp_path / "again") as again:
            values = again.sync.push(two.params, 1)
            assert values["sync/servers"] == (1, 1)
            check_written(two, texts(again), 1)
        assert [how["number"] for _, how in told(server)] == [1, 2]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (
            {"path": "/collective_rpc", "method": "load_adapter", "do": "skip"},
            "has the tensors of the last version",
        ),
        ({"path": "/collective_rpc", "do": "status", "status": 500}, "500: out of order"),
        ({"path": "/update_weight_version", "do": "noise", "size": 1.0}, "nats from the trainer"),
        ({"path": "/v1/models", "do": "reply", "reply": {}}, "unexpected reply: KeyError"),
    ],
)
def test_what_one_server_does_wrong_costs_that_server_alone(link, one, two, fault, reason, caplog):
    with link(2) as (found, servers):
        found.sync.push(one.params, 1)
        servers[0].faults = [dict(fault)]
        # It may be back soon, since the fault passes.
        assert found.sync.push(two.params, 2)["sync/servers"] == (1, 1)
        assert reason in caplog.text
        check_written(two, texts(found), 2)


def test_a_server_that_cannot_read_the_directory_is_told_which_one_to_share(link, one):
    with link(1) as (found, (server,)):
        server.faults = [{"path": LOAD_ADAPTER, "do": "status", "status": 404}]
        with pytest.raises(DependencyError, match=r"finds no .*v1\.\d; let rollout.sync_dir be a"):
            found.sync.push(one.params, 1)
        server.faults = [{"path": LOAD_ADAPTER, "do": "status", "status": 400}]
        with pytest.raises(DependencyError, match="400: out of order"):
            found.sync.push(one.params, 2)


def test_training_goes_on_while_the_adapter_is_on_its_way(link, one, two):
    with link(1) as (found, (server,)):
        found.sync.push(one.params, 1)
        server.faults = [{"path": "/collective_rpc", "method": "load_adapter", "do": "slow",
                          "secs": 1.0}]  # fmt: skip
        own = jax.tree.map(lambda leaf: leaf + 0, two.params)
        found.sync.begin(own, 2)
        factors = [x for path, x in jax.tree.leaves_with_path(own) if "lora" in path[-1].key]
        for leaf in factors:  # as the next step does
            leaf.delete()
        values = found.sync.finish()
        assert values["sync/servers"] == (1, 1)
        assert values["sync/probe_diff"][0] < 1e-5
        check_written(two, texts(found), 2)


START = ServerStart(
    root="model", max_model_len=64, block_size=16, max_num_seqs=8, dtype="float32", device="cpu",
    policy="priority", max_lora_rank=16, loads_adapters=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "rank", "message"),
    [
        ({"max_lora_rank": 0}, 4, "with no adapters.*--enable-lora --max-lora-rank 8, or use"),
        ({}, 17, "with --max-lora-rank 16, and model.lora.rank=17; .*--max-lora-rank 32, or use"),
        ({}, 513, "rank=513: vLLM takes adapters of rank 512 at most; use rollout.weight_sync=rel"),
        ({"lora_targets": ("o_proj",)}, 4, "o_proj, and the adapter has q_proj; start it without"),
        ({"loads_adapters": False}, 4, "without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1; start it with"),
    ],
)
def test_a_server_that_does_not_take_the_adapter_is_refused(changed, rank, message):
    with pytest.raises(ValueError, match=message) as refused:
        capabilities.check_adapters("http://a", START._replace(**changed), rank, ["q_proj"])
    assert "\n" not in str(refused.value)


def test_a_server_takes_adapters_up_to_its_rank_and_of_the_matrices_that_it_lists():
    capabilities.check_adapters("http://a", START, 16, ["q_proj", "down_proj"])
    for served_targets in (("qkv_proj",), ("q_proj", "v_proj")):
        start = START._replace(lora_targets=served_targets)
        capabilities.check_adapters("http://a", start, 16, ["q_proj", "v_proj"])
