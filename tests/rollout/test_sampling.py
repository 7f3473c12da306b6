"""Draws follow the distribution that sorting gives in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from atlas_jax.rollout.sampling import Sampling, _nucleus, draw

DRAWS = 20000
LEAST = 1e-4  # p-value; the seeds are fixed, so a test that passes goes on passing

SAMPLINGS = [
    Sampling(),
    Sampling(0.5),
    Sampling(2.0),
    Sampling(top_p=0.6),
    Sampling(top_k=3),
    Sampling(min_p=0.3),
    Sampling(0.7, 0.95),
    Sampling(0.8, 0.8, 4),
    Sampling(1.3, 0.7, 5, 0.1),
]


@jax.jit(static_argnums=2)
def drawn(logits, keys, options):
    return draw(logits, keys, options)


def keys(*shape, seed=0):
    split = jax.random.split(jax.random.key(seed), shape)
    return jax.random.key_data(split)


def sample(logits, sampling, count=DRAWS):
    """Returns `count` draws from each row of `logits [P, V]`, arrays `[P, count]`."""
    logits = np.asarray(logits, np.float32)
    wide = jnp.broadcast_to(logits[:, None], (len(logits), count, logits.shape[1]))
    return jax.device_get(drawn(wide, keys(len(logits), count), sampling))


def distribution(logits, sampling):
    """Returns the probabilities before and after truncation of one row, by sorting."""
    scaled = np.float64(logits) / sampling.temperature
    plain = np.exp(scaled - scaled.max())
    plain /= plain.sum()
    kept = np.where(plain >= sampling.min_p * plain.max(), plain, 0)
    if sampling.top_k:
        kept = np.where(kept >= np.sort(kept)[::-1][sampling.top_k - 1], kept, 0)
    if sampling.top_p < 1:
        highest = np.sort(kept)[::-1]
        count = np.argmax(np.cumsum(highest) >= sampling.top_p * highest.sum())
        kept = np.where(kept >= highest[count], kept, 0)
    return plain, kept / kept.sum()


def random_logits(rows, vocab, scale=1.5, seed=0):
    return np.random.default_rng(seed).normal(0, scale, (rows, vocab)).astype(np.float32)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_draws_follow_the_distribution_and_report_it(sampling):
    logits = random_logits(4, 7)
    found = sample(logits, sampling)
    for row in range(4):
        plain, kept = distribution(logits[row], sampling)
        counts = np.bincount(found.tokens[row], minlength=7)
        assert not counts[kept == 0].any()
        if np.sum(kept > 0) > 1:
            expected = DRAWS * kept[kept > 0]
            assert stats.chisquare(counts[kept > 0], expected).pvalue > LEAST
        tokens = found.tokens[row]
        np.testing.assert_allclose(found.logprobs[row], np.log(kept[tokens]), atol=1e-5)
        np.testing.assert_allclose(found.untruncated[row], np.log(plain[tokens]), atol=1e-5)


def test_the_compared_samplings_truncate_some_tokens_and_not_others():
    for sampling in SAMPLINGS:
        sizes = [np.sum(distribution(x, sampling)[1] > 0) for x in random_logits(4, 7)]
        assert 1 < max(sizes) < 7 if sampling.truncates else min(sizes) == 7


@pytest.mark.parametrize("sampling", [Sampling(0.7, 0.95), Sampling(1.0, 0.5, 300, 0.001)], ids=str)
def test_a_large_vocabulary_keeps_exactly_what_sorting_keeps(sampling):
    logits = random_logits(16, 5000, scale=3.0)
    found = sample(logits, sampling, count=20)
    for row in range(16):
        kept = distribution(logits[row], sampling)[1]
        np.testing.assert_allclose(found.logprobs[row], np.log(kept[found.tokens[row]]), atol=1e-4)


@pytest.mark.parametrize(
    ("probabilities", "options", "kept"),
    [
        ([0.4, 0.3, 0.2, 0.1], dict(top_p=0.39), [0]),
        ([0.4, 0.3, 0.2, 0.1], dict(top_p=0.41), [0, 1]),
        ([0.4, 0.3, 0.2, 0.1], dict(top_p=0.69), [0, 1]),
        ([0.4, 0.3, 0.2, 0.1], dict(top_p=0.71), [0, 1, 2]),
        ([0.1, 0.4, 0.2, 0.3], dict(top_p=0.71), [1, 2, 3]),  # in any order
        ([0.4, 0.3, 0.2, 0.1], dict(top_p=0.91), [0, 1, 2, 3]),
        ([0.4, 0.3, 0.2, 0.1], dict(top_p=1e-6), [0]),
        ([0.4, 0.2, 0.2, 0.2], dict(top_p=0.5), [0, 1, 2, 3]),  # ties at the threshold
        ([0.4, 0.2, 0.2, 0.2], dict(top_k=2), [0, 1, 2, 3]),
        ([0.3, 0.3, 0.2, 0.2], dict(top_k=1), [0, 1]),
        ([0.4, 0.3, 0.2, 0.1], dict(top_k=3), [0, 1, 2]),
        ([0.4, 0.3, 0.2, 0.1], dict(top_k=4), [0, 1, 2, 3]),
        ([0.4, 0.3, 0.2, 0.1], dict(top_k=9), [0, 1, 2, 3]),
        ([0.4, 0.3, 0.2, 0.1], dict(min_p=0.74), [0, 1]),
        ([0.4, 0.3, 0.2, 0.1], dict(min_p=0.76), [0]),
        # top_p counts from what top_k leaves: 4/7 and 3/7, where 0.5 of the whole needs both.
        ([0.4, 0.3, 0.2, 0.1], dict(top_p=0.5, top_k=2), [0]),
        ([0.4, 0.3, 0.2, 0.1], dict(top_p=0.6, top_k=2), [0, 1]),
        # and from what min_p leaves
        ([0.4, 0.3, 0.2, 0.1], dict(top_p=0.5, min_p=0.7), [0]),
    ],
)
def test_support_by_hand(probabilities, options, kept):
    probabilities = np.asarray(probabilities)
    found = sample(np.log(probabilities)[None], Sampling(**options), count=400)
    assert np.unique(found.tokens).tolist() == kept
    mass = probabilities[kept].sum()
    expected = np.log(probabilities[found.tokens[0]])
    np.testing.assert_allclose(found.untruncated[0], expected, atol=1e-6)
    np.testing.assert_allclose(found.logprobs[0], expected - np.log(mass), atol=1e-6)


def test_temperature_0_takes_the_likeliest_token_whatever_the_key():
    logits = random_logits(5, 50)
    found = sample(logits, Sampling(0.0, 0.3, 2, 0.5), count=3)
    best = np.argmax(logits, axis=-1)
    np.testing.assert_array_equal(found.tokens, np.tile(best[:, None], 3))
    np.testing.assert_array_equal(found.logprobs, 0)
    for row in range(5):
        expected = np.log(distribution(logits[row], Sampling())[0][best[row]])
        np.testing.assert_allclose(found.untruncated[row], expected, atol=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.0), Sampling(), Sampling(0.7, 0.95), Sampling(top_k=6), SAMPLINGS[-1]],
    ids=str,
)
def test_impossible_tokens_are_never_drawn(sampling):
    # top_k=6 is more than the four tokens that are possible at all
    logits = random_logits(3, 8)
    logits[:, ::2] = -np.inf
    logits[2] = -np.inf
    logits[2, 5] = 0.0  # one token only
    found = sample(logits, sampling, count=2000)
    assert np.all(found.tokens % 2 == 1)
    assert np.all(found.tokens[2] == 5)
    assert np.all(np.isfinite(found.logprobs) & np.isfinite(found.untruncated))
    np.testing.assert_array_equal(found.logprobs[2], 0)


def test_a_row_draws_the_same_whatever_stands_beside_it():
    logits, roots = random_logits(6, 40).reshape(2, 3, 40), keys(2, 3)
    whole = drawn(logits, roots, Sampling(0.9, 0.8))
    for p, g in np.ndindex(2, 3):
        here = (slice(p, p + 1), slice(g, g + 1))
        alone = drawn(logits[here], roots[here], Sampling(0.9, 0.8))
        assert alone.tokens[0, 0] == whole.tokens[p, g]


def test_different_keys_draw_different_tokens():
    logits = np.zeros((1, 1, 1000), np.float32)
    tokens = [int(drawn(logits, keys(1, 1, seed=s), Sampling()).tokens[0, 0]) for s in range(20)]
    assert len(set(tokens)) > 15


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 4.0, 30.0])  # from equal ones to one alone
def test_a_nucleus_is_the_one_that_sorting_gives(top_p, scale):
    """Its sum reaches top_p and without its least likely tokens does not, to float precision."""
    logits = random_logits(8, 3000, scale, seed=1)
    probs = np.asarray(jax.nn.softmax(logits, axis=-1))
    found = np.asarray(jax.jit(_nucleus)(probs[:, None], top_p))[:, 0]
    for row, threshold in zip(probs, found, strict=True):
        assert threshold in row
        falling = np.sort(row)[::-1]
        sums = np.cumsum(np.float64(falling))
        expected = falling[np.argmax(sums >= top_p)]
        kept = np.float64(row[row >= threshold]).sum()
        more = np.float64(row[row > threshold]).sum()
        assert kept >= top_p - 1e-6
        assert more < top_p + 1e-6
        assert threshold == expected or min(abs(kept - top_p), abs(more - top_p)) < 1e-6


def test_a_nucleus_takes_eight_passes_over_the_vocabulary():
    jaxpr = jax.make_jaxpr(_nucleus)(np.ones((2, 3, 500), np.float32), 0.9).jaxpr
    (loop,) = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert loop.params["length"] <= 8
    body = loop.params["jaxpr"].jaxpr.eqns
    wide = [e for e in body if any(500 in v.aval.shape for v in e.invars if hasattr(v, "aval"))]
    ends = [e for e in wide if all(500 not in v.aval.shape for v in e.outvars)]
    assert [e.primitive.name for e in ends] == ["reduce"]  # of all its sums at once
