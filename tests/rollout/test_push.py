"""Pushes of weights to stand-ins of servers: what each fault costs, and what it must not cost."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from atlas_jax import distributed, stopping
from atlas_jax.hosts import joined
from atlas_jax.llm_client import Client
from atlas_jax.options.train import HostsConfig
from atlas_jax.rollout import capabilities
from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.push import unequal
from atlas_jax.rollout.servers import Look, PoolOptions, Server
from atlas_jax.types import Address, DependencyError
from tests import http_faults, processes, stand_in, words
from tests.rollout import served
from tests.rollout.served import SAMPLING

PROMPT = tuple(3 + (i * i) % 17 for i in range(40))  # two blocks of the stand-in, and a half
OPTIONS = PoolOptions(64, 120.0, 120.0, Look(every_secs=0.2, timeout_secs=2.0, misses=3))


@pytest.fixture
def link(old, tmp_path):
    """Returns a context with servers, what they are told to do wrong, and the way to them."""

    @contextlib.contextmanager
    def make(count, **options):
        with stand_in.running(str(old.model.source.path), count) as servers:
            urls = [url for url, _ in servers]
            with connected(old, urls, tmp_path, **options) as found:
                yield found, [server for _, server in servers]

    return make


def connected(ours, urls, directory, **options):
    return served.connected(
        ours, urls, directory, prompt=PROMPT, **({"options": OPTIONS} | options)
    )


def nudged(params):
    """The parameters with one number changed by one step of bfloat16."""
    leaves, tree = jax.tree.flatten(params)
    first = leaves[0].astype("bfloat16")
    numbers = np.asarray(first).view(np.uint16).copy()
    numbers.flat[0] += 1
    leaves[0] = jax.device_put(
        numbers.view(first.dtype).astype(np.float32), leaves[0].sharding
    ).reshape(leaves[0].shape)
    return jax.tree.unflatten(tree, leaves)


def up(link):
    return [server.up for server in link.pool.servers]


def texts(link, count=6):
    requests = [Request((5, 6, 7 + i), 4, seed=i, num_samples=2) for i in range(count)]
    return [c for group in link.engine.generate(requests, SAMPLING) for c in group]


def asked(server, path=capabilities.GENERATE):
    return [body for _, called, _, body in server.calls if called == path]


def loading(server):
    """Number of times that a server was told to load weights."""
    bodies = asked(server, "/collective_rpc")
    return sum(body["method"] == "load_version" for body in bodies)


def test_servers_serve_what_was_pushed_and_the_trainer_computes_one_batch(link, old, new):
    with link(3) as (served_by, servers):
        calls = []
        score = served_by.sync._probe.logprobs

        def counted(params, prompt, ids):
            calls.append(ids.shape)
            return score(params, prompt, ids)

        served_by.sync._probe = served_by.sync._probe._replace(logprobs=counted)
        for version, ours in ((1, new), (2, old), (3, old)):
            values = served_by.sync.push(ours.params, version)
            assert values["sync/servers"] == (3, 1)
            assert values["sync/probe_diff"][0] < 1e-5
            assert values["sync/uncleared_caches"] == (0, 1)
            assert {c.weights_version for c in texts(served_by)} == {version}
        assert calls == [(6, 8)] * 3
        seeds = {body["sampling_params"]["seed"] for body in asked(servers[0])}
        assert len(seeds) > 6, "each version draws other tokens"


def test_completions_share_cached_blocks_only_under_the_same_weights(link, old, new):
    with link(1) as (served_by, (server,)):
        for version, ours in ((1, old), (2, new)):
            served_by.sync.push(ours.params, version)
            server.faults = [{"path": "/reset_prefix_cache", "do": "reply",
                              "reply": {"success": False}}]  # fmt: skip
            request = Request(PROMPT, 8, seed=3)
            ((completion,),) = served_by.engine.generate([request], SAMPLING)
            expected = ours.logprobs(PROMPT, np.asarray(completion.token_ids))
            np.testing.assert_allclose(completion.untruncated_logprobs, expected, atol=0.01)
        assert {body["cache_salt"] for body in asked(server)} == {"1.0", "2.0"}
        assert served_by.sync.push(old.params, 3)["sync/uncleared_caches"] == (1, 1)


def test_what_waited_in_a_queue_is_as_old_as_the_cache_that_it_may_have_read(link, old, new):
    """A request is sent before a push and begins after it, when its prompt may be cached."""
    with link(1) as (served_by, (server,)):
        served_by.sync.push(old.params, 1)
        url = served_by.pool.servers[0].url
        http_faults.post(url, "/pause?mode=keep")
        written = []
        ask = threading.Thread(target=lambda: written.extend(texts(served_by, 1)))
        before = len(asked(server))
        ask.start()
        while len(asked(server)) < before + 2:
            time.sleep(0.01)
        served_by.sync.push(new.params, 2)
        ask.join(60)
        assert [c.weights_version for c in written] == [1, 1]
        assert {c.weights_version for c in texts(served_by)} == {2}


def test_a_server_that_keeps_its_weights_is_found_out_however_small_the_change(link, old, caplog):
    """One number has changed, by one step of bfloat16: no probe can see that."""
    with link(2) as (served_by, servers):
        served_by.sync.push(old.params, 1)
        servers[1].faults = [{"path": "/collective_rpc", "method": "load_version", "do": "skip"}]
        values = served_by.sync.push(old.params, 2)
        assert values["sync/servers"] == (2, 1), "the trainer's have not changed either"
        values = served_by.sync.push(nudged(old.params), 3)
        assert values["sync/servers"] == (1, 1)
        assert values["sync/probe_diff"][0] < 1e-3
        assert up(served_by) == [True, False]
        assert "has the tensors of the last version" in served_by.pool.servers[1].why


def test_replicas_with_other_tensors_are_outvoted(link, old):
    with link(3) as (served_by, servers):
        servers[1].faults = [{"path": "/update_weight_version", "do": "noise", "size": 1e-6}]
        values = served_by.sync.push(old.params, 1)
        assert values["sync/servers"] == (2, 1)
        assert up(served_by) == [True, False, True]
        why = served_by.pool.servers[1].why
        assert f"of its tensors differ from those of {served_by.pool.servers[0].url}" in why


def test_of_two_replicas_that_differ_the_one_that_is_nearer_to_the_trainer_is_right():
    one, two = (Server(f"http://{n}", Client(""), Client("")) for n in ("one", "two"))
    a, b = {"0:x": "1", "0:y": "2"}, {"0:x": "1", "0:y": "3"}
    found = unequal({one: a, two: b}, {one: 0.02, two: 0.01})
    assert found == {one: "1 of its tensors differ from those of http://two, such as 0:y"}
    assert not unequal({one: a, two: a}, {one: 0.02, two: 0.01})
    # Where the model is divided over another number of workers, nothing can be compared.
    assert not unequal({one: a, two: {"0:x": "7", "1:x": "8"}}, {one: 0.0, two: 0.0})


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"path": "/weight_info", "do": "reply", "reply": {}}, "unexpected reply: KeyError"),
        ({"path": "/weight_info", "do": "reply", "reply": [1]}, "unexpected reply: TypeError"),
        ({"path": "/reset_prefix_cache", "do": "reply", "reply": {}}, "unexpected reply: KeyE"),
        ({"path": "/collective_rpc", "do": "reply", "reply": {"results": 3}}, "unexpected reply"),
        ({"path": "/collective_rpc", "do": "status", "status": 500}, "500: out of order"),
        ({"path": "/resume", "do": "status", "status": 404}, "404"),
        ({"path": capabilities.GENERATE, "do": "status", "status": 500}, "500: out of order"),
        ({"path": capabilities.GENERATE, "do": "reply", "reply": {}}, "not a completion"),
        ({"path": "/update_weight_version", "do": "noise", "size": 1.0}, "nats from the trainer"),
    ],
)  # fmt: skip
def test_what_one_server_does_wrong_costs_that_server_alone(link, old, new, fault, reason, caplog):
    """It stays paused and out, also while it is healthy, until a push has succeeded."""
    with link(2) as (served_by, servers):
        served_by.sync.push(old.params, 1)
        servers[0].faults = [dict(fault)]
        values = served_by.sync.push(new.params, 2)
        assert values["sync/servers"] == (1, 1)
        assert up(served_by) == [False, True]
        # Its health checks may already have found a further reason.
        assert reason in caplog.text
        servers[0].faults = []
        time.sleep(1)  # several looks
        assert up(served_by) == [False, True]
        written = texts(served_by)
        assert {c.weights_version for c in written} == {2}
        assert not [c for c in written if c.finish_reason.startswith("error")]
        assert served_by.sync.push(old.params, 3)["sync/servers"] == (2, 1)
        assert up(served_by) == [True, True]


def test_a_server_that_fails_its_probe_and_cannot_be_paused_ends_nothing(link, old, new):
    with link(2) as (served_by, servers):
        served_by.sync.push(old.params, 1)
        servers[0].faults = [
            {"path": "/resume", "do": "noise", "size": 1.0},
            {"path": "/pause", "after": 1, "do": "status", "status": 500},
        ]
        assert served_by.sync.push(new.params, 2)["sync/servers"] == (1, 1)
        time.sleep(1)
        assert up(served_by) == [False, True]
        assert {c.weights_version for c in texts(served_by)} == {2}


def test_a_server_that_was_not_paused_returns_when_it_has_loaded_the_current_weights(
    link, old, new
):
    with link(2) as (served_by, servers):
        served_by.sync.push(old.params, 1)
        servers[0].faults = [{"path": "/pause", "do": "truncate"}]
        assert served_by.sync.push(new.params, 2)["sync/servers"] == (1, 1)
        assert "no reply" in served_by.pool.servers[0].why
        servers[0].faults = []
        eventually(lambda: up(served_by) == [True, True])
        written = texts(served_by)
        assert {c.weights_version for c in written} == {2}
        assert not [c for c in written if c.finish_reason.startswith("error")]
        assert len(asked(servers[0])) > 4, "it answers again, after two pushes' probes"


def eventually(holds, secs=300):
    end = time.monotonic() + secs
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@contextlib.contextmanager
def restarted(url, model, tmp_path):
    """A server that is started at the address of one that has ended."""
    command = [sys.executable, "-m", "tests.stand_in", "--model", model]
    with (
        (tmp_path / "again.log").open("wb") as log,
        subprocess.Popen(
            [*command, "--port", url.rpartition(":")[2]], stdout=log, stderr=log
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def test_a_server_that_was_started_again_gets_the_current_weights_without_a_push(
    old, new, tmp_path
):
    """As `serve` starts it again after a crash, with the weights of the run's start."""
    model = str(old.model.source.path)
    with (
        stand_in.started(model, tmp_path, 1) as ((url, process),),
        connected(old, [url], tmp_path) as served_by,
    ):
        served_by.sync.push(new.params, 1)
        expected = texts(served_by)
        process.kill()
        process.wait()
        eventually(lambda: up(served_by) == [False])
        with restarted(url, model, tmp_path):
            eventually(lambda: up(served_by) == [True])
            written = texts(served_by)
            assert [c.token_ids for c in written] == [c.token_ids for c in expected]
            assert {c.weights_version for c in written} == {1}
            assert served_by.sync.push(old.params, 2)["sync/servers"] == (1, 1)


def test_a_server_that_comes_after_the_start_is_checked_and_gets_the_current_weights(
    old, new, tmp_path, caplog
):
    model = str(old.model.source.path)
    late = f"http://127.0.0.1:{processes.free_port()}"
    with (
        stand_in.running(model, 1) as ((url, _),),
        connected(old, [url, late], tmp_path) as served_by,
    ):
        served_by.sync.push(new.params, 1)
        assert up(served_by) == [True, False]
        other = words.save(tmp_path / "other", served.WORDS, **served.SIZES | {"hidden_size": 32})
        with restarted(late, other, tmp_path):
            eventually(lambda: "whose tensors are not those of the model" in caplog.text)
        short = words.save(
            tmp_path / "short", served.WORDS, **served.SIZES | {"max_position_embeddings": 64}
        )
        with restarted(late, short, tmp_path):
            eventually(lambda: "--max-model-len 64 and --block-size 16, the" in caplog.text)
        assert up(served_by) == [True, False]
        with restarted(late, model, tmp_path):
            eventually(lambda: up(served_by) == [True, True])
            assert served_by.pool.servers[1].start.root == model
            calls = [call[1] for call in http_faults.calls(late)]
            assert calls.index("/v1/models") < calls.index("/collective_rpc")
            written = texts(served_by)
            assert {c.weights_version for c in written} == {1}
            assert not [c for c in written if c.finish_reason.startswith("error")]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"path": "/collective_rpc", "method": "load_version", "do": "skip"}, "its tensors are"),
        ({"path": "/update_weight_version", "do": "noise", "size": 1e-6}, "its tensors are not"),
        ({"path": "/resume", "do": "noise", "size": 1.0}, "its probe differs by"),
    ],
)
def test_a_server_that_comes_back_with_other_weights_stays_paused_until_the_next_push(
    link, old, new, fault, reason
):
    with link(2) as (served_by, servers):
        served_by.sync.push(new.params, 1)
        url = served_by.pool.servers[0].url
        load = {"method": "load_version", "kwargs": {"weights_path": str(old.model.source.path)}}
        http_faults.post(url, "/collective_rpc", load)
        servers[0].faults = [dict(fault)]
        http_faults.post(url, "/update_weight_version", {"new_version": "default"})
        eventually(lambda: reason in served_by.pool.servers[0].why)
        servers[0].faults = []
        time.sleep(1)
        assert up(served_by) == [False, True]
        assert {c.weights_version for c in texts(served_by)} == {1}
        assert served_by.sync.push(old.params, 2)["sync/servers"] == (2, 1)


def test_if_no_server_is_left_the_error_names_each_reason(link, old):
    with link(2) as (served_by, servers):
        for server in servers:
            server.faults = [{"path": "/collective_rpc", "do": "status", "status": 500}]
        with pytest.raises(DependencyError, match=r"step 1 reached no teacher.*; http.*500: out"):
            served_by.sync.push(old.params, 1)
        assert up(served_by) == [False, False]
        for server in servers:
            server.faults = []
        assert served_by.sync.push(old.params, 2)["sync/servers"] == (2, 1), "they were tried again"


def test_a_server_that_takes_too_long_to_load_has_failed(link, old):
    """Its front answers every health check meanwhile."""
    options = OPTIONS._replace(control_timeout_secs=5.0)
    with link(2, options=options) as (served_by, servers):
        servers[0].faults = [{"path": "/collective_rpc", "do": "hang"}]
        assert served_by.sync.push(old.params, 1)["sync/servers"] == (1, 1)
        assert up(served_by) == [False, True]
        assert "no " in served_by.pool.servers[0].why


def test_a_version_that_cannot_be_written_is_an_error_for_which_the_loop_saves(link, old):
    with link(1) as (served_by, _):
        for label in ("1.0", "1.1"):
            served_by.sync._versions.path(label).mkdir(parents=True)  # somebody else's
        with pytest.raises(DependencyError, match=r"FileExistsError: .*v1.1 exists and is not of"):
            served_by.sync.push(old.params, 1)
        assert served_by.sync.push(old.params, 2)["sync/servers"] == (1, 1)


def test_a_hung_server_delays_no_push(old, new, tmp_path):
    with (
        stand_in.started(str(old.model.source.path), tmp_path, 2) as ((one, first), (two, _)),
        connected(old, [one, two], tmp_path) as served_by,
    ):
        served_by.sync.push(old.params, 1)
        first.send_signal(signal.SIGSTOP)
        for version in (2, 3):  # the watcher sees it in the first one
            assert served_by.sync.push(new.params, version)["sync/servers"] == (1, 1)
            assert "its health check" in served_by.pool.servers[0].why, "not the end of a call"
        first.send_signal(signal.SIGCONT)
        time.sleep(1)
        # It may have been paused by the push that did not wait for it, and then it waits for one.
        assert {c.weights_version for c in texts(served_by)} == {3}
        assert served_by.sync.push(old.params, 4)["sync/servers"] == (2, 1)


def test_a_request_to_stop_ends_a_push_at_once(link, old):
    with link(1) as (served_by, (server,)):
        server.faults = [{"path": "/collective_rpc", "do": "hang"}]
        threading.Timer(1.0, stopping.request, ["SIGTERM"]).start()
        try:  # a push that a call's time ends has another error
            with pytest.raises(stopping.StopRequestedError, match="SIGTERM"):
                served_by.sync.push(old.params, 1)
        finally:
            stopping.reset()


def test_versions_are_removed_before_the_next_one_is_written(link, old, new):
    """Also before a second try, so that there is room for one."""
    with link(1) as (served_by, (server,)):
        versions = served_by.sync._versions
        seen = []
        begin = versions.begin

        def noted(label, files):
            seen.append(sorted(path.name for path in versions.root.glob("v*")))
            begin(label, files)

        versions.begin = noted
        served_by.sync.push(old.params, 1)
        server.faults = [{"path": "/resume", "do": "status", "status": 500, "times": 1}]
        served_by.sync.push(new.params, 2)
        assert seen == [[], [], []]
        assert [path.name for path in versions.root.glob("v*")] == ["v2.1"]
        served_by.sync.close()
        assert not versions.root.exists()


@pytest.fixture(params=["in the thread", "at the end"])
def beside(request, old, monkeypatch):
    """Begins with weights that a push has checked; probes are compared as on one or more devices.

    Yields a function of a link that pushes, and then begins with a version.
    """
    count = 1 if request.param == "in the thread" else 8
    monkeypatch.setattr(jax, "device_count", lambda: count)

    def begin(link, ours, version):
        copy = jax.tree.map(lambda leaf: leaf + 0, ours.params)
        link.sync.begin(copy, version)
        jax.tree.map(lambda leaf: leaf.delete(), copy)  # as the next step does

    return begin


def from_version(link, version, count=2):
    """Completions of requests that must begin with these weights."""
    engine = dataclasses.replace(link.engine, at_least=version)
    return texts(link._replace(engine=engine), count)


def test_training_waits_for_the_copy_alone_and_tokens_have_the_label_of_what_wrote_them(
    link, old, new, beside
):
    sent, load = threading.Event(), threading.Event()
    with link(2) as (served_by, servers):
        served_by.sync.push(old.params, 1)
        versions = served_by.sync._versions
        write = versions.begin
        held = []

        def begin(label, files):
            held.append(time.monotonic())
            assert sent.wait(300)
            write(label, files)

        versions.begin = begin
        for server in servers:
            server.faults = [{"path": "/collective_rpc", "method": "load_version", "do": "hold",
                              "until": load}]  # fmt: skip
        before = sum(len(asked(server)) for server in servers)
        beside(served_by, new, 2)  # returns although nothing is written yet
        newer, older = [], []
        asks = [
            threading.Thread(target=lambda: newer.extend(from_version(served_by, 2))),
            threading.Thread(target=lambda: older.extend(texts(served_by, 2))),
        ]
        for ask in asks:
            ask.start()
        # What needs no new weights is sent at once, and nothing else.
        eventually(lambda: sum(len(asked(server)) for server in servers) == before + 4)
        assert not newer
        sent.set()
        eventually(lambda: all(loading(server) == 2 for server in servers))
        assert not newer
        released = time.monotonic()
        load.set()
        values = served_by.sync.finish()
        for ask in asks:
            ask.join(300)
        assert {c.weights_version for c in older} == {1}
        assert {c.weights_version for c in newer} == {2}
        assert values["sync/servers"] == (2, 1)
        assert values["sync/probe_diff"][0] < 1e-5
        assert values["sync/total_secs"][0] > released - held[0]
        for completion in newer:
            found = new.logprobs(completion.prompt_ids, np.asarray(completion.token_ids))
            np.testing.assert_allclose(completion.untruncated_logprobs, found, atol=0.01)
        assert served_by.sync.finish() == {}


def test_a_server_that_fails_beside_training_costs_that_server_alone(link, old, new, beside):
    with link(2) as (served_by, servers):
        served_by.sync.push(old.params, 1)
        servers[0].faults = [{"path": "/collective_rpc", "do": "status", "status": 500}]
        beside(served_by, new, 2)
        assert {c.weights_version for c in from_version(served_by, 2)} == {2}
        assert served_by.sync.finish()["sync/servers"] == (1, 1)
        assert up(served_by) == [False, True]
        servers[0].faults = []
        servers[1].faults = [{"path": "/resume", "do": "status", "status": 500, "times": 1}]
        beside(served_by, old, 3)
        assert served_by.sync.finish()["sync/servers"] == (2, 1), "the second try has the tensors"
        written = from_version(served_by, 3)
        assert {c.weights_version for c in written} == {3}
        found = old.logprobs(written[0].prompt_ids, np.asarray(written[0].token_ids))
        np.testing.assert_allclose(written[0].untruncated_logprobs, found, atol=0.01)


def test_a_server_that_computes_something_else_is_found_before_its_batch_is_trained(
    link, old, new, beside
):
    with link(1) as (served_by, (server,)):
        served_by.sync.push(old.params, 1)
        server.faults = [{"path": "/resume", "do": "noise", "size": 1.0}]
        beside(served_by, new, 2)
        for _ in range(2):  # an evaluation may have caught the first one
            with pytest.raises(DependencyError, match=r"step 2 .* are not the trainer's.*nats"):
                served_by.sync.finish()
        with pytest.raises(DependencyError, match="are not the trainer's"):
            served_by.sync.push(old.params, 3)


def test_what_waits_for_weights_that_never_come_is_an_error(link, old, new, beside):
    with link(2) as (served_by, servers):
        served_by.sync.push(old.params, 1)
        for server in servers:
            server.faults = [{"path": "/collective_rpc", "do": "status", "status": 500}]
        beside(served_by, new, 2)
        with pytest.raises(DependencyError, match="no teacher server is left"):
            from_version(served_by, 2)
        with pytest.raises(DependencyError, match="step 2 reached no teacher"):
            served_by.sync.finish()
        for server in servers:
            server.faults = []
        assert served_by.sync.push(new.params, 2)["sync/servers"] == (2, 1)


def test_the_end_of_a_run_gives_up_what_was_begun(link, old, new, beside):
    options = OPTIONS._replace(control_timeout_secs=600.0)
    with link(1, options=options) as (served_by, (server,)):
        served_by.sync.push(old.params, 1)
        server.faults = [{"path": "/collective_rpc", "do": "hang"}]
        beside(served_by, new, 2)
        root = served_by.sync._versions.root
        start = time.monotonic()
        served_by.sync.close()
        assert time.monotonic() - start < 300, "a call may take 600 s"
        assert not root.exists()


def main():
    """One of two processes that push together while things go wrong at process 0."""
    model, output, url, port, process = sys.argv[1:]
    address = Address(f"127.0.0.1:{port}", 2, int(process))
    hosts = HostsConfig(stall_timeout_secs=90)

    def push(version, fault):
        if distributed.is_main():
            http_faults.set_faults(url, [fault] if fault else [])
        distributed.barrier("the fault")
        try:
            link.sync.push(ours.params, version)
        except (DependencyError, stopping.StopRequestedError) as error:
            sys.stdout.write(f"step {version}: {type(error).__name__}: {error}\n")
            sys.stdout.flush()
        stopping.reset()

    with joined(hosts, address):
        ours = served.trainer(model, jax.devices())
        with connected(ours, [url], pathlib.Path(output)) as link:
            push(1, None)
            if distributed.is_main():
                threading.Timer(3.0, stopping.request, ["SIGTERM"]).start()
            push(2, {"path": "/collective_rpc", "do": "hang"})
            push(3, None)
            push(4, {"path": "/pause", "do": "exit"})
            distributed.barrier("both have gone on")


def test_two_processes_leave_a_push_together(old, tmp_path):
    model = str(old.model.source.path)
    code = "import tests.rollout.test_push as t; t.main()"
    with stand_in.started(model, tmp_path) as ((url, _),):
        port = str(processes.free_port())
        arguments = [sys.executable, "-c", code, model, str(tmp_path), url, port]
        environment = os.environ | {"XLA_FLAGS": processes.xla_flags(1)}
        commands = [{"args": [*arguments, str(i)], "env": environment} for i in range(2)]
        run = processes.finish(commands, tmp_path / "logs")
    for process in range(2):
        lines = [line for line in run.text(process).splitlines() if line.startswith("step ")]
        stopped, lost = lines
        assert stopped.startswith("step 2: StopRequestedError: ")
        assert "DependencyError: the weights of step 4 reached no teacher server" in lost
        assert url in lost
