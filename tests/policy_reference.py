"""The GRPO family by the formulas of the papers, in float64 loops, and batches to compare on."""

from __future__ import annotations

import numpy as np

from atlas_jax.losses import PolicyOptions
from atlas_jax.types import PolicyBatch

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"]
PER_SEQUENCE = ("grpo", "gspo")
OPTIONS = PolicyOptions(
    loss_type="grpo",
    epsilon_low=0.2,
    epsilon_high=0.28,
    beta=0.04,
    importance_sampling="none",
    importance_sampling_cap=1.25,
    max_new_tokens=50,
    num_sequences=3,
)
# Rows of completions; True is a trained token, False one between them (of a tool, say).
ROWS = [
    [[True] * 5, [True] * 2, [True, False, False, True, True]],
    [[True]],
    [[False, True, True, True], [False, False]],  # the second trains nothing
    [[True] * 7, [True] * 3],
]
PROMPT, WIDTH = 2, 16
NUMBERS = ("advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs")


def layout(rows):
    """Returns sequence ids and the loss mask; each row is a prompt, completions and padding."""
    sequence_ids = np.zeros((len(rows), WIDTH), np.int32)
    loss_mask = np.zeros((len(rows), WIDTH), bool)
    for row, completions in enumerate(rows):
        start = PROMPT
        for number, trained in enumerate(completions, start=1):
            sequence_ids[row, start : start + len(trained)] = number
            loss_mask[row, start : start + len(trained)] = trained
            start += len(trained)
    return sequence_ids, loss_mask


def make(seed=0, rows=ROWS, spread=0.4):
    """Returns random log-probabilities and their batch, NaN or infinite where nothing is trained.

    The log-probabilities of policy, old, reference and engine differ by about `spread`.
    """
    rng = np.random.default_rng(seed)
    sequence_ids, loss_mask = layout(rows)
    shape = sequence_ids.shape
    logprobs = -rng.exponential(1.5, shape)
    old = logprobs + rng.normal(0, spread, shape)
    advantages = rng.normal(0, 1, (len(rows), 4))
    batch = PolicyBatch(
        tokens=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        segment_ids=np.ones(shape, np.int32),
        sequence_ids=sequence_ids,
        loss_mask=loss_mask,
        advantages=np.take_along_axis(advantages, sequence_ids, axis=1).astype(np.float32),
        rollout_logprobs=(old + rng.normal(0, spread, shape)).astype(np.float32),
        old_logprobs=old.astype(np.float32),
        ref_logprobs=(logprobs + rng.normal(0, spread, shape)).astype(np.float32),
    )
    garbage = rng.choice([np.nan, np.inf, -np.inf, 1e30], shape)
    return np.where(loss_mask, logprobs, garbage).astype(np.float32), batch


def completions_of(batch):
    """Returns the places of the trained tokens of each completion that has any, as (row, t)."""
    found = {}
    for row, t in np.argwhere(batch.loss_mask):
        found.setdefault((row, int(batch.sequence_ids[row, t])), []).append((row, t))
    return list(found.values())


def reference(logprobs, batch, options, frozen=None):
    """Returns loss sum, weight, and means of the metrics, by the formulas of the papers.

    Args:
        logprobs: of the policy.
        batch: as for `policy_loss`.
        options: as for `policy_loss`.
        frozen: the policy's log-probabilities wherever a formula stops the gradient.
    """
    frozen = logprobs if frozen is None else frozen
    old = frozen if batch.old_logprobs is None else np.float64(batch.old_logprobs)
    lowest, highest = 1 - options.epsilon_low, 1 + options.epsilon_high
    kind = options.loss_type
    policy, kl, tokens = 0.0, 0.0, 0
    seen = {"ratio": [], "clip": [], "kl": [], "mismatch": [], "weight": [], "capped": []}
    completions = completions_of(batch)
    for places in completions:
        n = len(places)
        scale = 1 / n if kind in PER_SEQUENCE else 1.0
        sequence_ratio = np.exp(sum(logprobs[p] - old[p] for p in places) / n)
        sequence_weight = np.exp(sum(old[p] - batch.rollout_logprobs[p] for p in places))
        for index, p in enumerate(places):
            advantage = float(batch.advantages[p])
            ratio = sequence_ratio if kind == "gspo" else np.exp(logprobs[p] - old[p])
            if kind == "cispo":
                weight = min(max(np.exp(frozen[p] - old[p]), lowest), highest)
                term = -weight * advantage * logprobs[p]
                clipped = not lowest <= ratio <= highest
            else:
                inside = min(max(ratio, lowest), highest)
                term = -min(ratio * advantage, inside * advantage)
                clipped = inside * advantage < ratio * advantage
            raw = {
                "none": 1.0,
                "token": np.exp(old[p] - batch.rollout_logprobs[p]),
                "sequence": sequence_weight,
            }[options.importance_sampling]
            cut = min(raw, options.importance_sampling_cap)
            policy += scale * cut * term
            if kind != "gspo" or index == 0:
                seen["ratio"].append(ratio)
                seen["clip"].append(clipped)
            if options.importance_sampling == "token" or index == 0:
                seen["weight"].append(cut)
                seen["capped"].append(raw > options.importance_sampling_cap)
            difference = old[p] - batch.rollout_logprobs[p]
            seen["mismatch"].append(np.exp(difference) - difference - 1)
            if batch.ref_logprobs is not None:
                difference = batch.ref_logprobs[p] - logprobs[p]
                seen["kl"].append(np.exp(difference) - difference - 1)
                kl += scale * seen["kl"][-1]
        tokens += n
    weight = {
        "grpo": len(completions),
        "gspo": len(completions),
        "bnpo": tokens,
        "dapo": tokens,
        "cispo": tokens,
        "dr_grpo": len(completions) * options.max_new_tokens,
    }[kind]
    means = {
        "loss/policy": policy / weight,
        "policy/ratio_mean": np.mean(seen["ratio"]),
        "policy/clip_frac": np.mean(seen["clip"]),
        "rollout/mismatch_kl": np.mean(seen["mismatch"]),
    }
    if batch.ref_logprobs is not None:
        means |= {"policy/kl": np.mean(seen["kl"]), "loss/kl": kl / weight}
    if options.importance_sampling != "none":
        means["rollout/importance_weight"] = np.mean(seen["weight"])
        means["rollout/importance_capped_frac"] = np.mean(seen["capped"])
    return policy + options.beta * kl, weight, means


def differences(logprobs, batch, options, step=1e-6):
    """Returns the gradient of the reference by central differences, 0 where nothing is trained."""
    at = np.float64(logprobs)
    found = np.zeros(at.shape)
    for row, t in np.argwhere(batch.loss_mask):
        sums = []
        for sign in (1, -1):
            moved = at.copy()
            moved[row, t] += sign * step
            sums.append(reference(moved, batch, options, frozen=at)[0])
        found[row, t] = (sums[0] - sums[1]) / (2 * step)
    return found
