"""Completions after two prompts: which count, in what order, and where each token stands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from atlas_jax.config import GKDConfig
from atlas_jax.recipes import gkd
from atlas_jax.rollout import continuations, record
from atlas_jax.rollout.continuations import Continuation, TextOrder, Texts
from atlas_jax.types import Completion, Example, Question, Sample
from tests import tiny

TEXTS = [
    Continuation((5, 6), (7, 8, 9), (3, 4, 5, 6)),
    Continuation((11, 12, 13), (14,), (10, 11, 12, 13, 2)),
    Continuation((20,), (21, 22), (20, 30, 31)),
]


def example(tokens, mask):
    return Example(np.asarray(tokens, np.int32), np.asarray(mask, bool))


def test_of_a_conversation_the_last_turn_is_the_completion():
    found = continuations.of_example(example(range(8), [0, 1, 1, 0, 0, 1, 1, 0]))
    assert found == Continuation((0, 1, 2, 3, 4), (5, 6))
    found = continuations.of_example(example(range(4), [0, 0, 1, 1]))
    assert found == Continuation((0, 1), (2, 3))


def completion(prompt, text, tokens=(1, 2), finish_reason="stop"):
    known = (0.0,) * len(tokens)
    return Completion(prompt, tokens, known, known, finish_reason, text, 0)


def sample(alone, guided, /, **more):
    values = {
        "question": Question("q", "2+2?", "4", {}), "completion": completion((9,), "think"),
        "teaching": "think", "baseline": completion((5,), alone),
        "guided": completion((6, 5), guided), "probe": completion((7,), "plan"),
    }  # fmt: skip
    return record.as_record(1, Sample(**values | more))


def test_only_answers_that_the_lesson_turned_right_count():
    taught = [Continuation((5,), (1, 2), (6, 5))]
    assert continuations.of_sample(sample("5", "4")) == taught
    for alone, guided in (("4", "4"), ("5", "5"), ("4", "5")):
        assert continuations.of_sample(sample(alone, guided)) == []
    assert continuations.of_sample(sample("5", "4", teaching="")) == []
    more = (completion((6, 5), "4", (3,)), completion((6, 5), "5", (4,)))
    found = continuations.of_sample(sample("5", "4", further_guided=more))
    assert found == [*taught, Continuation((5,), (3,), (6, 5))]
    once_right = sample("5", "4", further_baselines=(completion((5,), "4"),))
    assert continuations.of_sample(once_right) == []
    with pytest.raises(ValueError, match="without a student's answers"):
        continuations.of_sample(sample("5", "4", baseline=None, guided=None))
    with pytest.raises(ValueError, match="is no sample of a GRPO run"):
        continuations.of_sample({"prompt": "a", "completion": "b"})


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.3, 1.0])
def test_the_share_of_own_completions_holds_for_every_stretch(share):
    order = TextOrder(Texts.of(TEXTS), 0, True, share)
    own = np.array([order.is_own(i) for i in range(400)])
    for size in (1, 7, 40):
        counts = np.convolve(own, np.ones(size, int), "valid")
        assert np.abs(counts - share * size).max() <= 1
    assert own.sum() == pytest.approx(share * 400, abs=1)


def test_every_epoch_has_each_text_once_in_an_order_of_its_own():
    order = TextOrder(Texts.of(TEXTS * 10), 3, True, 0.5)
    epochs = [[order.at(30 * e + i) for i in range(30)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(TEXTS * 10)
    assert epochs[0] != epochs[1]
    others = [
        TextOrder(Texts.of(TEXTS[:2]), 3, True, 0.5), TextOrder(Texts.of(TEXTS * 10), 4, True, 0.5),
        TextOrder(Texts.of(TEXTS * 10), 3, True, 0.4),
    ]  # fmt: skip
    assert len({order.fingerprint, *(o.fingerprint for o in others)}) == 4


def test_both_sides_predict_the_same_tokens_from_their_own_places():
    batch = continuations.collate([*TEXTS, None], True, lambda longest: longest + 1)
    assert batch.tokens.shape == (4, 6) and batch.teacher.tokens.shape == (4, 8)
    for row, text in enumerate(TEXTS):
        places = np.flatnonzero(batch.loss_mask[row]) - 1  # which predict a token
        assert batch.tokens[row, places + 1].tolist() == list(text.token_ids)
        theirs = batch.sources[row, places]
        assert batch.teacher.tokens[row, theirs + 1].tolist() == list(text.token_ids)
        assert batch.teacher.tokens[row, : theirs[0] + 1].tolist() == list(text.teacher_prompt_ids)
    assert not batch.loss_mask[3].any() and not batch.teacher.segment_ids[3].any()


def test_the_loss_of_rows_laid_out_differently_is_that_of_each_text_alone(tmp_path):
    decoder, params = tiny.load(tiny.save("smollm2", tmp_path))
    config = GKDConfig(beta=0.3, temperature=0.8, loss_chunk_size=4)
    texts = TEXTS + [None] * 5
    batch = continuations.collate(texts, True, lambda longest: longest + 2)
    batch = jax.tree.map(jnp.asarray, batch)
    both = params | {"teacher": params}
    (total, weight), _ = gkd.make_loss(decoder, decoder, config)(both, batch)
    expected = sum(alone(decoder, params, text, config) for text in TEXTS)
    assert weight == 6
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def alone(decoder, params, text, config):
    """The divergence of one text, from whole tables of log-probabilities in float64."""
    table = np.asarray(decoder.output_table(params), np.float64)

    def logprobs(prompt):
        row = np.asarray([[*prompt, *text.token_ids]] * 8, np.int32)
        ids = np.broadcast_to(np.arange(row.shape[1], dtype=np.int32), row.shape)
        arrays = map(jnp.asarray, (row, ids, np.ones_like(row)))
        hidden = np.asarray(decoder.hidden(params, *arrays), np.float64)[0, len(prompt) - 1 : -1]
        return scipy.special.log_softmax(hidden @ table.T / config.temperature, axis=-1)

    q, p = logprobs(text.prompt_ids), logprobs(text.teacher_prompt_ids)
    m = np.log(config.beta * np.exp(p) + (1 - config.beta) * np.exp(q))
    kl_p, kl_q = (np.sum(np.exp(x) * (x - m)) for x in (p, q))
    return config.beta * kl_p + (1 - config.beta) * kl_q
