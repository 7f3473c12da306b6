"""Scores of servers: what they say of a text, and what is made of replies that say less.

The servers are stand-ins (`tests/stand_in.py`), and in the long tests vLLM.
"""

import asyncio
import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from atlas_jax.config import GKDConfig
from atlas_jax.options.gkd import ScoringConfig
from atlas_jax.recipes import gkd, served_teacher
from atlas_jax.rollout import capabilities, continuations, scores
from atlas_jax.rollout.continuations import Continuation
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.model import open_frozen
from atlas_jax.types import DependencyError, TopTokens
from tests import conftest, llama, stand_in, vllm_servers, words

NAMES = conftest.VLLM_WORDS
SIZES = conftest.VLLM_SIZES | {"initializer_range": 0.2}
SIZE = len(words.tokenizer(NAMES))
TEXTS = [
    Continuation((5, 6), (7, 8, 1)),
    Continuation((5, 6, 7), (9, 10), (11, 12, 5, 6, 7)),  # the teacher reads more
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return words.save(tmp_path_factory.mktemp("teacher") / "model", NAMES, seed=1, **SIZES)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    path = words.save(tmp_path_factory.mktemp("policy") / "model", NAMES, **SIZES)
    return open_frozen(Compute.of(GKDConfig(), jax.devices()[:1]), path)


def config(urls, **values):
    scoring = {"servers": ",".join(urls), "top_tokens": 4} | values.pop("scoring", {})
    options = {"temperature": 1.0, "max_seq_length": 32, "output_dir": "missing"} | values
    return GKDConfig(scoring=ScoringConfig(**scoring), **options)


@contextlib.contextmanager
def opened(policy, urls, **values):
    with contextlib.ExitStack() as stack:
        yield served_teacher.open_teacher(config(urls, **values), policy, stack)


def logprobs(model, text):
    """The teacher's log-probabilities of each token of a completion, [n, V]."""
    prompt = text.teacher_prompt_ids or text.prompt_ids
    cache, found = model.empty(), []
    for token in (*prompt, *text.token_ids):
        logits, cache = model.extend(cache, [token])
        found.append(scipy.special.log_softmax(logits.astype(float)))
    return np.stack(found[len(prompt) - 1 : -1])


def assert_named(score, expected, num_tokens):
    """The scores are the most probable tokens of these distributions."""
    for ids, said, all_of_them in zip(*score, expected, strict=True):
        best = np.sort(all_of_them)[::-1][:num_tokens]
        np.testing.assert_allclose(said[:-1], best, atol=2e-5)
        np.testing.assert_allclose(all_of_them[ids], best, atol=2e-5)
        tail = max(1 - np.exp(best).sum(), scores.SMALLEST_TAIL)
        np.testing.assert_allclose(np.exp(said[-1]), tail, atol=2e-5)


def test_a_server_names_the_most_probable_tokens_behind_each_place(policy, teacher):
    with stand_in.running(teacher, 2, num_scores=4) as servers:
        with opened(policy, [url for url, _ in servers]) as served:
            assert served.name == teacher
            served.check(TEXTS[0])
            served.begin(TEXTS)
            found, values = served.take([*TEXTS, None, TEXTS[0]])
        bodies = [body for _, server in servers for _, path, _, body in server.calls
                  if path == capabilities.GENERATE]  # fmt: skip
    # Two checks, and each text once although one is there twice.
    assert len(bodies) == 4
    assert {body["sampling_params"]["prompt_logprobs"] for body in bodies} == {4}
    model = llama.Llama(teacher)
    for text, score in zip([*TEXTS, TEXTS[0]], [found[0], found[1], found[3]], strict=True):
        assert_named(score, logprobs(model, text), 4)
    assert found[2] is None
    assert values["distillation/failed_frac"] == (0, 3)
    tails = [np.exp(score.logprobs[:, -1]) for score in found if score]
    total, count = values["distillation/tail_frac"]
    assert count == 8 and total == pytest.approx(np.concatenate(tails).sum())


def test_rows_have_the_scores_where_the_policy_predicts_their_tokens():
    made = [TopTokens(np.full((len(t.token_ids), 2), i, np.int32),
                      np.full((len(t.token_ids), 3), -i, np.float32))
            for i, t in enumerate(TEXTS, start=3)]  # fmt: skip
    top = scores.laid_out([*TEXTS, None], [*made, None], 8, 2)
    rows = continuations.collate([*TEXTS, None], False, lambda _: 8)
    assert top.ids.shape == (3, 8, 2) and top.logprobs.shape == (3, 8, 3)
    predicts = np.pad(rows.loss_mask[:, 1:], ((0, 0), (0, 1)))
    np.testing.assert_array_equal((top.ids >= 0).all(-1), predicts)
    for row, expected in enumerate((3, 4)):
        assert (top.ids[row][predicts[row]] == expected).all()
        assert (top.logprobs[row][predicts[row]] == -expected).all()


def entry(**probabilities):
    return {i[1:]: {"logprob": float(np.log(p))} for i, p in probabilities.items()}


def test_what_is_not_named_is_the_tail():
    # The token that is there comes first, and is one more if it is not among the most probable.
    given = [entry(t7=0.05, t2=0.5, t3=0.25), entry(t3=0.25, t9=0.5)]
    found = scores.read(given, 2, 2, 8)
    np.testing.assert_array_equal(found.ids, [[2, 3], [-1, 3]])
    np.testing.assert_allclose(np.exp(found.logprobs), [[0.5, 0.25, 0.25], [0, 0.25, 0.75]])
    sure = scores.read([entry(t1=1.0, t2=1e-9)], 1, 2, 8)
    np.testing.assert_allclose(np.exp(sure.logprobs[0, -1]), scores.SMALLEST_TAIL, rtol=1e-5)


@pytest.mark.parametrize(
    "entries",
    [
        [entry(t1=0.5)],  # fewer tokens than asked for
        [],
        [{"1": {"logprob": 3.5}, "2": {"logprob": 1.5}}],  # logits
        [entry(t1=0.9, t2=0.4)],
        [{"1": {"logprob": float("nan")}, "2": {"logprob": -1.0}}],
        [{"one": {"logprob": -1.0}, "2": {"logprob": -1.0}}],
    ],
)
def test_impossible_scores_are_none(entries):
    with pytest.raises(ValueError):
        scores.read(entries, 1, 2, 8)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"do": "status", "status": 500}, "no answer: .*500"),
        ({"do": "status", "status": 400}, "refused: out of order"),
        ({"do": "reply", "reply": {"choices": []}}, "no scores: KeyError 'prompt_logprobs'"),
        ({"do": "reply", "reply": {"prompt_logprobs": None}}, "no scores: TypeError"),
    ],
)
def test_a_text_that_fails_is_left_out_and_counted_and_too_many_end_the_run(
    policy, teacher, caplog, fault, reason
):
    with stand_in.running(teacher, num_scores=4) as [(url, server)]:
        options = {"request_timeout_secs": 20.0, "max_failed_frac": 0.5}
        with opened(policy, [url], scoring=options) as served:
            server.faults = [{"path": capabilities.GENERATE, "token": 12, **fault}]
            found, values = served.take(TEXTS)
            assert [score is None for score in found] == [False, True]
            assert values["distillation/failed_frac"] == (1, 2)
            with pytest.raises(DependencyError, match=f"1 of 1 texts have no scores.*{reason}"):
                served.take(TEXTS[1:])
    assert "1 texts have no scores of the teacher; the first: " in caplog.text


def test_servers_that_cannot_score_are_refused_in_a_line(policy, teacher, tmp_path):
    other = words.save(tmp_path / "other", (*NAMES[:-1], "plot"), **SIZES)
    served = {"num_scores": 4}
    cases = [
        ({}, {}, "--logprobs-mode processed_logits and --max-logprobs 20, and scoring.top_tokens"),
        ({"num_scores": 3}, {}, "--max-logprobs 3, and scoring.top_tokens=4"),
        (served, {"max_seq_length": 512}, "takes texts of 511 tokens, and max_seq_length=512"),
        (served, {"teacher_model_name_or_path": "owner/large"}, "not teacher_model_name_or_path="),
        (served, {"scoring": {"top_tokens": 99}}, f"of a vocabulary of {SIZE} tokens; lower it"),
        ({"model": other, **served}, {}, f"'plan' is not its token {SIZE - 1}, so the two"),
    ]
    for start, values, line in cases:
        with (
            stand_in.running(**{"model": teacher, **start}) as [(url, _)],
            pytest.raises(ValueError) as caught,
            opened(policy, [url], **values),
        ):
            pass
        assert line in str(caught.value)
        assert "\n" not in str(caught.value)
    with (
        stand_in.running(teacher, num_scores=4) as [(url, server)],
        opened(policy, [url]) as teacher_there,
    ):
        server.faults = [{"path": capabilities.GENERATE, "do": "status", "status": 400}]
        with pytest.raises(ValueError, match=r"does not score a text of 5 tokens \(refused: out"):
            teacher_there.check(TEXTS[0])


def test_other_tokens_are_found_by_halves():
    ours = [f"w{i}" for i in range(37)]
    theirs = [*ours]
    theirs[23] = "other"

    class Control:
        async def post(self, path, body):
            assert path == "/detokenize"
            return {"prompt": " ".join(theirs[i] for i in body["tokens"])}

    server = dataclasses.make_dataclass("Server", ["control"])(Control())
    decode = lambda ids: "".join(ours[i] for i in ids)  # noqa: E731
    find = functools.partial(scores.other_tokens, server, decode=decode)
    assert list(asyncio.run(find(range(37)))) == [23]
    assert list(asyncio.run(find(range(20)))) == []


def loss_of(policy, params, batch, options, teacher=None):
    loss = gkd.make_loss(policy.decoder, teacher, options)
    batch = jax.tree.map(jnp.asarray, batch)
    (total, weight), _ = loss(params, batch)
    return float(total / weight)


@pytest.mark.long
@pytest.mark.parametrize("num_tokens", [SIZE, 8])
def test_vllm_and_the_same_teacher_here_agree(policy, teacher, tmp_path, num_tokens):
    """With all tokens in every digit that both compute, with 8 of them by what is joined."""
    model = open_frozen(Compute.of(GKDConfig(), jax.devices()[:1]), teacher)
    params, theirs = (gkd.hf.load(m.source, m.decoder) for m in (policy, model))
    texts = [Continuation((5, 6, 7), (9, 10, 4, 20, 1)), Continuation((12, 5), (8, 8, 3))]
    flags = ("--logprobs-mode", "raw_logprobs", "--max-logprobs", str(num_tokens))
    with vllm_servers.running([teacher], tmp_path, *flags) as [server]:
        options = {"scoring": {"top_tokens": num_tokens}}
        with opened(policy, [server.url], **options) as served:
            served.check(texts[0])
            found, values = served.take(texts)
    assert values["distillation/failed_frac"] == (0, 2)
    numpy_model = llama.Llama(teacher)
    for text, score in zip(texts, found, strict=True):
        assert_named(score, logprobs(numpy_model, text), num_tokens)
    rows = continuations.collate(texts, False, lambda _: 16)
    scored = rows._replace(top=scores.laid_out(texts, found, 16, num_tokens))
    for beta in (0.0, 0.5, 1.0):
        options = GKDConfig(temperature=1.0, beta=beta)
        here = loss_of(policy, params | {"teacher": theirs}, rows, options, model.decoder)
        there = loss_of(policy, params, scored, options)
        if num_tokens == SIZE:
            np.testing.assert_allclose(there, here, rtol=1e-4)
        else:
            assert 0 < there < here
