"""Servers that fail while they are asked: what is lost, what is not, and what ends.

The servers are stand-ins (`tests/stand_in.py`), in a thread where that will do, and processes where
they are stopped or killed.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from atlas_jax import progress, stopping
from atlas_jax.rollout import capabilities
from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.servers import Look, PoolOptions, ServerPool
from atlas_jax.rollout.vllm import VllmEngine
from atlas_jax.types import DependencyError
from tests import http_faults, processes, stand_in, words

WORDS = tuple(f"w{i}" for i in range(8))
LOOK = Look(every_secs=0.2, timeout_secs=2.0, misses=3, patience_secs=2.0)
OPTIONS = PoolOptions(64, 120.0, 120.0, LOOK)
SAMPLING = Sampling(0.7)
POISON = 13  # a token that only the request at fault has


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    return words.save(directory, WORDS, hidden_size=16, max_position_embeddings=512)


@contextlib.contextmanager
def opened(urls, options=OPTIONS, key=""):
    """Yields an engine whose pool has the servers of `urls`."""
    pool = ServerPool("student", urls, options, key)
    try:
        pool.open()
        yield VllmEngine(pool, words.tokenizer(WORDS), (), len(words.tokenizer(WORDS)))
    finally:
        pool.close()


def requests(count, max_tokens=4):
    return [Request((5, 6, 7, i % 10), max_tokens, seed=i) for i in range(count)]


def asked(engine, *sizes):
    """Asks in a thread, from whose start on servers are at work; returns it and what they write."""
    written = []
    ask = threading.Thread(
        target=lambda: written.extend(engine.generate(requests(*sizes), SAMPLING))
    )
    ask.start()
    eventually(lambda: engine.pool.servers[0].tasks)
    return ask, written


def is_up(engine):
    return [server.up for server in engine.pool.servers]


def eventually(holds, secs=300):
    end = time.monotonic() + secs
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"do": "status", "status": 500}, r"500: out of order"),
        ({"do": "status", "status": 503}, r"503: out of order"),
        ({"do": "truncate"}, r"no reply: Client"),
        ({"do": "reply", "reply": {"choices": []}}, r"not a completion"),
        ({"do": "hang"}, r"no reply within 3 s"),
    ],
    ids=["500", "503", "truncated", "other", "hanging"],
)
def test_one_bad_request_fails_by_itself(model, fault, reason):
    """Before, four tries at each server took all of them out and ended the run."""
    with stand_in.running(model, 4) as servers:
        for _, server in servers:
            server.faults = [{"path": capabilities.GENERATE, "token": POISON, **fault}]
        options = OPTIONS._replace(request_timeout_secs=3.0)
        with opened([url for url, _ in servers], options) as engine:
            asked = [*requests(20), Request((5, POISON), 4, seed=0)]
            *fine, bad = engine.generate(asked, SAMPLING)
            assert is_up(engine) == [True] * 4
        sent = [call for _, server in servers for call in server.calls if call[3]]
    assert [len(c.token_ids) for (c,) in fine] == [4] * 20
    assert bad[0].finish_reason.startswith("error: ")
    assert re.search(reason, bad[0].finish_reason)
    if fault["do"] == "hang":
        assert len([call for call in sent if POISON in call[3]["token_ids"]]) == 1


def test_processes_that_know_only_their_own_requests_spread_over_all_servers(model):
    """Four processes with one question of 32 samples each, of a policy and of a student."""
    with stand_in.running(model, 8) as servers, contextlib.ExitStack() as stack:
        urls = [url for url, _ in servers]
        for process in range(4):
            options = OPTIONS._replace(first=process * len(urls) // 4)
            engine = stack.enter_context(opened(urls, options))
            group = Request((5, 6, 7), 4, seed=process, num_samples=32)
            alone = [Request((5, 6), 4, seed=process), Request((6, 5), 4, seed=process)]
            # One after another, as the question goes on.
            written = [*engine.generate(alone, SAMPLING), *engine.generate([group], SAMPLING)]
            assert [len(samples) for samples in written] == [1, 1, 32]
        paths = [[call[1] for call in server.calls] for _, server in servers]
    loads = [found.count(capabilities.GENERATE) for found in paths]
    assert sum(loads) == 4 * 34
    assert max(abs(load - 17) for load in loads) <= 0.2 * 17


def test_answers_are_signs_of_progress_and_waits_have_patience(model):
    """By which the watch of a run of several processes tells a slow server from a stuck process."""
    with stand_in.running(model) as ((url, server),), opened([url]) as engine:
        server.secs_per_token = 0.3
        before = progress.marks()
        thread = threading.Thread(target=engine.generate, args=(requests(3), SAMPLING))
        thread.start()
        eventually(lambda: progress.patience() == OPTIONS.request_timeout_secs)
        thread.join()
        assert progress.patience() == 0
        assert progress.marks() >= before + 3


def test_a_request_that_ends_servers_does_not_end_all_of_them(model, tmp_path):
    with stand_in.started(model, tmp_path, 4) as servers:
        with opened([url for url, _ in servers]) as engine:
            fault = {"path": capabilities.GENERATE, "token": POISON, "do": "exit"}
            for url, _ in servers:
                http_faults.set_faults(url, [fault])
            asked = [*requests(8), Request((5, POISON), 4, seed=0)]
            *fine, bad = engine.generate(asked, SAMPLING)
            assert sum(is_up(engine)) == 1
        assert sum(process.poll() is None for _, process in servers) == 1
    assert "3 servers went down while they worked on it" in bad[0].finish_reason
    assert [len(c.token_ids) for (c,) in fine] == [4] * 8


def test_a_hung_server_is_left_out_and_comes_back_when_it_answers(model, tmp_path):
    with stand_in.started(model, tmp_path, 2, "--secs-per-token", "0.02") as servers:
        (one, first), (two, _) = servers
        with opened([one, two]) as engine:
            ask, written = asked(engine, 8, 100)
            first.send_signal(signal.SIGSTOP)
            ask.join(120)
            assert [len(c.token_ids) for (c,) in written] == [100] * 8
            assert is_up(engine) == [False, True]
            assert "got no answer within" in engine.pool.servers[0].why
            first.send_signal(signal.SIGCONT)
            eventually(lambda: is_up(engine) == [True, True])


def test_the_last_server_is_waited_for_a_moment_if_it_hangs(model, tmp_path):
    look = LOOK._replace(timeout_secs=1.0, patience_secs=60.0)
    with (
        stand_in.started(model, tmp_path, 1, "--secs-per-token", "0.02") as ((url, process),),
        opened([url], OPTIONS._replace(look=look)) as engine,
    ):
        ask, written = asked(engine, 2, 50)
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: is_up(engine) == [False])
        process.send_signal(signal.SIGCONT)
        ask.join(120)
        assert [len(c.token_ids) for (c,) in written] == [50] * 2
        process.kill()
        process.wait()
        with pytest.raises(DependencyError, match=r"no student server is left: .*Connect"):
            engine.generate(requests(2), SAMPLING)


def test_a_server_that_somebody_else_paused_is_left_out_until_it_goes_on(model):
    with stand_in.running(model, 2) as ((one, _), (two, _)), opened([one, two]) as engine:
        http_faults.post(one, "/pause?mode=keep")
        eventually(lambda: is_up(engine) == [False, True])
        assert engine.pool.servers[0].why == "it is paused, and not by this run"
        assert all(len(c.token_ids) == 4 for (c,) in engine.generate(requests(6), SAMPLING))
        http_faults.post(one, "/resume")
        eventually(lambda: is_up(engine) == [True, True])


def test_an_engine_that_hangs_behind_a_healthy_front_is_found_out(model):
    """As vLLM's do, when a GPU is lost."""
    with stand_in.running(model, 2) as ((one, first), (two, _)), opened([one, two]) as engine:
        first.faults = [{"path": "/is_paused", "do": "hang"}]
        eventually(lambda: is_up(engine) == [False, True])


def test_an_engine_on_a_cpu_may_take_its_time(model):
    with stand_in.running(model) as ((url, server),):
        server.device = "cpu"
        with opened([url]) as engine:
            server.faults = [{"path": "/is_paused", "do": "hang"}]
            time.sleep(LOOK.misses * LOOK.timeout_secs + 2)
            assert is_up(engine) == [True]


def test_what_takes_the_place_of_a_server_is_looked_at_before_it_is_asked(model):
    with stand_in.running(model, 2) as ((one, first), (two, _)):
        named = []
        pool = ServerPool("student", [one, two], OPTIONS)
        try:
            pool.open(lambda url, start: named.append((url, start.root)))
            engine = VllmEngine(pool, words.tokenizer(WORDS), (), len(words.tokenizer(WORDS)))
            pool.call(lambda: pool.drop(pool.servers[0], "test"))
            eventually(lambda: is_up(engine) == [True, True])
            assert [url for url, _ in named] == [one, two, one]
            first.faults = [{"path": "/version", "do": "reply", "reply": {}}]
            pool.call(lambda: pool.drop(pool.servers[0], "test"))
            time.sleep(1)
            assert is_up(engine) == [False, True]
        finally:
            pool.close()


def test_a_server_that_says_no_is_left_out(model):
    """Such as one that was started again with another key."""
    with stand_in.running(model, 2) as ((one, first), (two, _)), opened([one, two]) as engine:
        first.faults = [{"do": "status", "status": 401}]
        written = engine.generate(requests(6), SAMPLING)
        assert all(len(c.token_ids) == 4 for (c,) in written)
        assert is_up(engine) == [False, True]


def test_the_only_server_is_waited_for_while_it_is_paused_and_refuses_as_vllm_0_33_does(model):
    look = LOOK._replace(every_secs=0.05)
    with (
        stand_in.running(model, 1, refuses_when_paused=True) as ((url, server),),
        opened([url], OPTIONS._replace(look=look)) as engine,
    ):
        http_faults.post(url, "/pause?mode=wait")
        written = []
        ask = threading.Thread(
            target=lambda: written.extend(engine.generate(requests(3), SAMPLING))
        )
        ask.start()
        # More often than a client tries, and than the health check may miss.
        eventually(lambda: [c[1] for c in server.calls].count(capabilities.GENERATE) >= 18)
        eventually(lambda: [c[1] for c in server.calls].count("/is_paused") >= 2 * LOOK.misses)
        http_faults.post(url, "/resume")
        ask.join(120)
        assert [len(c.token_ids) for (c,) in written] == [4] * 3
        assert is_up(engine) == [True]
        assert engine.pool.servers[0].client.num_retries == 0


def test_a_server_that_is_down_at_the_start_is_left_out(model, tmp_path, caplog):
    port = processes.free_port()
    lost = f"http://127.0.0.1:{port}"
    with stand_in.running(model) as ((url, _),), opened([lost, url]) as engine:
        assert is_up(engine) == [False, True]
        assert f"{lost} is taken out" in caplog.text
        assert all(len(c.token_ids) == 4 for (c,) in engine.generate(requests(3), SAMPLING))
        command = [sys.executable, "-m", "tests.stand_in", "--model", model, "--port", str(port)]
        with subprocess.Popen(command) as process:
            try:
                eventually(lambda: is_up(engine) == [True, True], 120)
            finally:
                process.kill()


def test_if_all_servers_are_down_at_the_start_the_run_does_not_begin():
    urls = [f"http://127.0.0.1:{processes.free_port()}" for _ in range(2)]
    with (
        pytest.raises(ValueError, match=rf"cannot use the student server {urls[0]}.*{urls[1]}.*/h"),
        opened(urls),
    ):
        pass


@pytest.mark.parametrize(
    ("path", "reply"),
    [
        ("/server_info", {"vllm_config": {"model_config": {}}}),
        ("/server_info", {}),
        ("/server_info", [1]),
        ("/v1/models", {"data": []}),
        ("/version", {"release": "1"}),
    ],
)
def test_a_server_that_is_not_vllm_is_refused_in_one_line(model, path, reply):
    with stand_in.running(model) as ((url, server),):
        server.faults = [{"path": path, "do": "reply", "reply": reply}]
        with pytest.raises(ValueError, match="vLLM") as error, opened([url]):
            pass
    assert "\n" not in str(error.value)
    assert url in str(error.value)
    assert "python -m atlas_jax.serve" in str(error.value)


def test_the_key_is_sent_to_every_route_and_to_no_log(model, caplog):
    with stand_in.running(model, key="sesame") as ((url, server),):
        with opened([url], key="sesame") as engine:
            assert len(engine.generate(requests(1), SAMPLING)[0][0].token_ids) == 4
            eventually(lambda: "/weight_info" in [call[1] for call in server.calls])
        with pytest.raises(ValueError, match=r"refuses .*401.*same key") as error, opened([url]):
            pass
    assert "sesame" not in caplog.text + str(error.value)


def test_a_request_to_stop_ends_generation_at_once(model):
    with stand_in.running(model) as ((url, server),), opened([url]) as engine:
        server.faults = [{"path": capabilities.GENERATE, "do": "hang"}]
        threading.Timer(0.5, stopping.request, ["SIGTERM"]).start()
        try:
            with pytest.raises(stopping.StopRequestedError, match="SIGTERM"):
                engine.generate(requests(2), SAMPLING)
        finally:
            stopping.reset()
        eventually(lambda: not engine.pool.servers[0].tasks)


def test_who_waits_for_a_pool_that_is_closed_gets_an_error(model):
    with stand_in.running(model) as ((url, server),):
        problems = []

        def ask(engine):
            try:
                engine.generate(requests(2), SAMPLING)
            except DependencyError as error:
                problems.append(str(error))

        with opened([url]) as engine:
            server.faults = [{"path": capabilities.GENERATE, "do": "hang"}]
            thread = threading.Thread(target=ask, args=(engine,))
            thread.start()
            eventually(lambda: engine.pool.servers[0].tasks)
        thread.join(60)
        assert not thread.is_alive()
        ask(engine)
    assert len(problems) == 2
    assert problems[1] == "the connection to the student servers is closed"


CLOSES = """
import sys, threading, time
from tests.rollout import test_servers as t
with t.opened(sys.argv[1:]) as engine:
    ask = lambda: engine.generate(t.requests(8, 400), t.SAMPLING)
    threading.Thread(target=ask, daemon=True).start()
    while not engine.pool.servers[0].tasks:
        time.sleep(0.01)
    sys.stdout.write("asked\\n")
    sys.stdout.flush()
    sys.stdin.readline()
"""


def test_a_process_ends_although_a_server_hangs(model, tmp_path):
    with stand_in.started(model, tmp_path, 2, "--secs-per-token", "0.2") as servers:
        command = [sys.executable, "-c", CLOSES, *(url for url, _ in servers)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
        )
        try:
            assert process.stdout.readline() == "asked\n"
            servers[0][1].send_signal(signal.SIGSTOP)
            time.sleep(1)  # within a look at it
            process.communicate("\n", timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0
