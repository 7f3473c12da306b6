"""Generation equals transformers', token for token, and the trainer's own log-probabilities."""

import dataclasses
import functools
import os
import re
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from atlas_jax import logprobs, stopping
from atlas_jax.checkpoint import gguf
from atlas_jax.config import MeshConfig
from atlas_jax.models import cache as kv
from atlas_jax.models.config import from_hf
from atlas_jax.policy_logprobs import policy_logprobs
from atlas_jax.rollout import local
from atlas_jax.rollout.admission import Piece, RowState
from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.local import LocalEngine
from atlas_jax.rollout.rows import collate_policy
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.types import PolicyBatch, Question, Sample
from tests import processes, tiny
from tests.assets import smollm2_gguf
from tests.tokenizers import chatml_tokenizer

MESHES = {
    "one": (MeshConfig(), jax.devices()[:1]),
    "eight": (MeshConfig(), None),
    "2x2x2": (MeshConfig(data=2, fsdp=2, tensor=2), None),
}
GREEDY = Sampling(0.0)
LENGTHS = (3, 21, 34, 9, 13)  # of prompts, most longer than the windows of 6 and 7


def prompts(lengths=LENGTHS, vocab=400, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(3, vocab, size).tolist()) for size in lengths]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Returns a function of family and mesh: a tiny model's engine and its parameters."""
    tokenizer = chatml_tokenizer()

    @functools.cache
    def load(family, mesh="one"):
        path = tiny.save(family, tmp_path_factory.mktemp(family))
        decoder, params = tiny.load(path, *MESHES[mesh])
        return LocalEngine(decoder, tokenizer, ()), params

    return load


@pytest.fixture
def engine_of(loaded):
    """The same, compiled in half the time: tiny models need no optimized code and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    jax.config.update("jax_disable_most_optimizations", True)
    yield loaded
    jax.config.update("jax_disable_most_optimizations", False)
    torch.set_num_threads(threads)


@pytest.fixture(params=["one", "2x2x2"])
def qwen(engine_of, request):
    return engine_of("qwen3", request.param)


@functools.cache
def continued(model, prompt, count):
    """Returns what transformers writes behind a prompt, greedily and without stopping."""
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        whole = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return tuple(whole[0, len(prompt) :].tolist())


def model_logprobs(model, completion, temperature=1.0):
    """Returns the log-probability of each sampled token by transformers' forward pass."""
    tokens = torch.tensor([completion.prompt_ids + completion.token_ids])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(completion.prompt_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, tokens[0, len(completion.prompt_ids) :, None])[:, 0]


@pytest.mark.parametrize(
    ("family", "mesh"),
    [(family, "one") for family in tiny.FAMILIES]
    + [
        (family, "2x2x2")
        for family in ("llama_bias", "mistral_window", "qwen3", "gemma3", *tiny.ADDED)
    ],
)
def test_greedy_text_equals_transformers(engine_of, family, mesh):
    engine, params = engine_of(family, mesh)
    model = tiny.hf_model(family)
    found = engine.generate(params, 3, [Request(p, 20, 0) for p in prompts()], GREEDY)
    for prompt, (completion,) in zip(prompts(), found, strict=True):
        assert completion.token_ids == continued(model, prompt, 20)
        assert completion.prompt_ids == prompt
        assert completion.finish_reason == "length"
        assert completion.weights_version == 3
        assert completion.logprobs == (0.0,) * 20
        expected = model_logprobs(model, completion)
        np.testing.assert_allclose(completion.untruncated_logprobs, expected, atol=1e-4)
    assert len({t for (c,) in found for t in c.token_ids}) > 5


def test_a_text_of_many_chunks_equals_transformers(engine_of):
    engine, params = engine_of("gemma3")
    wanted = [100, 3, 70, 33, 32]  # around the chunks of 32 and caches of 32, 64 and 128
    requests = [Request(p, n, 0) for p, n in zip(prompts(), wanted, strict=True)]
    found = engine.generate(params, 0, requests, GREEDY)
    for prompt, count, (completion,) in zip(prompts(), wanted, found, strict=True):
        assert completion.token_ids == continued(tiny.hf_model("gemma3"), prompt, count)


@pytest.mark.long
def test_smollm2_greedy_text_equals_transformers():
    path = smollm2_gguf()
    source, tokenizer = gguf.GGUFSource(str(path)), gguf.load_tokenizer(str(path))
    decoder, params = tiny.decoder_and_params(from_hf(source.config), source, *MESHES["one"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    text = (
        "A boat carries 9 cars. How many cars do 5 boats carry? Ben is 20 years old, and in 8 "
        "years he will be as old as his sister is now. There are 8 stamps on a table."
    )
    ids = tokenizer(text).input_ids
    asked = [tuple(ids[i : 2 * i + 2]) for i in range(20)]
    engine = LocalEngine(decoder, tokenizer, ())
    found = engine.generate(params, 0, [Request(x, 12, 0) for x in asked], GREEDY)
    # All prompts at once, padded on the left; the mask gives transformers their positions.
    longest = max(map(len, asked))
    padded = torch.tensor([(0,) * (longest - len(x)) + x for x in asked])
    mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in asked])
    model.generation_config.eos_token_id = None
    whole = model.generate(
        padded, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    for expected, (completion,) in zip(whole[:, longest:].tolist(), found, strict=True):
        assert completion.token_ids == tuple(expected)
        assert completion.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_any_stop_token_ends_a_text(engine_of):
    engine, params = engine_of("llama2")
    requests = [Request(p, 20, 0) for p in prompts()]
    whole = [c.token_ids for (c,) in engine.generate(params, 0, requests, GREEDY)]
    stops = (whole[0][6], whole[1][2], whole[2][0])
    engine = dataclasses.replace(engine, stop_ids=stops)
    reasons = []
    for tokens, (found,) in zip(whole, engine.generate(params, 0, requests, GREEDY), strict=True):
        ends = [i for i, token in enumerate(tokens) if token in stops]
        kept = tokens[: ends[0] + 1] if ends else tokens
        assert found.token_ids == kept
        assert found.finish_reason == ("stop" if ends else "length")
        assert len(found.logprobs) == len(found.untruncated_logprobs) == len(kept)
        shown = kept[:-1] if ends else kept
        assert found.text == engine.tokenizer.decode(shown, skip_special_tokens=True)
        reasons.append(found.finish_reason)
    assert set(reasons) == {"stop", "length"}
    assert reasons[:3] == ["stop"] * 3


def test_a_stop_token_as_the_last_possible_one_is_a_stop(engine_of):
    engine, params = engine_of("llama2")
    (whole,) = engine.generate(params, 0, [Request(prompts()[0], 20, 0)], GREEDY)[0]
    first = whole.token_ids.index(whole.token_ids[5])
    engine = dataclasses.replace(engine, stop_ids=(whole.token_ids[5],))
    request = Request(prompts()[0], first + 1, 0)
    (found,) = engine.generate(params, 0, [request], GREEDY)[0]
    assert found.token_ids == whole.token_ids[: first + 1]
    assert found.finish_reason == "stop"


def trainer_logprobs(engine, params, groups, per_row, temperature):
    """Returns what the trainer finds for the tokens of each completion, in order."""
    question = Question("q", "?", "", {})
    samples = [Sample(question, c, trains=True) for group in groups for c in group]
    batch = collate_policy(samples, per_row, 256)
    decoder = engine.decoder
    head = logprobs.Head(decoder.sharding, 64, temperature)

    def run(params):
        shared = batch.sequence_ids if per_row > 1 else None
        hidden = decoder.hidden(params, batch.tokens, batch.positions, batch.segment_ids, shared)
        table = decoder.output_table(params)
        return policy_logprobs(hidden, table, batch, head)[0]

    batch = PolicyBatch(*(None if x is None else jnp.asarray(x) for x in batch))
    found, sequence_ids = np.asarray(jax.jit(run)(params)), np.asarray(batch.sequence_ids)
    return [
        found[row, sequence_ids[row] == number]
        for row in range(len(found))
        for number in range(1, per_row + 1)
    ]


@pytest.mark.parametrize(
    ("family", "mesh", "per_row", "sampling"),
    [
        ("qwen3", "one", 3, Sampling(1.3)),
        ("qwen3", "2x2x2", 3, Sampling(0.7, 0.9)),
        ("gemma3", "one", 1, Sampling(0.7, 0.9)),
    ],
)
def test_sampled_logprobs_equal_the_trainers(engine_of, family, mesh, per_row, sampling):
    engine, params = engine_of(family, mesh)
    asked = prompts(LENGTHS[:4])
    requests = [Request(p, n, 5 + n, 3) for p, n in zip(asked, (40, 9, 33, 20), strict=True)]
    groups = engine.generate(params, 0, requests, sampling)
    parts = trainer_logprobs(engine, params, groups, per_row, sampling.temperature)
    completions = [c for group in groups for c in group]
    assert len({c.token_ids for c in completions}) == len(completions)
    for completion, expected in zip(completions, parts, strict=True):
        found = completion.untruncated_logprobs
        np.testing.assert_allclose(found, expected, atol=1e-4)
        model = model_logprobs(tiny.hf_model(family), completion, sampling.temperature)
        np.testing.assert_allclose(found, model, atol=1e-4)
        more = np.subtract(completion.logprobs, found)
        assert np.all(more >= 0)
        assert np.all(more <= -np.log(sampling.top_p) + 1e-5)


SAMPLING = Sampling(0.9, 0.95)


def sampled(engine, params, requests):
    groups = engine.generate(params, 0, requests, SAMPLING)
    assert [len(g) for g in groups] == [r.num_samples for r in requests]
    return [[c.token_ids for c in group] for group in groups]


def test_a_row_is_the_same_in_any_company(qwen):
    """Rows of other lengths, which the grid drops as they finish, and waiting ones."""
    engine, params = qwen
    limits = (5, 40, 1, 36, 34)  # so that the grid halves after 33 tokens
    requests = [Request(p, n, n, 4) for p, n in zip(prompts(), limits, strict=True)]
    together = sampled(engine, params, requests)
    assert [[len(t) for t in group] for group in together] == [[n] * 4 for n in limits]
    assert sampled(engine, params, requests[::-1])[::-1] == together
    assert [sampled(engine, params, [r])[0] for r in requests[:2]] == together[:2]
    few = dataclasses.replace(engine, max_rows=8)
    assert sampled(few, params, requests) == together


def test_a_row_is_the_same_after_its_grid_has_shrunk(qwen, caplog):
    engine, params = qwen
    engine = dataclasses.replace(engine, max_rows=256)
    # Of four prompts in turn, which a device of either mesh has, one goes on after a chunk.
    requests = [
        Request(p, 40 if i % 4 == 1 else 5, i, 8)
        for i, p in enumerate(prompts((*LENGTHS * 6, 7, 21)))
    ]
    kv._taken.clear_cache()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        together = sampled(engine, params, requests)
    assert "Finished XLA compilation of jit(_taken)" in caplog.text  # rows were dropped
    caplog.clear()
    kv._taken.clear_cache()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        alone = [sampled(engine, params, [r])[0] for r in requests[1::4]]
    assert "jit(_taken)" not in caplog.text
    assert together[1::4] == alone
    assert [len(row) for row in together[1]] == [40] * 8


def test_a_row_is_the_same_when_it_takes_a_free_place(qwen, monkeypatch):
    """Rows begin beside others of any age; the cache, a ring, goes round and grows meanwhile."""
    engine, params = qwen
    limits = (5, 150, 1, 36, 34, 60, 3, 9, 140, 2, 20, 7, 8, 33, 90, 4, 11, 13, 6, 25)
    sizes = [*LENGTHS * 4]
    requests = [Request(p, n, n, 2) for p, n in zip(prompts(sizes), limits, strict=True)]
    admitted = []
    admit = local.admit
    monkeypatch.setattr(local, "admit", lambda *a: admitted.append(int(a[-1].time)) or admit(*a))
    few = sampled(dataclasses.replace(engine, max_rows=16), params, requests)
    assert len(set(admitted)) > 2  # at several times, none of them the first
    assert [[len(t) for t in group] for group in few] == [[n] * 2 for n in limits]
    admitted.clear()
    assert sampled(engine, params, requests) == few
    assert not admitted  # where none waits


def test_prompts_of_one_row_wait_for_places_of_a_cpu_and_its_grid_shrinks_at_once(
    engine_of, monkeypatch
):
    engine, params = engine_of("qwen3")
    limits = np.clip(np.random.default_rng(0).lognormal(np.log(20), 0.8, 40), 2, 90).astype(int)
    requests = [
        Request(p, int(n), i) for i, (p, n) in enumerate(zip(prompts(limits), limits, strict=True))
    ]
    grids = []
    decode = local.decode

    def noted(*args):
        grids.append((len(args[4].alive), int(args[4].alive.sum())))
        return decode(*args)

    monkeypatch.setattr(local, "decode", noted)
    few = sampled(engine, params, requests)
    assert [len(tokens) for (tokens,) in few] == limits.tolist()
    assert {rows for rows, _ in grids} == {32, 16, 8}
    # As soon as they fit.
    assert [next(alive for rows, alive in grids if rows == size) for size in (16, 8)] == [16, 8]
    grids.clear()
    monkeypatch.setattr(local, "_ROWS_ON_CPU", 256)
    assert sampled(engine, params, requests) == few
    assert grids[0] == (48, 40)


def test_a_row_goes_on_when_stopped_rows_beside_it_are_dropped(engine_of):
    engine, params = engine_of("qwen3")
    requests = [Request(p, 40, i, 8) for i, p in enumerate(prompts(LENGTHS[:2]))]
    whole = sampled(engine, params, requests)
    staying = {(0, 2), (1, 5)}
    never = {token for i, k in staying for token in whole[i][k]}
    begun = {t for group in whole for tokens in group for t in tokens[:25]}
    stops = tuple(begun - never)
    found = sampled(dataclasses.replace(engine, stop_ids=stops), params, requests)
    for i, k in np.ndindex(2, 8):
        ends = [at + 1 for at, token in enumerate(whole[i][k]) if token in stops]
        assert found[i][k] == whole[i][k][: ends[0] if ends else 40]
        assert (len(found[i][k]) == 40) == ((i, k) in staying)


def test_a_short_limit_gives_the_beginning_of_a_longer_text(engine_of):
    engine, params = engine_of("qwen3")
    prompt = prompts()[1]
    (long,) = sampled(engine, params, [Request(prompt, 40, 4, 3)])
    (short,) = sampled(engine, params, [Request(prompt, 7, 4, 3)])
    assert short == [tokens[:7] for tokens in long]


def test_seeds_and_samples_differ(qwen):
    engine, params = qwen
    requests = [Request(prompts()[0], 12, seed, 4) for seed in (0, 1, 2, 2**32 - 1)]
    texts = [tokens for group in sampled(engine, params, requests) for tokens in group]
    assert len(set(texts)) == 16


@pytest.fixture
def stop():
    """Asks the process to stop, as a signal would, and takes it back in the end."""
    yield lambda: stopping.request("SIGTERM")
    stopping.reset()


def test_a_request_to_stop_ends_generation_within_a_chunk(engine_of, stop):
    engine, params = engine_of("llama2")
    requests = [Request(p, 220, i, 4) for i, p in enumerate(prompts(LENGTHS[:2]))]
    local.decode.clear_cache()  # so that the timer comes before the end
    timer = threading.Timer(0.2, stop)
    timer.start()
    with pytest.raises(stopping.StopRequestedError, match="SIGTERM"):
        engine.generate(params, 0, requests, SAMPLING)
    stopping.reset()
    assert all(len(t) == 220 for group in sampled(engine, params, requests) for t in group)


_PROCESS = """
import sys
from atlas_jax import distributed, stopping
from atlas_jax.config import HostsConfig
from atlas_jax.hosts import joined
from atlas_jax.types import Address
from atlas_jax.rollout.admission import Piece, RowState
from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.local import LocalEngine
from atlas_jax.rollout.sampling import Sampling
from tests import tiny
from tests.tokenizers import chatml_tokenizer

class Tokenizer:  # of process 1, which is asked to stop when its first short text is done
    def decode(self, ids, **_):
        stopping.request("SIGTERM")
        return ""

with joined(HostsConfig(), Address()):
    main = distributed.is_main()
    decoder, params = tiny.load(sys.argv[1])
    engine = LocalEngine(decoder, chatml_tokenizer() if main else Tokenizer(), ())
    short, long = [Request((5, 6, 7), 3, 0)], [Request((5, 6, 7), 200, 0)]
    engine.generate(params, 0, short, Sampling(0.0))
    try:
        engine.generate(params, 0, long if main else [], Sampling(0.0))
    except stopping.StopRequestedError as error:
        print("stopped by", error)
    print(distributed.gather(distributed.np.asarray(7)).tolist())  # they are still in step
"""


def test_processes_leave_generation_together_when_one_is_to_stop(tmp_path):
    path = tiny.save("llama2", tmp_path / "model")
    port = processes.free_port()
    asked = []
    for process in range(2):
        environment = os.environ | {
            "XLA_FLAGS": processes.xla_flags(2), "ATLAS_COORDINATOR": f"127.0.0.1:{port}",
            "ATLAS_NUM_PROCESSES": "2", "ATLAS_PROCESS_ID": str(process),
        }  # fmt: skip
        asked.append({"args": [sys.executable, "-c", _PROCESS, path], "env": environment})
    run = processes.finish(asked, tmp_path / "logs")
    # Process 0 reads it from process 1's answer or, if that is sooner, from its note to the watch.
    assert re.search(r"stopped by (a request to another process|SIGTERM)\n\[7, 7]", run.text(0))
    assert "stopped by SIGTERM\n[7, 7]" in run.text(1)


@pytest.mark.parametrize(("mesh", "sampling"), [("eight", GREEDY), ("2x2x2", SAMPLING)])
def test_a_grid_lies_on_its_devices_from_the_start(engine_of, mesh, sampling, caplog):
    """The rows' own cache is split as the prompts' is, and a shape is compiled once."""
    engine, params = engine_of("qwen3", mesh)
    sharding = engine.decoder.sharding
    requests = [Request(p, 97, i, 4) for i, p in enumerate(prompts((5,) * 8))]
    static = engine.decoder, (), sampling
    groups = [Piece(r, [RowState(97, i) for i in range(4)]) for r in requests]
    pieces = local._pieces(groups, 4, sharding)
    inputs = local._prompts(pieces, sharding), local._rows(pieces, sharding)
    weights = kv.weights(engine.decoder, params)
    grid, chunk = local.start(*static, local.Room(64, 128), params, weights, *inputs)
    heads, share = (1, 2) if mesh == "2x2x2" else (2, 1)  # of a device: of 2 heads, of 8 prompts
    for kept in jax.tree.leaves(grid.cache.own):
        assert kept.shape == (8 * 4, 2, 128, 32)
        assert kept.sharding.shard_shape(kept.shape) == (share * 4, heads, 128, 32)
    for kept in jax.tree.leaves(grid.cache.prompt):
        assert kept.sharding.shard_shape(kept.shape) == (share, heads, 64, 32)
    for array in chunk:  # also the log-probabilities of greedy choices, which are a constant
        assert array.sharding.shard_shape(array.shape) == (share, 4, 1)
    local.decode.clear_cache()
    kv._taken.clear_cache()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        engine.generate(params, 0, requests, sampling)
    assert caplog.text.count("Finished XLA compilation of jit(decode)") == 1
    caplog.clear()
    few = [r._replace(max_tokens=20 + 60 * (i == 0)) for i, r in enumerate(requests * 16)]
    with jax.log_compiles(), caplog.at_level("WARNING"):
        dataclasses.replace(engine, max_rows=512).generate(params, 0, few, sampling)
    assert "Finished XLA compilation of jit(_taken)" in caplog.text  # rows were dropped
    assert caplog.text.count("Finished XLA compilation of jit(decode)") == 2


@pytest.mark.parametrize("mesh", ["eight", "2x2x2"])
def test_rows_spread_over_devices_are_those_of_one_device(engine_of, mesh):
    requests = [Request(p, 150, i, 6) for i, p in enumerate(prompts(LENGTHS[:2]))]
    engine, params = engine_of("qwen3", mesh)
    groups = [Piece(r, [RowState(150, i) for i in range(6)]) for r in requests]
    pieces = local._pieces(groups, 6, engine.decoder.sharding)
    parts, width = (8, 2) if mesh == "eight" else (4, 3)  # of 2 groups of 6, no device without
    assert [len(piece.rows) for piece in pieces] == [width] * parts
    assert all(piece.unfinished for piece in pieces[: 2 * -(-6 // width)])
    assert sampled(engine, params, requests) == sampled(*engine_of("qwen3"), requests)


def test_a_grown_cache_holds_what_the_old_one_held_and_replaces_it(engine_of):
    engine, params = engine_of("qwen3", "2x2x2")
    decoder = engine.decoder
    requests = [Request(p, 300, i, 2) for i, p in enumerate(prompts())]
    groups = [Piece(r, [RowState(300, i) for i in range(2)]) for r in requests]
    pieces = local._pieces(groups, 2, decoder.sharding)
    weights = kv.weights(decoder, params)
    inputs = local._prompts(pieces, decoder.sharding), local._rows(pieces, decoder.sharding)
    room = local.Room(64, local.first_room(300))
    grid, _ = local.start(decoder, (), GREEDY, room, params, weights, *inputs)
    begun = grid.cache
    grid, _ = local.decode(decoder, (), GREEDY, weights, grid, jnp.int32(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(begun.own))  # no second cache while decoding
    old = grid.cache
    held = jax.device_get(old.own)
    assert kv.capacity(old) == 128
    new = kv.grown(old, 512, 32)
    assert kv.capacity(new) == 512
    assert all(x.is_deleted() for x in jax.tree.leaves(old.own))
    for before, after in zip(jax.tree.leaves(held), jax.tree.leaves(new.own), strict=True):
        assert np.any(before[..., :32, :])
        np.testing.assert_array_equal(after[..., :128, :], before)
        assert not np.any(after[..., 128:, :])
        assert after.sharding.shard_shape(after.shape) == (4, 1, 512, 32)
    taken = jax.device_put(np.asarray([[1, 1]] * 4, np.int32), decoder.sharding.rows())
    kept = jax.device_get(new)
    few = kv.selected(new, taken, old.lengths[1::2], old.begins[1::2], decoder.sharding)
    assert all(x.is_deleted() for x in jax.tree.leaves((new.prompt, new.own)))
    for part in range(4):  # the second prompt of each device, its second row
        found = jax.tree.map(lambda x, at=part: np.asarray(x)[at], (few.prompt, few.own))
        prompt = jax.tree.map(lambda x, at=part: x[2 * at + 1], kept.prompt)
        own = jax.tree.map(lambda x, at=part: x[4 * at + 3], kept.own)
        jax.tree.map(np.testing.assert_array_equal, found, (prompt, own))


def test_ten_steps_of_prompts_and_answers_of_any_length_compile_at_most_12_programs(
    engine_of, caplog
):
    engine, params = engine_of("qwen3")
    config = dataclasses.replace(engine.decoder.config, max_positions=2048)
    decoder = dataclasses.replace(engine.decoder, config=config)
    stops = tuple(range(100, 108))  # at temperature 3 about each 50th token
    engine = dataclasses.replace(engine, decoder=decoder, stop_ids=stops)
    rng = np.random.default_rng(0)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for step in range(10):
            sizes = np.clip(rng.lognormal(np.log(60), 0.5, 4), 5, 500).astype(int)
            asked = [Request(p, 300, step, 32) for p in prompts(sizes, seed=step)]
            found = engine.generate(params, 0, asked, Sampling(3.0))
            assert len({len(c.token_ids) for group in found for c in group}) > 10
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
    assert len(compiled) <= 12, compiled


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (Request((), 5, 0), "no tokens"),
        (Request((1,) * 250, 7, 0), "250 tokens and 7 new ones"),
        (Request((1, 2), 255, 0), "256 positions"),
        (Request((1, 2), 0, 0), "max_tokens"),
    ],
)
def test_what_cannot_be_continued_is_refused(engine_of, request_, named):
    engine, params = engine_of("qwen3")
    with pytest.raises(ValueError, match=named):
        engine.generate(params, 0, [Request((1, 2), 5, 0), request_], GREEDY)


def test_all_positions_may_be_used(engine_of):
    engine, params = engine_of("qwen3")
    (found,) = engine.generate(params, 0, [Request((1,) * 250, 6, 0)], GREEDY)[0]
    assert found.token_ids == continued(tiny.hf_model("qwen3"), (1,) * 250, 6)


@pytest.mark.parametrize(
    ("max_rows", "samples", "prompts_at_once"),
    [(256, 8, 32), (256, 3, 64), (7, 3, 2), (1, 1, 1), (2, 4, 1), (256, 1, 32)],
)
def test_a_grid_holds_no_more_rows_than_allowed(engine_of, max_rows, samples, prompts_at_once):
    engine, _ = engine_of("qwen3")
    engine = dataclasses.replace(engine, max_rows=max_rows)
    assert engine._prompts_at_once(samples) == prompts_at_once
    assert samples * prompts_at_once <= max(max_rows, samples)


def test_no_requests_give_no_completions(engine_of):
    engine, params = engine_of("qwen3")
    assert engine.generate(params, 0, [], GREEDY) == []


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 0.9)])
def test_weights_that_give_no_finite_log_probabilities_are_an_error(engine_of, sampling):
    engine, params = engine_of("qwen3")
    broken = {**params, "norm": params["norm"].at[0].set(jnp.nan)}
    requests = [Request(prompt, 4, 0) for prompt in prompts()[:2]]
    with pytest.raises(ValueError, match=r"weights of step 7 are not finite: .* lower learning_r"):
        engine.generate(broken, 7, requests, sampling)
