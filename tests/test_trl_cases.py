"""Losses and gradients equal those of TRL 1.16, as `tools/trl_cases` has recorded them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import losses
from atlas_jax.rollout.rows import collate_policy
from atlas_jax.types import Completion, Question, Sample
from tests.policy_reference import OPTIONS

GROUP, LONGEST = 4, 12
FILE = np.load(pathlib.Path(__file__).with_name("trl_cases.npz"))
CASES = json.loads(str(FILE["cases"]))
RECORDED = {name: FILE[name] for name in FILE.files}
BY_TOKEN = ("bnpo", "dapo", "cispo")


def name_of(case):
    trl = case["options"]
    return "gspo" if "importance_sampling_level" in trl else trl["loss_type"]


def translated(case):
    """TRL's options in our names, as docs/migration.md says."""
    trl = case["options"]
    name = name_of(case)
    level, _, mode = trl.get("vllm_importance_sampling_mode", "none_truncate").partition("_")
    corrected = trl.get("use_bias_correction_kl", True)
    return OPTIONS._replace(
        loss_type=name,
        epsilon_low=1.0 if name == "cispo" else trl["epsilon"],
        epsilon_high=trl["epsilon_high"] - (name == "cispo"),
        delta=trl.get("delta", 0.0),
        beta=trl["beta"],
        kl_estimator="unbiased" if corrected else "k3",
        entropy_coef=trl.get("entropy_coef", 0.0),
        importance_sampling=level,
        importance_sampling_mode=mode,
        importance_sampling_cap=1.25,
        loss_divisor="trained" if name in BY_TOKEN else "all",
        max_new_tokens=LONGEST,
        num_sequences=2,
    )


def samples_of(case):
    """The case's completions, with advantages and with whether they train."""
    given = {name: values[case["inputs"]] for name, values in RECORDED.items() if values.ndim > 1}
    unscored = given["unscored"] & case["unscored"]
    rewards = np.where(unscored, np.nan, given["rewards"]).reshape(-1, GROUP)
    scale = case["options"].get("scale_rewards", "group")
    advantages = losses.group_advantages(rewards, scale).ravel()
    cut = given["truncated"] & case["options"].get("mask_truncated_completions", False)
    samples = []
    for i, length in enumerate(given["lengths"]):
        values = tuple(given["rollout"][i, :length].tolist())
        text = Completion((1,), (7,) * int(length), values, values, "stop", "", 0)
        made = Sample(Question("", "", "", {}), text, place=i // GROUP, member=i % GROUP)
        trains = bool(~unscored[i] & ~cut[i])
        samples.append(made._replace(advantage=float(advantages[i]), trains=trains))
    return samples, given, int(given["lengths"][~cut].sum())


def computed(case, options):
    """Loss and gradients in TRL's layout, one completion a row, and tokens that each counts."""
    samples, given, counted = samples_of(case)
    batch = collate_policy(samples, 2, 1 + 2 * LONGEST)
    old = given["logprobs" if case["on_policy"] else "old"]
    rows, places = np.nonzero(batch.sequence_ids)
    within = batch.positions[rows, places] - 1
    of = 2 * rows + batch.sequence_ids[rows, places] - 1

    def place(values):
        found = np.zeros(batch.tokens.shape, np.float32)
        found[rows, places] = values[of, within]
        return found

    batch = batch._replace(old_logprobs=place(old), ref_logprobs=place(given["ref"]))
    arrays = jax.tree.map(jnp.asarray, batch)

    def loss(logprobs, entropy):
        (total, weight), _ = losses.policy_loss(logprobs, arrays, options)
        if options.entropy_coef:
            total, weight = losses.with_entropy((total, weight), entropy, arrays, options)
        return total / weight

    # Without jit: operations of one shape are compiled once for all cases.
    value, (grad, by_entropy) = jax.value_and_grad(loss, (0, 1))(
        jnp.asarray(place(given["logprobs"])), jnp.asarray(place(given["entropy"]))
    )
    gradient = np.zeros((len(samples), LONGEST), np.float32)
    gradient[of, within] = np.asarray(grad)[rows, places]
    trained = sum(s.completion.num_tokens for s in samples if s.trains)
    return float(value), gradient, float(by_entropy.min()), trained / counted


def difference(found, expected):
    """The largest difference over the largest entry."""
    return np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-9)


@pytest.mark.parametrize("name", ["grpo", "gspo", "dr_grpo", "bnpo", "dapo", "cispo"])
def test_losses_and_gradients_equal_those_of_trl(name):
    checked = 0
    for number, case in enumerate(CASES):
        if name_of(case) != name:
            continue
        loss, gradient, by_entropy, trained = computed(case, translated(case))
        # TRL divides by the tokens of members without a score too.
        share = trained if case["unscored"] and name in BY_TOKEN else 1.0
        assert abs(share * loss - RECORDED["loss"][number]) < 2e-6, case
        assert difference(share * gradient, RECORDED["gradient"][number]) < 2e-6, case
        np.testing.assert_allclose(by_entropy, RECORDED["by_entropy"][number], rtol=1e-5)
        assert np.abs(RECORDED["gradient"][number]).max() > 1e-3, case
        checked += 1
    assert checked >= 30


def test_the_file_has_cases_of_every_option():
    assert str(RECORDED["trl"]).startswith("1.16.")
    assert len(CASES) >= 300
    options = [translated(case) for case in CASES]
    seen = {name: {getattr(o, name) for o in options} for name in OPTIONS._fields}
    assert seen["kl_estimator"] == {"k3", "unbiased"}
    assert seen["importance_sampling_mode"] == {"truncate", "mask"}
    assert seen["importance_sampling"] == {"none", "token", "sequence"}
    assert {0.0, 1.5} == seen["delta"]
    assert {0.0, 0.01} == seen["entropy_coef"]


@pytest.mark.parametrize("name", ["grpo", "gspo", "dr_grpo"])
def test_by_default_the_completions_left_out_do_not_count(name):
    """16 completions, of which 4 are cut: the others count 16/12 as much as in TRL."""
    [(number, case)] = [
        (number, case)
        for number, case in enumerate(CASES)
        if name_of(case) == name
        and case["options"].get("mask_truncated_completions")
        and not case["unscored"]
        and "use_vllm" not in case["options"]
        and not case["options"]["beta"]
    ]
    options = translated(case)._replace(loss_divisor="trained")
    loss, gradient, *_ = computed(case, options)
    assert loss == pytest.approx(16 / 12 * RECORDED["loss"][number], rel=1e-5)
    assert difference(gradient, 16 / 12 * RECORDED["gradient"][number]) < 2e-6
