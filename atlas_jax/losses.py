"""Losses: pure functions of arrays that return `(sum, weight)`.

The sum over all microbatches and devices is divided once by the sum of the weights, so that
microbatching, packing and data parallelism change nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from atlas_jax.options import fields
from atlas_jax.options.policy_loss import PolicyLossConfig
from atlas_jax.types import PolicyBatch

LossSum = tuple[Float[Array, ""], Float[Array, ""]]

_STD_FLOOR = 1e-4


class PolicyOptions(NamedTuple):
    """What `policy_loss` computes. All of it is static under `jax.jit`."""

    loss_type: str  # grpo | bnpo | dr_grpo | dapo | gspo | cispo
    epsilon_low: float  # ratios are clipped to [1 - epsilon_low, 1 + epsilon_high]
    epsilon_high: float
    beta: float  # weight of the KL to the reference; 0: no reference needed
    importance_sampling: str  # none | token | sequence: between what sampled and what trains
    importance_sampling_cap: float  # importance weights are cut here
    max_new_tokens: int  # the constant length by which dr_grpo divides
    num_sequences: int  # completions that a row holds at most


def policy_loss(
    logprobs: Float[Array, "B T"], batch: PolicyBatch, options: PolicyOptions
) -> tuple[LossSum, dict[str, LossSum]]:
    """Returns the loss sum of the GRPO family with its weight, and metrics.

    With the ratio `r = exp(logprobs - old)`, the advantage `A` and `clip` to the bounds of
    `options`, a token's policy term is

    - grpo, bnpo, dr_grpo, dapo: `-min(r A, clip(r) A)`
    - gspo: the same, with the ratio `exp(mean_t (logprobs - old))` of the whole completion for `r`
    - cispo: `-stop_gradient(clip(r)) A logprobs`. The paper sets no lower bound: `epsilon_low` of
      1 or more gives none.

    The importance weight multiplies the policy term: `min(exp(old - rollout), cap)` of the token,
    or the same of its completion's summed difference. `beta` times the KL to the reference (k3) is
    added. The terms are added up as

    - grpo, gspo: the means over each completion's trained tokens; the weight is the number of
      completions with a trained token
    - bnpo, dapo, cispo: all trained tokens; the weight is their number. bnpo divides by the tokens
      of the batch and dapo by those of the group, which is one: all microbatches share a weight.
    - dr_grpo: all trained tokens; the weight is the number of completions with a trained token
      times `max_new_tokens`. The paper's advantages are not divided by a standard deviation.

    Metrics, each `(sum, weight)`: `loss/policy` and `loss/kl` (without `beta`) as the loss;
    `policy/kl` and `rollout/mismatch_kl`, the k3 estimate of KL(rollout || trainer), of tokens;
    `policy/ratio_mean` and `policy/clip_frac` of tokens, or of completions for gspo. A clip counts
    where it takes the gradient away, for cispo where the ratio is out of bounds.
    `rollout/importance_weight` (after the cap) and `rollout/importance_capped_frac` are of tokens
    or completions, as `importance_sampling` says, and missing if it is none. Both KL to the
    reference are missing without `batch.ref_logprobs`.

    Args:
        logprobs: of the policy in training, in nats, at the sampling temperature, aligned with
            `batch.tokens`. Where `batch.loss_mask` is false they may be anything, NaN included.
        batch: trained tokens have a `sequence_ids` of 1 to `options.num_sequences`.
        options: what to compute.

    Raises:
        ValueError: an option has no such value, or `beta` needs reference log-probabilities that
            the batch lacks.

    Reference:
        grpo: Shao et al. 2024, arXiv:2402.03300, eq. 3-4. dr_grpo: Liu et al. 2025,
        arXiv:2503.20783, section 3. dapo: Yu et al. 2025, arXiv:2503.14476, eq. 8. gspo: Zheng et
        al. 2025, arXiv:2507.18071, eq. 5-7. cispo: MiniMax 2025, arXiv:2506.13585, eq. 4-5. bnpo:
        `loss_type="bnpo"` of TRL. Importance weight: Yao et al. 2025, "Your efficient RL framework
        secretly brings you off-policy RL training".
    """
    _check(batch, options)
    members = _members(batch, options)
    # Also stops a NaN of the backward pass, 0 * inf, from leaving a token that is not trained.
    logprobs = jnp.where(members.any(axis=-1), logprobs, 0.0)
    old = jax.lax.stop_gradient(logprobs if batch.old_logprobs is None else batch.old_logprobs)

    terms, metrics = _policy_terms(logprobs, old, batch.advantages, members, options)
    if options.importance_sampling != "none":
        weights, found = _importance_weights(old - batch.rollout_logprobs, members, options)
        terms = weights * terms
        metrics |= found
    total, weight = _add_up(terms, members, options)
    metrics["loss/policy"] = total, weight
    metrics["rollout/mismatch_kl"] = _token_mean(_k3(old - batch.rollout_logprobs), members)
    if batch.ref_logprobs is not None:
        kl = _k3(batch.ref_logprobs - logprobs)
        metrics["policy/kl"] = _token_mean(kl, members)
        metrics["loss/kl"] = _add_up(kl, members, options)
        if options.beta != 0:
            total += options.beta * metrics["loss/kl"][0]
    return (total, weight), metrics


def group_advantages(
    rewards: Float[np.ndarray, "N G"], scale_rewards: str
) -> Float[np.ndarray, "N G"]:
    """Returns the advantage of each member of each group, in float32.

    It is the reward less the group's mean, over a standard deviation (ddof 1) plus a small floor.
    A member that could not be scored has the advantage 0 and moves nobody else's. A group with
    fewer than two scored members, or with equal rewards, has exactly 0 everywhere.

    Args:
        rewards: N groups of G members; NaN: could not be scored.
        scale_rewards: whose standard deviation: `none` (do not divide), `group`, or `batch`: all
            scored rewards at hand.

    Raises:
        ValueError: a reward is infinite, or `scale_rewards` has no such value.

    Reference:
        Shao et al. 2024, arXiv:2402.03300, section 4.1.2. `none`: Liu et al. 2025,
        arXiv:2503.20783. `batch`: Liu et al. 2025, arXiv:2508.08221.
    """
    _one_of("scale_rewards", scale_rewards)
    rewards = rewards.astype(np.float64)
    infinite = np.argwhere(np.isinf(rewards))
    if infinite.size:
        group, member = infinite[0]
        raise ValueError(
            f"the reward of member {member} of group {group} is {rewards[group, member]}; "
            "use a finite number, or NaN if it could not be scored"
        )
    scored = ~np.isnan(rewards)
    count = scored.sum(axis=1, keepdims=True)
    # Taken from the lowest first, so that the mean of equal rewards has no rounding error.
    lowest = np.min(rewards, axis=1, keepdims=True, where=scored, initial=np.inf)
    above = np.where(scored, rewards - lowest, 0.0)
    mean = above.sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centered = np.where(scored, above - mean, 0.0)
    if scale_rewards == "group":
        variance = (centered**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1)
        centered = centered / (np.sqrt(variance) + _STD_FLOOR)
    elif scale_rewards == "batch" and scored.sum() > 1:
        centered = centered / (np.std(rewards[scored], ddof=1) + _STD_FLOOR)
    return centered.astype(np.float32)


def _check(batch: PolicyBatch, options: PolicyOptions) -> None:
    """Raises `ValueError` for options that cannot be computed."""
    _one_of("loss_type", options.loss_type)
    _one_of("importance_sampling", options.importance_sampling)
    if options.beta != 0 and batch.ref_logprobs is None:
        raise ValueError(
            f"no reference log-probabilities for beta={options.beta}; "
            "compute ref_logprobs of the batch, or set beta=0"
        )


def _one_of(name: str, value: str) -> None:
    """Raises `ValueError` unless `value` is a choice of that option."""
    fields.check(name, value, fields.hints(PolicyLossConfig)[name])


def _members(batch: PolicyBatch, options: PolicyOptions) -> Bool[Array, "B T G"]:
    """Returns which trained token belongs to which completion of its row."""
    ids = jnp.arange(1, options.num_sequences + 1)
    return (batch.sequence_ids[..., None] == ids) & batch.loss_mask[..., None]


def _sequence_sum(
    values: Float[Array, "B T"], members: Bool[Array, "B T G"]
) -> Float[Array, "B T"]:
    """Returns at each trained token the sum of `values` over its completion, and 0 elsewhere."""
    sums = jnp.sum(jnp.where(members, values[..., None], 0.0), axis=1, keepdims=True)
    return jnp.sum(jnp.where(members, sums, 0.0), axis=-1)


def _over_length(values: Float[Array, "B T"], members: Bool[Array, "B T G"]) -> Float[Array, "B T"]:
    """Returns `values` divided by the number of trained tokens of their completion."""
    return values / jnp.maximum(_sequence_sum(jnp.ones_like(values), members), 1.0)


def _num_sequences(members: Bool[Array, "B T G"]) -> Float[Array, ""]:
    """Returns the number of completions with a trained token."""
    return jnp.sum(members.any(axis=1)).astype(jnp.float32)


def _token_mean(values: Float[Array, "B T"], members: Bool[Array, "B T G"]) -> LossSum:
    """Returns the sum over trained tokens, and how many they are."""
    mask = members.any(axis=-1)
    return jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask).astype(jnp.float32)


def _sequence_mean(values: Float[Array, "B T"], members: Bool[Array, "B T G"]) -> LossSum:
    """Returns the sum of the completions' means over trained tokens, and how many they are."""
    return _token_mean(_over_length(values, members), members)[0], _num_sequences(members)


def _add_up(
    terms: Float[Array, "B T"], members: Bool[Array, "B T G"], options: PolicyOptions
) -> LossSum:
    """Returns the sum and the weight that the loss type asks for; see `policy_loss`."""
    if options.loss_type in ("grpo", "gspo"):
        return _sequence_mean(terms, members)
    total, num_tokens = _token_mean(terms, members)
    if options.loss_type == "dr_grpo":
        return total, _num_sequences(members) * options.max_new_tokens
    return total, num_tokens


def _policy_terms(
    logprobs: Float[Array, "B T"],
    old: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    members: Bool[Array, "B T G"],
    options: PolicyOptions,
) -> tuple[Float[Array, "B T"], dict[str, LossSum]]:
    """Returns the tokens' policy terms, and metrics of their ratios; see `policy_loss`."""
    per_sequence = options.loss_type == "gspo"
    log_ratio = logprobs - old
    if per_sequence:
        log_ratio = _sequence_sum(_over_length(log_ratio, members), members)
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
    bound = jnp.clip(ratio, 1 - options.epsilon_low, 1 + options.epsilon_high)
    if options.loss_type == "cispo":
        clipped = bound != ratio
        terms = -bound * advantages * logprobs
    else:
        clipped = bound * advantages < ratio * advantages
        # Two selections: the exponential that is not used may overflow, and 0 * inf is NaN.
        free = jnp.exp(jnp.where(clipped, 0.0, log_ratio))
        terms = -jnp.where(clipped, bound, free) * advantages
    mean = _sequence_mean if per_sequence else _token_mean
    return terms, {
        "policy/ratio_mean": mean(ratio, members),
        "policy/clip_frac": mean(clipped.astype(jnp.float32), members),
    }


def _importance_weights(
    log_weights: Float[Array, "B T"], members: Bool[Array, "B T G"], options: PolicyOptions
) -> tuple[Float[Array, "B T"], dict[str, LossSum]]:
    """Returns the tokens' importance weights, cut at the cap, and metrics of them.

    Args:
        log_weights: the trainer's less the engine's log-probabilities, constant for the gradient.
        members: which trained token belongs to which completion.
        options: the level and the cap.
    """
    per_sequence = options.importance_sampling == "sequence"
    mean = _sequence_mean if per_sequence else _token_mean
    raw = jnp.exp(_sequence_sum(log_weights, members) if per_sequence else log_weights)
    weights = jnp.minimum(raw, options.importance_sampling_cap)
    capped = (raw > options.importance_sampling_cap).astype(jnp.float32)
    return weights, {
        "rollout/importance_weight": mean(weights, members),
        "rollout/importance_capped_frac": mean(capped, members),
    }


def _k3(log_ratio: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns estimates of KL(p || q) in nats, from `log q - log p` of tokens sampled from p.

    Reference: Schulman 2020, "Approximating KL divergence", k3.
    """
    return jnp.expm1(log_ratio) - log_ratio
