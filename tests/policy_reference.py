"""The GRPO family by the formulas of the papers, in float64 loops, and batches to compare on."""

from __future__ import annotations

import numpy as np

from atlas_jax.losses import PolicyOptions
from atlas_jax.types import PolicyBatch

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "gspo_token", "cispo"]
PER_SEQUENCE = ("grpo", "gspo", "gspo_token")
OPTIONS = PolicyOptions(
    loss_type="grpo",
    epsilon_low=0.2,
    epsilon_high=0.28,
    delta=0.0,
    beta=0.04,
    kl_estimator="k3",
    entropy_coef=0.0,
    importance_sampling="none",
    importance_sampling_mode="truncate",
    importance_sampling_cap=1.25,
    loss_divisor="trained",
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


def policy_batch(sequence_ids, advantages, rollout_logprobs, **fields):
    """Returns a batch from the number of each token's completion, or 0; all completions train.

    The loss reads neither tokens nor their positions.
    """
    ids = dict.fromkeys(("tokens", "positions", "segment_ids", "sequence_ids"), sequence_ids)
    fields = {"loss_mask": sequence_ids > 0} | fields
    return PolicyBatch(**ids, **fields, advantages=advantages, rollout_logprobs=rollout_logprobs)


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
    batch = policy_batch(
        sequence_ids,
        advantages=np.take_along_axis(advantages, sequence_ids, axis=1).astype(np.float32),
        rollout_logprobs=(old + rng.normal(0, spread, shape)).astype(np.float32),
        loss_mask=loss_mask,
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


def weighted(pairs):
    """Returns the mean of pairs of a value and its weight."""
    values, weights = np.transpose(pairs)
    return np.sum(values * weights) / np.sum(weights)


def k3(log_ratio):
    """Returns Schulman's estimate of a divergence."""
    return np.exp(log_ratio) - log_ratio - 1


def ratios_of(logprobs, frozen, old, places, kind):
    """Returns the ratio of each token of a completion."""
    n = len(places)
    if kind == "gspo":
        return [np.exp(sum(logprobs[p] - old[p] for p in places) / n)] * n
    if kind == "gspo_token":
        ratio = np.exp(sum(frozen[p] - old[p] for p in places) / n)
        return [ratio * np.exp(logprobs[p] - frozen[p]) for p in places]
    return [np.exp(logprobs[p] - old[p]) for p in places]


def policy_term(ratio, advantage, logprob, options, frozen_ratio):
    """Returns a token's policy term, and whether it is clipped."""
    lowest, highest = 1 - options.epsilon_low, 1 + options.epsilon_high
    if options.loss_type == "cispo":
        weight = min(max(frozen_ratio, lowest), highest)
        return -weight * advantage * logprob, not lowest <= ratio <= highest
    if options.delta and advantage < 0 and ratio > options.delta:
        return -options.delta * advantage, True
    inside = min(max(ratio, lowest), highest)
    return -min(ratio * advantage, inside * advantage), inside * advantage < ratio * advantage


def importance_weights(old, batch, places, options):
    """Returns each token's weight, and whether it is above the cap."""
    differences = [old[p] - batch.rollout_logprobs[p] for p in places]
    if options.importance_sampling == "sequence":
        differences = [sum(differences)] * len(places)
    elif options.importance_sampling == "none":
        return [(1.0, False)] * len(places)
    above = 0.0 if options.importance_sampling_mode == "mask" else options.importance_sampling_cap
    raw = np.exp(differences)
    return [(above, True) if w > options.importance_sampling_cap else (w, False) for w in raw]


def weight_of(completions, batch, options):
    """Returns what the loss sum is divided by."""
    if options.loss_type in ("bnpo", "dapo", "cispo"):
        return sum(map(len, completions))
    count = len(completions)
    if options.loss_divisor == "all":
        count = len(batch.tokens) * options.num_sequences
    return count * (options.max_new_tokens if options.loss_type == "dr_grpo" else 1)


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
    ref = batch.ref_logprobs
    in_reward = options.kl_estimator == "in_reward"
    policy, kl = 0.0, 0.0
    seen = {"ratio": [], "clip": [], "kl": [], "mismatch": [], "weight": [], "capped": []}
    completions = completions_of(batch)
    for places in completions:
        n = len(places)
        scale = 1 / n if options.loss_type in PER_SEQUENCE else 1.0
        # Tokens of a completion with one ratio, or one weight, are one entry of the mean together.
        share = 1 / n if options.loss_type in ("gspo", "gspo_token") else 1.0
        part = 1 / n if options.importance_sampling == "sequence" else 1.0
        ratios = ratios_of(logprobs, frozen, old, places, options.loss_type)
        weights = importance_weights(old, batch, places, options)
        for index, (p, ratio, (weight, capped)) in enumerate(
            zip(places, ratios, weights, strict=True)
        ):
            advantage = float(batch.advantages[p])
            if in_reward:
                advantage -= options.beta * sum(old[q] - ref[q] for q in places[index:])
            frozen_ratio = np.exp(frozen[p] - old[p])
            term, clipped = policy_term(ratio, advantage, logprobs[p], options, frozen_ratio)
            policy += scale * weight * term
            seen["ratio"].append((ratio, share))
            seen["clip"].append((clipped, share))
            seen["weight"].append((weight, part))
            seen["capped"].append((capped, part))
            seen["mismatch"].append((k3(old[p] - batch.rollout_logprobs[p]), 1))
            if ref is not None:
                seen["kl"].append((k3(ref[p] - logprobs[p]), 1))
                by = np.exp(logprobs[p] - old[p]) if options.kl_estimator == "unbiased" else 1.0
                kl += scale * by * seen["kl"][-1][0]
    divisor = weight_of(completions, batch, options)
    means = {
        "loss/policy": policy / divisor,
        "policy/ratio_mean": weighted(seen["ratio"]),
        "policy/clip_frac": weighted(seen["clip"]),
        "rollout/mismatch_kl": weighted(seen["mismatch"]),
    }
    if ref is not None:
        means["policy/kl"] = weighted(seen["kl"])
    if ref is not None and not in_reward:
        means["loss/kl"] = kl / divisor
    if options.importance_sampling != "none":
        means["rollout/importance_weight"] = weighted(seen["weight"])
        means["rollout/importance_capped_frac"] = weighted(seen["capped"])
    return policy + (0.0 if in_reward else options.beta * kl), divisor, means


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
