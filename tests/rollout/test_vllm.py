"""What generation and weight pushes rely on, held against real vLLM servers."""

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest
import safetensors.numpy

from atlas_jax.recipes import chat_models, grpo
from atlas_jax.rollout import teaching
from atlas_jax.rollout.engine import ChatModel, Request
from atlas_jax.rollout.episodes import EpisodeOptions
from atlas_jax.rollout.identity import check_manifest
from atlas_jax.rollout.rows import collate_policy
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.servers import Look
from atlas_jax.rollout.vllm import payload
from atlas_jax.types import DependencyError
from tests import vllm_servers, words
from tests.conftest import VLLM_SIZES, VLLM_WORDS
from tests.rollout import served
from tests.rollout.scripts import protocol, questions
from tests.rollout.served import SAMPLING

GREEDY = Sampling(0.0)
REQUESTS = [
    Request((5, 6, 7), 12, seed=3, num_samples=3),
    Request((9, 4), 12, seed=4, num_samples=3),
]


@pytest.fixture(scope="module")
def old(vllm_server):
    """The model that the server was started with."""
    return served.trainer(vllm_server.root)


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    directory = tmp_path_factory.mktemp("new")
    return served.trainer(words.save(directory, VLLM_WORDS, seed=1, **VLLM_SIZES))


@pytest.fixture(scope="module")
def link(vllm_server, old, tmp_path_factory):
    with served.connected(old, [vllm_server.url], tmp_path_factory.mktemp("link")) as found:
        yield found


def long_requests(count, max_tokens):
    """Requests that run until they are cut."""
    return [Request((5, 6, 7 + i), max_tokens, seed=i) for i in range(count)]


def endless(engine):
    return dataclasses.replace(engine, stop_ids=())


def test_new_weights_write_what_the_trainer_writes_with_them(link, old, new):
    for version, ours in ((1, new), (2, old)):
        values = link.sync.push(ours.params, version)
        theirs = link.engine.generate(REQUESTS, GREEDY)
        expected = ours.generate(REQUESTS, GREEDY)
        for group, other in zip(theirs, expected, strict=True):
            for completion, wanted in zip(group, other, strict=True):
                assert completion.token_ids == wanted.token_ids
                assert completion.weights_version == version
                assert (completion.text, completion.finish_reason) == (
                    wanted.text, wanted.finish_reason,
                )  # fmt: skip
                np.testing.assert_allclose(
                    completion.untruncated_logprobs, wanted.untruncated_logprobs, atol=0.02
                )
        assert values["sync/probe_diff"][0] < 1e-4
        assert values["sync/servers"] == (1, 1)
    assert [g[0].token_ids for g in new.generate(REQUESTS, GREEDY)] != [
        g[0].token_ids for g in old.generate(REQUESTS, GREEDY)
    ], "two models that write the same show nothing"


def test_what_is_written_is_the_size_of_the_model(link, old):
    values = link.sync.push(old.params, 3)
    (version,) = link.sync._versions.root.glob("v*")
    tensors = safetensors.numpy.load_file(version / "model.safetensors")
    size = sum(tensor.nbytes for tensor in tensors.values())
    numbers = sum(p.numel() for p in _torch(old).parameters())
    assert values["sync/bytes"] == (size, 1)
    assert size == 2 * numbers


def _torch(ours):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(ours.model.source.path)


def test_log_probabilities_are_those_of_the_trainer_before_truncation(link, old):
    link.sync.push(old.params, 4)
    groups = link.engine.generate(REQUESTS, SAMPLING)
    rounded = [
        np.abs(old.logprobs(c.prompt_ids, np.asarray(c.token_ids)) - c.untruncated_logprobs).mean()
        for group in groups
        for c in group
    ]
    assert max(rounded) < 0.01  # the server's weights are in bfloat16
    assert len({c.token_ids for c in groups[0]}) > 1, "samples of a group differ"
    again = link.engine.generate(REQUESTS, SAMPLING)
    assert [[c.token_ids for c in g] for g in again] == [[c.token_ids for c in g] for g in groups]


async def converse(policy, question):
    """Two turns with a tool result between them; q1 fails after one and q2 hangs after one."""
    await policy.say(f"{question.text} plan", max_tokens=3)
    if question.text == "q1":
        raise KeyError("no such tool")
    if question.text == "q2":
        await asyncio.sleep(600)
    policy.facts["first"] = policy.finish_reason
    await policy.say("hint 4 7", role="tool", max_tokens=12)


@pytest.fixture(scope="module")
def talked(vllm_server, old, tmp_path_factory):
    """The samples of `converse`, and what the server was asked for them with its answers."""
    asked = []
    with served.connected(
        old, [vllm_server.url], tmp_path_factory.mktemp("talk"), dtype="float32"
    ) as link:
        link.sync.push(old.params, 21)
        # Six of the ten digits end a turn, so that some turns end by themselves and some are cut.
        engine = dataclasses.replace(link.engine, stop_ids=tuple(range(3, 9)))

        def generate(requests, sampling):
            written = engine.generate(requests, sampling)
            asked.extend(zip(requests, [c for (c,) in written], strict=True))
            return written

        encode_turn = chat_models.turn_encoder(old.model.template, "")
        policy = ChatModel(lambda text: (), generate, 512, engine.vocab_size, encode_turn)
        how = protocol(size=4, policy=80)
        how = how._replace(episode=EpisodeOptions(converse, 20.0, 8))
        draws = teaching.Draws(SAMPLING, 0)
        samples = teaching.run(questions(4), range(4), policy, None, how, draws)
    return samples, asked


def test_an_episode_is_the_tokens_of_the_server_with_the_results_of_tools_between(talked, old):
    samples, asked = talked
    tokenizer = old.model.files.tokenizer
    told = tuple(tokenizer("hint 4 7").input_ids)
    pairs = [
        (first, second)
        for one, first in asked
        for two, second in asked
        if two.prompt_ids == (*one.prompt_ids, *first.token_ids, *told)
    ]
    expected = [
        (
            first.prompt_ids,
            (*first.token_ids, *told, *second.token_ids),
            (*(True,) * first.num_tokens, *(False,) * 3, *(True,) * second.num_tokens),
            (*first.untruncated_logprobs, *(0.0,) * 3, *second.untruncated_logprobs),
        )
        for first, second in pairs
    ]
    assert len(told) == 3
    whole = [s for s in samples if s.question.text in ("q0", "q3")]
    assert len(whole) == 8
    for sample in whole:
        row = sample.completion
        assert row.prompt_ids == tuple(tokenizer(f"{sample.question.text} plan").input_ids)
        found = (row.prompt_ids, row.token_ids, row.sampled, row.untruncated_logprobs)
        assert found in expected
        assert row.weights_version == 21
        assert [m["role"] for m in sample.messages] == ["user", "assistant", "tool", "assistant"]
    assert {s.facts["first"] for s in whole} == {"stop", "length"}


def test_the_trainer_gives_the_turns_of_a_server_its_log_probabilities(talked, old):
    samples, _ = talked
    samples = [s._replace(trains=bool(s.completion.token_ids)) for s in samples]
    for per_row in (1, 4):
        batch = collate_policy(samples, per_row, 256)
        logprobs_fn = grpo.make_logprobs_fn(old.model.decoder, served.CONFIG, per_row)
        found = logprobs_fn(old.params, jax.tree.map(lambda x: x[None], batch))[0]
        trained = np.asarray(batch.loss_mask)
        assert trained.sum() == sum(s.completion.num_sampled for s in samples)
        assert np.abs(found - batch.rollout_logprobs)[trained].max() < 1e-4


def test_an_episode_that_fails_or_hangs_over_a_server_trains_nothing_and_says_why(talked):
    samples, _ = talked
    for text, reason in (("q1", "error: KeyError: 'no such tool'"), ("q2", "more than 20 s")):
        found = [s for s in samples if s.question.text == text]
        assert len(found) == 4
        for sample in found:
            assert reason in sample.completion.finish_reason
            assert sample.completion.is_failed
            assert not sample.completion.token_ids
            assert [m["role"] for m in sample.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("prompt", "reason"), [((5,) * 600, "maximum|longer|context"), ((5, 10**6), "vocabulary|range")]
)
def test_a_request_that_is_refused_trains_nothing_and_says_why(link, old, prompt, reason):
    link.sync.push(old.params, 5)
    requests = [Request(prompt, 8, seed=0), REQUESTS[0]]
    (refused,), fine = link.engine.generate(requests, SAMPLING)
    assert refused.finish_reason.startswith("error: refused: ")
    assert any(word in refused.finish_reason.lower() for word in reason.split("|"))
    assert not refused.token_ids
    assert all(c.token_ids for c in fine)


def test_a_directory_without_a_tensor_is_refused_which_vllm_would_take(
    link, old, tmp_path, vllm_server
):
    link.sync.push(old.params, 6)
    (version,) = link.sync._versions.root.glob("v*")
    shutil.copytree(version, tmp_path / "partial")
    file = tmp_path / "partial" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    check_manifest(version, link.sync._shapes, "bfloat16")
    with pytest.raises(ValueError, match=r"missing model\.layers\.0\.self_attn\.q_proj\.weight"):
        check_manifest(tmp_path / "partial", link.sync._shapes, "bfloat16")
    with pytest.raises(ValueError, match=r"does not fit the servers.*bfloat16"):
        check_manifest(version, link.sync._shapes, "float32")
    how = {"method": "load_version", "kwargs": {"weights_path": str(tmp_path / "partial")}}
    assert vllm_server.post("/collective_rpc", how) == {"results": [None]}
    link.sync.push(old.params, 7)


def test_a_server_recovers_from_a_path_that_does_not_exist(link, old, vllm_server):
    vllm_server.post("/pause?mode=keep")
    how = {"method": "load_version", "kwargs": {"weights_path": "/nowhere/at/all"}}
    with pytest.raises(urllib.error.HTTPError, match="500"):
        vllm_server.post("/collective_rpc", how)
    link.sync.push(old.params, 8)
    assert link.engine.generate(REQUESTS[:1], GREEDY)[0][0].weights_version == 8


def total(url, counter):
    """Returns a counter of a server, such as the tokens that it has sampled so far."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as reply:
        found = re.findall(rf"^vllm:{counter}_total{{.*}} (.*)$", reply.read().decode(), re.M)
    assert found, f"vLLM does not count {counter}"
    return sum(map(float, found))


def order(url, what):
    """Pauses or resumes a server, however long it takes."""
    urllib.request.urlopen(urllib.request.Request(f"{url}/{what}", b""), timeout=60).close()


def half_way(link, requests, answers):
    """Asks requests and pauses the server; returns the thread that adds their answers.

    On a machine that stalls they may end before the pause; then they are asked again.
    """
    server = link.pool.servers[0]
    bodies = [payload(request, 0, SAMPLING, ()) for request in requests]

    async def ask():
        return await asyncio.gather(*(link.pool.ask(body, server) for body in bodies))

    for _ in range(20):
        answers.clear()
        tokens = total(server.url, "generation_tokens")
        ended = total(server.url, "request_success")
        thread = threading.Thread(target=lambda: answers.extend(link.pool.run(ask())))
        thread.start()
        while total(server.url, "generation_tokens") < tokens + 20:
            time.sleep(0.01)
        order(server.url, "pause?mode=keep&clear_cache=false")
        if total(server.url, "request_success") == ended:
            return thread
        order(server.url, "resume")
        thread.join()
    raise AssertionError("all tries ended before the pause")


@contextlib.contextmanager
def in_flight(link):
    """Yields completions that are frozen half-way, all of them.

    They are the requests, their answers once they are there, and how many are in flight each time
    that a server has answered the probe.
    """
    server = link.pool.servers[0]
    requests, answers = long_requests(16, 480), []
    thread = half_way(link, requests, answers)
    counts, probe = [], link.sync._probe

    def score(*args):
        counts.append(len(server.tasks))
        return probe.logprobs(*args)

    link.sync._probe = probe._replace(logprobs=score)
    try:
        yield requests, answers, counts
    finally:
        link.sync._probe = probe
        order(server.url, "resume")  # a push that failed has left it paused
        thread.join()


def test_no_token_is_attributed_to_weights_that_did_not_write_it(link, old, new):
    """Weights change under completions in flight, which go on with the new ones."""
    link.sync.push(old.params, 9)
    server = link.pool.servers[0]
    with in_flight(link) as (requests, answers, _):
        link.sync.push(new.params, 10)
    changed = 0
    for request, answer in zip(requests, answers, strict=True):
        (choice,) = answer.reply["choices"]
        spans = [(server.versions[s["version"]], s) for s in choice["weight_versions"]]
        found = np.asarray([entry["logprob"] for entry in choice["logprobs"]["content"]])
        ids = np.asarray(choice["token_ids"])
        difference = np.abs(old.logprobs(request.prompt_ids, ids) - found)
        for version, span in spans:
            by = difference[span["start"] : span["end"]]
            assert version in (9, 10)
            assert version == 10 or by.mean() < 0.01
            changed += version == 10 and span["start"] > 0 and by.mean() > 0.05
        completion = endless(link.engine).read(request, answer.reply, server.versions)
        assert completion.weights_version == min(version for version, _ in spans)
        by_token = [v for v, span in spans for _ in range(span["start"], span["end"])]
        assert completion.token_versions == tuple(by_token)
        assert answer.version == 9
    assert changed, "nothing was in flight when the weights changed"
    link.sync.push(old.params, 11)


def test_cached_keys_and_values_of_older_weights_are_not_read_under_a_newer_label(link, old, new):
    """A prompt of several blocks is asked before and after a push, with completions in flight."""
    link.sync.push(old.params, 13)
    request = Request(served.PROMPT, 8, seed=5)
    engine = endless(link.engine)
    ((before,),) = engine.generate([request], SAMPLING)
    with in_flight(link):
        values = link.sync.push(new.params, 14)
        assert values["sync/uncleared_caches"] == (1, 1), "nothing in flight held on to them"
        ((after,),) = engine.generate([request], SAMPLING)
    for completion, ours, version in ((before, old, 13), (after, new, 14)):
        assert completion.weights_version == version
        expected = ours.logprobs(completion.prompt_ids, np.asarray(completion.token_ids))
        assert np.abs(expected - completion.untruncated_logprobs).mean() < 0.01
    link.sync.push(old.params, 15)


def test_what_must_not_be_trained_on_comes_back_as_an_error(link, old):
    """Replies as vLLM sends them, each with one thing wrong."""
    link.sync.push(old.params, 12)
    server, request = link.pool.servers[0], Request((5, 6), 4, seed=0)
    body = payload(request, 0, SAMPLING, ())
    reply = link.pool.run(link.pool.ask(body, server)).reply
    engine = endless(link.engine)
    assert engine.read(request, reply, server.versions).finish_reason == "length"
    label = {"version": reply["choices"][0]["weight_versions"][0]["version"]}
    for change, reason in (
        ({"finish_reason": "abort"}, "'abort'"),
        ({"finish_reason": "error"}, "'error'"),
        ({"finish_reason": "stop"}, "with last token"),
        ({"token_ids": [1, 2, 3]}, "token ids"),
        ({"weight_versions": [{"version": "0.0", "start": 0, "end": 4}]}, r"\['0.0'\].*probe"),
        ({"weight_versions": [label | {"start": 0, "end": 3}]}, "do not cover"),
        ({"weight_versions": []}, "do not cover"),
        ({"logprobs": None}, "not a completion"),
    ):
        wrong = json.loads(json.dumps(reply))
        wrong["choices"][0] |= change
        pattern = engine.read(request, wrong, server.versions).finish_reason
        assert pattern.startswith("error: ")
        assert re.search(reason, pattern), pattern
    for value in (-9999.0, float("nan"), 0.5):
        wrong = json.loads(json.dumps(reply))
        wrong["choices"][0]["logprobs"]["content"][1]["logprob"] = value
        assert "impossible" in engine.read(request, wrong, server.versions).finish_reason


def test_a_server_of_another_model_is_refused(vllm_server, tmp_path):
    other = served.trainer(
        words.save(tmp_path, VLLM_WORDS, **(VLLM_SIZES | {"intermediate_size": 96}))
    )
    with (
        pytest.raises(ValueError, match=r"started with.*of another shape.*start it with the same"),
        served.connected(other, [vllm_server.url], tmp_path),
    ):
        pass


def test_an_address_where_nothing_listens_is_an_error(old, tmp_path):
    url = f"http://127.0.0.1:{vllm_servers.free_port()}"
    with (
        pytest.raises(ValueError, match=r"cannot use the teacher server.*Start it"),
        served.connected(old, [url], tmp_path),
    ):
        pass


@pytest.mark.long
def test_of_two_servers_one_may_lag_and_die_and_the_last_one_ends_the_run(old, new, tmp_path):
    """One story, since each chapter leaves a server less.

    One lags, is killed with requests to answer, and the other is killed while it takes weights.
    """
    root = str(old.model.source.path)
    with (
        vllm_servers.running([root, root], tmp_path) as (first, second),
        served.connected(old, [first.url, second.url], tmp_path, "wait") as link,
    ):
        link.sync.push(old.params, 1)
        one, two = link.pool.servers
        groups = link.engine.generate(REQUESTS, SAMPLING)
        assert {c.weights_version for group in groups for c in group} == {1}

        second.post("/update_weight_version", {"new_version": "old"})
        link.pool.call(lambda: link.pool.drop(two, "test"))
        link.engine.generate(REQUESTS, SAMPLING)
        assert (one.up, two.up) == (True, False), "it lags, so it does not come back"
        values = link.sync.push(new.params, 2)
        assert (one.up, two.up) == (True, True)
        assert values["sync/servers"] == (2, 1)

        written = []
        second.freeze()  # else it might be done before it is killed
        ask = threading.Thread(
            target=lambda: written.extend(
                endless(link.engine).generate(long_requests(6, 100), SAMPLING)
            )
        )
        ask.start()
        while not two.tasks:
            time.sleep(0.01)
        second.kill()
        ask.join()
        assert [len(c.token_ids) for (c,) in written] == [100] * 6
        assert {c.weights_version for (c,) in written} == {2}
        assert (one.up, two.up) == (True, False)

        ask = threading.Thread(target=_give_up, args=(link,))
        ask.start()
        while not one.tasks:
            time.sleep(0.01)
        kill = threading.Thread(target=_kill_at, args=(first, tmp_path / "weights" / "v3.0"))
        kill.start()
        with pytest.raises(DependencyError, match=f"step 3 reached no teacher.*{first.url}"):
            link.sync.push(old.params, 3)
        ask.join()
        kill.join()


@pytest.mark.long
def test_a_server_that_crashes_is_started_again_and_writes_with_the_current_weights(
    old, new, tmp_path
):
    look = Look(every_secs=0.5, timeout_secs=30.0, misses=2)
    with (
        vllm_servers.running([old.model.source.path], tmp_path, "--restarts", "1") as (server,),
        served.connected(
            old, [server.url], tmp_path, options=served.OPTIONS._replace(look=look)
        ) as link,
    ):
        link.sync.push(new.params, 1)
        expected = link.engine.generate(REQUESTS, SAMPLING)
        server.crash()
        (own,) = link.pool.servers
        for state in (False, True):
            end = time.monotonic() + vllm_servers.START_SECS
            while own.up is not state:
                assert time.monotonic() < end, own.why
                time.sleep(0.1)
        assert server.process.poll() is None
        written = link.engine.generate(REQUESTS, SAMPLING)
        assert {c.weights_version for group in written for c in group} == {1}
        assert [[c.token_ids for c in group] for group in written] == [
            [c.token_ids for c in group] for group in expected
        ]


def frozen_completions_delay_no_probe(link, old, new):
    """Of a server that works on two completions at one time, when sixteen have been asked for."""
    link.sync.push(old.params, 1)  # compiles what the trainer computes, too
    (server,) = link.pool.servers
    with in_flight(link) as (requests, answers, counts):
        values = link.sync.push(new.params, 2)
    assert counts[0] > 2, "the probe came behind those that wait"
    assert values["sync/uncleared_caches"] == (0, 1)
    spans = 0
    for request, answer in zip(requests, answers, strict=True):
        (choice,) = answer.reply["choices"]
        found = np.asarray([entry["logprob"] for entry in choice["logprobs"]["content"]])
        difference = np.abs(
            new.logprobs(request.prompt_ids, np.asarray(choice["token_ids"])) - found
        )
        (*_, last) = choice["weight_versions"]
        assert server.versions[last["version"]] == 2
        assert difference[last["start"] :].mean() < 0.01, "keys and values were not recomputed"
        spans += len(choice["weight_versions"])
    assert spans > len(answers), "none was frozen half-way"


@pytest.mark.long
def test_frozen_completions_delay_no_probe_and_each_worker_is_checked(
    old, new, tmp_path, monkeypatch
):
    temporary = tempfile.mkdtemp()  # a longer path has no room for the name of a socket
    monkeypatch.setenv("TMPDIR", temporary)
    shared = set(pathlib.Path("/dev/shm").glob("vllm_dist_*"))
    flags = ("--max-num-seqs", "2", "--tensor-parallel-size", "2")
    with (
        vllm_servers.running([str(old.model.source.path)], tmp_path, *flags) as (server,),
        served.connected(old, [server.url], tmp_path) as link,
    ):
        frozen_completions_delay_no_probe(link, old, new)
        (checksums,) = link.sync._served.values()
        assert {name.partition(":")[0] for name in checksums} == {"0", "1"}
        assert set(pathlib.Path("/dev/shm").glob("vllm_dist_*")) > shared
    assert set(pathlib.Path("/dev/shm").glob("vllm_dist_*")) <= shared
    pathlib.Path(temporary).rmdir()  # it is empty


@pytest.mark.long
def test_a_server_that_follows_is_started_again_with_each_version(old, new, tmp_path):
    """As servers do that cannot reload in place."""
    latest = tmp_path / "weights" / "latest"
    root = str(old.model.source.path)
    with (
        vllm_servers.running([root], tmp_path, "--follow", str(latest)) as (server,),
        served.connected(old, [server.url], tmp_path, restart=True) as link,
    ):
        link.sync.push(new.params, 1)
        found = link.engine.generate(REQUESTS, GREEDY)
        assert found[0][0].weights_version == 1
        assert server.process.poll() is None
        expected = new.generate(REQUESTS, GREEDY)
        assert [c.token_ids for g in found for c in g] == [c.token_ids for g in expected for c in g]


def _give_up(link):
    with pytest.raises(DependencyError, match="no teacher server is left"):
        endless(link.engine).generate(long_requests(20, 240), SAMPLING)


def _kill_at(server, written):
    """Kills a server when a version is written, while it waits for what is in flight to end."""
    while not written.exists():
        time.sleep(0.001)
    server.kill()
