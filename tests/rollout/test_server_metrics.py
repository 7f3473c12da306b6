"""Load of vLLM servers in a step's metrics."""

import threading
import time
import urllib.request

import pytest

from atlas_jax.rollout import server_metrics
from atlas_jax.rollout.server_metrics import Load, ServerMetrics
from atlas_jax.rollout.servers import PoolOptions, ServerPool
from atlas_jax.rollout.vllm import VllmEngine
from tests import stand_in, words
from tests.rollout import test_servers
from tests.rollout.test_servers import SAMPLING, WORDS, eventually, requests

# From vLLM 0.32.0, with the second engine of `--data-parallel-size 2`.
PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a \\"b\\" c"} 3.0
vllm:num_requests_running{engine="1",model_name="a \\"b\\" c"} 4.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 20.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="m"} 5.0
vllm:num_preemptions_total{engine="1",model_name="m"} 1.0
# TYPE vllm:num_preemptions_created gauge
vllm:num_preemptions_created{engine="0",model_name="m"} 1.7e+09
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    return words.save(directory, WORDS, hidden_size=16, max_position_embeddings=512)


def test_engines_of_a_server_are_added_up_and_other_families_are_not_read():
    assert server_metrics.read(PAGE) == Load(7.0, 2.0, 0.5, 6.0)


@pytest.mark.parametrize("page", ["", "vllm:num_requests_running x", PAGE.replace("usage", "")])
def test_a_page_without_the_numbers_is_an_error(page):
    with pytest.raises(ValueError):
        server_metrics.read(page)


def test_vllm_itself_states_them(vllm_server):
    with urllib.request.urlopen(f"{vllm_server.url}/metrics", timeout=60) as reply:
        load = server_metrics.read(reply.read().decode())
    assert load.running >= 0
    assert 0 <= load.kv_use <= 1


def test_a_step_has_the_load_of_the_time_in_which_servers_work(model, monkeypatch):
    monkeypatch.setattr(server_metrics, "_EVERY_SECS", 0.1)
    with (
        stand_in.running(model, 2) as ((one, first), (two, second)),
        test_servers.opened([one, two]) as engine,
    ):
        first.secs_per_token = second.secs_per_token = 0.05
        metrics = ServerMetrics(engine.pool)
        time.sleep(1)
        idle = metrics.take()
        assert idle["rollout/student_running"] == (0, 0)
        assert idle["rollout/student_preemptions"] == (0.0, 1)
        first.num_preemptions = 7
        # Three requests for a server each: sums over both.
        engine.generate(requests(6, 40), SAMPLING)
        found = metrics.take()
        running, count = found["rollout/student_running"]
        assert count >= 2
        assert 1 < running / count <= 3
        share, count = found["rollout/student_kv_use"]
        assert share / count == pytest.approx(running / count / 256)
        assert found["rollout/student_waiting"][0] == 0
        assert found["rollout/student_preemptions"] == (7.0, 1)
        first.num_preemptions = 3  # started again
        eventually(lambda: metrics.take()["rollout/student_preemptions"] == (3.0, 1))


@pytest.mark.parametrize(
    "fault",
    [
        {"do": "hang"},
        {"do": "status", "status": 404},
        {"do": "truncate"},
        {"do": "reply", "reply": {}},
    ],
    ids=["hang", "404", "truncate", "other"],
)
def test_a_page_that_cannot_be_read_costs_the_metrics_alone(model, monkeypatch, caplog, fault):
    monkeypatch.setattr(server_metrics, "_EVERY_SECS", 0.1)
    monkeypatch.setattr(server_metrics, "_PAGE_SECS", 0.5)
    with stand_in.running(model, 1) as ((url, server),), test_servers.opened([url]) as engine:
        server.secs_per_token = 0.05
        server.faults = [{"path": "/metrics", **fault}]
        metrics = ServerMetrics(engine.pool)
        written = engine.generate(requests(2, 40), SAMPLING)
        assert [len(c.token_ids) for (c,) in written] == [40] * 2
        assert {weight for _, weight in metrics.take().values()} == {0}
        assert caplog.text.count(f"no metrics of {url}") == 1
        server.faults = []
        ask = threading.Thread(target=engine.generate, args=(requests(2, 40), SAMPLING))
        ask.start()
        eventually(lambda: metrics.take()["rollout/student_running"][0] > 0)
        ask.join()


def test_processes_that_do_not_read_have_the_same_names(model):
    with stand_in.running(model, 1) as ((url, server),):
        pool = ServerPool("teacher", [url], PoolOptions(8, 60.0, 60.0))
        try:
            pool.open()
            quiet, reads = ServerMetrics(pool, reads=False), ServerMetrics(pool)
            eventually(lambda: "/metrics" in [call[1] for call in server.calls])
            assert quiet.take().keys() == reads.take().keys()
            VllmEngine(pool, words.tokenizer(WORDS), (), 8).generate(requests(1), SAMPLING)
            assert {weight for _, weight in quiet.take().values()} == {0}
        finally:
            pool.close()
