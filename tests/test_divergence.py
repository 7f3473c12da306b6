"""The divergence of two models against numbers worked by hand, and against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch

from atlas_jax import divergence
from atlas_jax.config import MeshConfig
from atlas_jax.logprobs import Head
from atlas_jax.models.vocab import lookup
from atlas_jax.rollout import scores
from atlas_jax.sharding import Sharding, make_mesh
from atlas_jax.types import TopTokens

MESHES = {
    "one": (MeshConfig(), jax.devices()[:1]),
    "fsdp8": (MeshConfig(fsdp=8), None),
    "2x2x2": (MeshConfig(data=2, fsdp=2, tensor=2), None),
    "1x4x2": (MeshConfig(fsdp=4, tensor=2), None),
}
BETAS = (0.0, 0.5, 1.0)


def arrays(vocab, seed=0, sizes=(8, 21)):
    """Hidden states and tables of both sides, of different widths, and a mask."""
    rng = np.random.default_rng(seed)
    made = [rng.normal(size=(*sizes, 16), scale=0.25), rng.normal(size=(vocab, 16))]
    made += [rng.normal(size=(*sizes, 24), scale=0.25), rng.normal(size=(vocab, 24), scale=0.7)]
    return [x.astype(np.float32) for x in made], rng.random(sizes) < 0.4


def ours(sharding, mask, beta, temperature=1.0, num_tokens=10**6, chunk=8):
    """Returns (value, facts), (d_hidden, d_table) as a function of the four arrays."""
    mask = jnp.asarray(mask)
    options = divergence.DivergenceOptions(Head(sharding, chunk, temperature), beta, num_tokens)

    def loss(hidden, table, others, their_table):
        teacher = divergence.TeacherSide(others, their_table)
        total, facts = divergence.masked_divergence(hidden, table, teacher, mask, options)
        return 3.0 * total, facts

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def independent(made, mask, beta, temperature=1.0):
    """The same by PyTorch in float64, from whole tables of logits and the definition."""
    hidden, table, others, their_table = (torch.tensor(x, dtype=torch.float64) for x in made)
    hidden.requires_grad_()
    table.requires_grad_()
    q, p = (
        (h @ t.T / temperature).softmax(-1) for h, t in ((hidden, table), (others, their_table))
    )

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    if beta == 0:
        value = kl(p, q)
    elif beta == 1:
        value = kl(q, p)
    else:
        m = beta * p + (1 - beta) * q
        value = beta * kl(p, m) + (1 - beta) * kl(q, m)
    total = 3.0 * value[torch.tensor(mask)].sum()
    total.backward()
    return total.item(), hidden.grad.numpy(), table.grad.numpy()


def test_the_divergence_by_hand():
    """Teacher (1/2, 1/2), policy (3/4, 1/4): half and half they mix to (5/8, 3/8)."""
    sharding = Sharding(make_mesh(*MESHES["one"]))
    hidden, mask = jnp.ones((1, 1, 1)), jnp.ones((1, 1), bool)
    mine, theirs = jnp.log(jnp.array([[3.0], [1.0]])), jnp.zeros((2, 1))
    by_hand = {
        0.0: np.log(2 / 3) / 2 + np.log(2) / 2,
        1.0: 3 / 4 * np.log(3 / 2) + 1 / 4 * np.log(1 / 2),
        0.5: (np.log(4 / 5) / 2 + np.log(4 / 3) / 2 + 3 / 4 * np.log(6 / 5) + np.log(2 / 3) / 4)
        / 2,
    }
    for beta, expected in by_hand.items():
        (total, facts), _ = ours(sharding, mask, beta)(hidden, mine, hidden, theirs)
        np.testing.assert_allclose(total / 3, expected, rtol=1e-6)
        np.testing.assert_allclose(facts.teacher_entropy, np.log(2), rtol=1e-6)
        np.testing.assert_allclose(
            facts.policy_entropy, 3 / 4 * np.log(4 / 3) + np.log(4) / 4, rtol=1e-6
        )
        assert facts.agreement == 1  # of two equal tokens the teacher holds both for the best
    # q - p, three times
    _, (_, d_table) = ours(sharding, mask, 0.0)(hidden, mine, hidden, theirs)
    np.testing.assert_allclose(d_table, [[0.75], [-0.75]], rtol=1e-6)


@pytest.mark.parametrize(
    ("mesh", "vocab", "temperature"),
    [
        ("one", 96, 1.0),
        ("one", 96, 0.6),
        ("fsdp8", 96, 0.6),
        ("2x2x2", 498, 0.6),
        ("1x4x2", 362, 0.6),
    ],
)
@pytest.mark.parametrize("beta", BETAS)
def test_value_and_gradients_equal_float64_on_any_mesh(mesh, vocab, beta, temperature):
    """The tables are gathered or split over fsdp, evenly or not, as in test_logprobs."""
    made, mask = arrays(vocab)
    value, d_hidden, d_table = independent(made, mask, beta, temperature)
    compute = ours(Sharding(make_mesh(*MESHES[mesh])), mask, beta, temperature)
    (total, _), grads = compute(*made)
    np.testing.assert_allclose(total, value, rtol=1e-5)
    np.testing.assert_allclose(grads[0], d_hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads[1], d_table, rtol=1e-5, atol=1e-5)


TRL = {
    (0.0, 1.0): 0.8167131176763622, (0.0, 0.6): 2.1837416586320333,
    (0.1, 1.0): 0.06698544150375603, (0.1, 0.6): 0.15078606771586925,
    (0.5, 1.0): 0.16916932316659172, (0.5, 0.6): 0.3538950088426473,
    (1.0, 1.0): 0.8069087455753671, (1.0, 0.6): 2.1201487165775816,
}  # fmt: skip
"""`GKDTrainer.generalized_jsd_loss` of TRL 1.16.0 in float64, of the logits of `arrays(96)`."""


@pytest.mark.parametrize(("beta", "temperature"), TRL)
def test_the_mean_over_tokens_is_the_loss_of_trl(beta, temperature):
    made, mask = arrays(96)
    sharding = Sharding(make_mesh(*MESHES["one"]))
    (total, _), _ = ours(sharding, mask, beta, temperature)(*made)
    np.testing.assert_allclose(total / 3 / mask.sum(), TRL[beta, temperature], rtol=1e-6)


def test_entropies_and_agreement_equal_float64():
    made, mask = arrays(362, seed=1)
    for mine, theirs in ((0, 2), (1, 3)):  # more alike, so that some best tokens are the same
        made[theirs][..., :16] = made[mine]
    sharding = Sharding(make_mesh(*MESHES["1x4x2"]))
    (_, facts), _ = ours(sharding, mask, 0.5, 0.7)(*made)
    log_q, log_p = (
        scipy.special.log_softmax(made[i].astype(float) @ made[i + 1].astype(float).T / 0.7, -1)
        for i in (0, 2)
    )
    for found, logs in ((facts.policy_entropy, log_q), (facts.teacher_entropy, log_p)):
        entropy = -(np.exp(logs) * logs).sum(-1)[mask].sum()
        np.testing.assert_allclose(found, entropy, rtol=1e-5)
    same = log_q.argmax(-1) == log_p.argmax(-1)
    assert same[mask].any()
    assert facts.agreement == same[mask].sum()


def test_chunks_change_nothing_and_what_is_not_compared_is_not_read():
    made, mask = arrays(96)
    sharding = Sharding(make_mesh(*MESHES["2x2x2"]))
    expected = jax.tree.leaves(ours(sharding, mask, 0.5, chunk=1000)(*made))
    for i in (0, 2):
        made[i] = np.where(mask[..., None], made[i], np.nan)
    found = jax.tree.leaves(ours(sharding, mask, 0.5, chunk=5)(*made))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_a_policy_that_equals_the_teacher_has_no_loss_and_no_gradient(beta):
    (hidden, table, *_), mask = arrays(96)
    sharding = Sharding(make_mesh(*MESHES["one"]))
    (total, facts), grads = ours(sharding, mask, beta)(hidden, table, hidden, table)
    assert abs(total) < 1e-6 * mask.sum()
    assert facts.agreement == mask.sum()
    for gradient in grads:
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@pytest.mark.parametrize(("mesh", "beta"), [("one", 0.0), ("one", 1.0), ("1x4x2", 0.5)])
def test_rows_beyond_the_common_tokens_take_no_part(mesh, beta):
    """Tables of one vocabulary may be padded, each by its own number of rows."""
    made, mask = arrays(96)
    sharding = Sharding(make_mesh(*MESHES[mesh]))
    (value, _), (d_hidden, d_table) = ours(sharding, mask, beta)(*made)
    padded = [*made]
    padded[1] = np.pad(made[1], ((0, 8), (0, 0)), constant_values=3.0)
    compute = ours(sharding, mask, beta, num_tokens=96)
    for more in (0, 16):
        table = np.pad(made[3], ((0, more), (0, 0)), constant_values=5.0)
        padded[3] = divergence.fitted(jnp.asarray(table), 104)
        assert padded[3].shape == (104, 24)
        (total, _), grads = compute(*padded)
        np.testing.assert_allclose(total, value, rtol=1e-5)
        np.testing.assert_allclose(grads[0], d_hidden, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(grads[1][:96], d_table, rtol=1e-5, atol=1e-5)
        assert not np.any(grads[1][96:])


@pytest.mark.parametrize("with_gradient", [True, False])
def test_no_device_holds_logits_of_all_positions_or_a_float32_table_of_full_height(with_gradient):
    sharding = Sharding(make_mesh(*MESHES["1x4x2"]))
    vocab, width, length = 4096, 64, 128
    place = sharding.params(("vocab", "embed"))
    table = jax.ShapeDtypeStruct((vocab, width), jnp.float32, sharding=place)
    tokens = jax.ShapeDtypeStruct((8, length), jnp.int32, sharding=sharding.rows())
    options = divergence.DivergenceOptions(Head(sharding, 8), 0.5, vocab)

    def loss(table, theirs, tokens):
        kind = jnp.dtype("bfloat16")
        states = [lookup(x, tokens, sharding, kind) for x in (table, theirs)]
        teacher = divergence.TeacherSide(states[1], theirs)
        return divergence.masked_divergence(states[0], table, teacher, tokens > 0, options)[0]

    function = jax.grad(loss) if with_gradient else loss
    text = jax.jit(function).lower(table, table, tokens).compile().as_text()
    for rows in (8, 2, 1):
        for height in (vocab, vocab // 2, vocab // 8):
            assert f"[{rows},{length},{height}]" not in text
            assert f"[{rows * length},{height}]" not in text
    assert f"f32[{vocab},{width}]" not in text


def test_the_sum_of_no_position_is_zero():
    made, mask = arrays(96)
    sharding = Sharding(make_mesh(*MESHES["one"]))
    compute = functools.partial(ours(sharding, np.zeros_like(mask), 0.5), *made)
    (total, facts), grads = compute()
    assert total == 0
    assert not any(map(float, facts))
    assert not any(map(np.any, grads))


def top_tokens(made, num_tokens):
    """What a server would say of the teacher, in float64 from whole tables."""
    log_p = scipy.special.log_softmax(made[2].astype(float) @ made[3].astype(float).T, -1)
    ids = np.argsort(-log_p, axis=-1)[..., :num_tokens]
    named = np.take_along_axis(log_p, ids, -1)
    tail = np.log(np.maximum(1 - np.exp(named).sum(-1, keepdims=True), scores.SMALLEST_TAIL))
    return TopTokens(ids.astype(np.int32), np.concatenate([named, tail], -1).astype(np.float32))


def by_groups(sharding, mask, beta, chunk=8):
    """As `ours`, of hidden states and a table, and what a server says."""
    options = divergence.DivergenceOptions(Head(sharding, chunk), beta, 10**6)

    def loss(hidden, table, top):
        total, facts = divergence.masked_divergence(hidden, table, top, jnp.asarray(mask), options)
        return 3.0 * total, facts

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def independent_groups(made, mask, beta, num_tokens):
    """The divergence of K tokens and all others as one, by PyTorch in float64."""
    hidden, table, others, their_table = (torch.tensor(x, dtype=torch.float64) for x in made)
    hidden.requires_grad_()
    table.requires_grad_()
    q, p = ((h @ t.T).softmax(-1) for h, t in ((hidden, table), (others, their_table)))
    ids = p.topk(num_tokens).indices
    named = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ids, True)
    groups = [
        torch.cat([x.gather(-1, ids), (x * ~named).sum(-1, keepdim=True)], -1) for x in (q, p)
    ]
    if num_tokens == p.shape[-1]:
        groups = [x[..., :-1] for x in groups]
    q, p = groups
    m = beta * p + (1 - beta) * q

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    value = {0: kl(p, q), 1: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))
    total = 3.0 * value[torch.tensor(mask)].sum()
    total.backward()
    entropy = -(p * p.log()).sum(-1)[torch.tensor(mask)].sum()
    return total.item(), hidden.grad.numpy(), table.grad.numpy(), entropy.item()


@pytest.mark.parametrize(
    ("mesh", "vocab", "num_tokens"),
    [("one", 96, 1), ("one", 96, 8), ("one", 96, 96), ("2x2x2", 498, 8), ("1x4x2", 362, 64)],
)
@pytest.mark.parametrize("beta", BETAS)
def test_of_the_most_probable_tokens_value_and_gradients_equal_float64(
    mesh, vocab, num_tokens, beta
):
    """The tables are split over fsdp and tensor, evenly or not, and so are the tokens."""
    made, mask = arrays(vocab)
    value, d_hidden, d_table, entropy = independent_groups(made, mask, beta, num_tokens)
    top = top_tokens(made, num_tokens)
    compute = by_groups(Sharding(make_mesh(*MESHES[mesh])), mask, beta)
    (total, facts), grads = compute(made[0], made[1], top)
    np.testing.assert_allclose(total, value, rtol=1e-5)
    np.testing.assert_allclose(grads[0], d_hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads[1], d_table, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(facts.teacher_entropy, entropy, rtol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_more_tokens_never_lower_the_divergence_and_all_of_them_are_exact(beta):
    """Joining outcomes never raises an f-divergence: what is computed is a lower bound."""
    made, mask = arrays(96, seed=2)
    sharding = Sharding(make_mesh(*MESHES["one"]))
    (exact, facts), grads = ours(sharding, mask, beta)(*made)
    compute = by_groups(sharding, mask, beta)
    found = [compute(*made[:2], top_tokens(made, k)) for k in (1, 4, 16, 64, 96)]
    values = [float(total) for (total, _), _ in found]
    assert np.all(np.diff(values) > 0) and values[0] < 0.7 * exact
    np.testing.assert_allclose(values[-1], exact, rtol=1e-5)
    for mine, whole in zip(jax.tree.leaves(found[-1]), jax.tree.leaves(((exact, facts), grads)),
                           strict=True):  # fmt: skip
        np.testing.assert_allclose(mine, whole, rtol=1e-4, atol=1e-5)


def test_a_tail_that_rounding_has_emptied_stays_finite():
    """A teacher that is sure of its token says that all others have no probability."""
    made, mask = arrays(96)
    made[2] *= 80.0
    sharding = Sharding(make_mesh(*MESHES["one"]))
    for beta in BETAS:
        exact, _ = ours(sharding, mask, beta)(*made)
        (total, _), grads = by_groups(sharding, mask, beta)(*made[:2], top_tokens(made, 4))
        assert 0 < total < 1.01 * exact[0]
        assert all(np.isfinite(gradient).all() for gradient in grads)
