"""Losses: pure functions of arrays that return `(sum, weight)`.

The sum over all microbatches and devices is divided once by the sum of the weights. Microbatching,
packing and data parallelism therefore do not change a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from atlas_jax.options import fields
from atlas_jax.options.policy_loss import PolicyLossConfig
from atlas_jax.types import LossSum, PolicyBatch

_STD_FLOOR = 1e-4
_BY_COMPLETION = ("grpo", "gspo", "gspo_token")
"""Losses that average over completions."""
_OF_COMPLETION = ("gspo", "gspo_token")
"""Losses with one ratio for a completion."""


class PolicyOptions(NamedTuple):
    """Options of `policy_loss`, static under `jax.jit`."""

    loss_type: str  # grpo | bnpo | dr_grpo | dapo | gspo | gspo_token | cispo | module:function
    epsilon_low: float  # ratios are clipped to [1 - epsilon_low, 1 + epsilon_high]
    epsilon_high: float
    delta: float  # upper bound of ratios where the advantage is negative; 0 is none
    beta: float  # weight of the KL to the reference; 0 needs no reference
    kl_estimator: str  # k3 | unbiased | in_reward
    entropy_coef: float  # weight of the entropy in `with_entropy`
    importance_sampling: str  # none | token | sequence: the correction of engine against trainer
    importance_sampling_mode: str  # truncate | mask: fate of importance weights above the cap
    importance_sampling_cap: float  # upper bound of importance weights
    loss_divisor: str  # trained | all: the completions that a mean over completions counts
    max_new_tokens: int  # the constant length by which dr_grpo divides
    num_sequences: int  # largest number of completions in a row

    @classmethod
    def of(cls, config: PolicyLossConfig, max_new_tokens: int, num_sequences: int) -> PolicyOptions:
        """Returns the options of a run."""
        named = {name: getattr(config, name) for name in cls._fields if hasattr(config, name)}
        lengths = {"max_new_tokens": max_new_tokens, "num_sequences": num_sequences}
        return cls(**named | lengths)


PolicyLoss = Callable[
    [Float[Array, "B T"], PolicyBatch, PolicyOptions], tuple[LossSum, dict[str, LossSum]]
]
"""Log-probabilities, batch and options to the loss sum with its weight, and metrics."""


def resolve(loss_type: str) -> PolicyLoss:
    """Returns the loss that `loss_type` names: `policy_loss`, or a function of the user's own.

    A user's function gets log-probabilities that are 0 wherever nothing is trained. Its metrics
    are joined by `policy/kl` and `rollout/mismatch_kl`.

    Raises:
        ValueError: says why the function cannot be imported.
    """
    if not fields.is_reference(loss_type):
        return policy_loss
    from atlas_jax import sockets  # a function of the user's own

    function = sockets.resolve(loss_type, "loss_type")

    def loss(
        logprobs: Float[Array, "B T"], batch: PolicyBatch, options: PolicyOptions
    ) -> tuple[LossSum, dict[str, LossSum]]:
        members = _members(batch, options)
        logprobs = jnp.where(members.any(axis=-1), logprobs, 0.0)
        total, values = _checked(loss_type, function(logprobs, batch, options))
        return total, _distances(logprobs, batch, members) | values

    return loss


def _checked(loss_type: str, result: Any) -> tuple[LossSum, dict[str, LossSum]]:
    """Returns what a user's function returned, as float32 scalars.

    Raises:
        ValueError: if it is no sum with its weight, and metrics.
    """
    try:
        (total, weight), values = result
        pairs = {name: (value, count) for name, (value, count) in values.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"loss_type={loss_type} returns a {type(result).__name__} that is not ((sum, weight), "
            "{name: (sum, weight)})"
        ) from error
    arrays = {"the loss": (total, weight)} | pairs
    for name, pair in arrays.items():
        shapes = [jnp.shape(value) for value in pair]
        if any(shapes):
            raise ValueError(
                f"loss_type={loss_type}: sum and weight of {name} have the shapes {shapes[0]} and "
                f"{shapes[1]}; add them up, such as with jnp.sum"
            )
    total, weight = (jnp.asarray(value, jnp.float32) for value in (total, weight))
    return (total, weight), {
        name: (jnp.asarray(value, jnp.float32), jnp.asarray(count, jnp.float32))
        for name, (value, count) in pairs.items()
    }


def policy_loss(
    logprobs: Float[Array, "B T"], batch: PolicyBatch, options: PolicyOptions
) -> tuple[LossSum, dict[str, LossSum]]:
    """Returns the loss sum of the GRPO family with its weight, and its metrics.

    A token's term is its policy term (`_policy_terms`), times the importance weight that corrects
    for the engine (`_importance_weights`), plus `beta` times the KL to the reference (`_kl_terms`,
    `_less_kl`). The terms are added up as the loss type says (`_add_up`). The docstrings of these
    functions have the formulas, with r for the ratio `exp(logprobs - old)` and A for the advantage.

    Metrics are each `(sum, weight)`. `loss/policy` and `loss/kl` (without `beta`) are averaged as
    the loss is; with `kl_estimator=in_reward` the KL is part of `loss/policy`. `policy/kl` and
    `rollout/mismatch_kl`, the k3 estimate of KL(rollout || trainer), are means over tokens.
    `policy/ratio_mean` and `policy/clip_frac` are means over tokens, or over completions for gspo
    and gspo_token. A clip is counted where it removes the gradient; for cispo, where the ratio is
    out of bounds. `rollout/importance_weight` and `rollout/importance_capped_frac` are means over
    tokens or completions, as `importance_sampling` says, and are absent if it is none. Both KL to
    the reference are absent without `batch.ref_logprobs`.

    A completion may hold tokens of several weights. The engine reports each token's
    log-probability under the weights that wrote it, so `exp(old - rollout)` is the ratio of the
    trained policy to those very weights. `rollout/fresh_mismatch_kl`, which is absent without
    `batch.version_lags`, is the mismatch over tokens that the trained weights themselves wrote.

    Args:
        logprobs: log-probabilities of the policy in training, in nats, at the sampling temperature,
            aligned with `batch.tokens`. Values outside `batch.loss_mask` are ignored, NaN included.
        batch: the batch, whose trained tokens have `sequence_ids` of 1 to `options.num_sequences`.
        options: the loss.

    Raises:
        ValueError: if an option has no such value, or `beta` needs reference log-probabilities and
            the batch has none.
    """
    _check(batch, options)
    members = _members(batch, options)
    # A selection, not a product with the mask: it keeps 0 * inf = NaN of untrained tokens out of
    # the backward pass too.
    logprobs = jnp.where(members.any(axis=-1), logprobs, 0.0)
    old = jax.lax.stop_gradient(logprobs if batch.old_logprobs is None else batch.old_logprobs)
    advantages = batch.advantages
    kl_in_reward = options.kl_estimator == "in_reward"
    if kl_in_reward and batch.ref_logprobs is not None:
        advantages = _less_kl(advantages, old - batch.ref_logprobs, members, options)

    terms, metrics = _policy_terms(logprobs, old, advantages, members, options)
    if options.importance_sampling != "none":
        weights, found = _importance_weights(old - batch.rollout_logprobs, members, options)
        terms = weights * terms
        metrics |= found
    total, weight = _add_up(terms, members, options)
    metrics["loss/policy"] = total, weight
    metrics |= _distances(logprobs, batch, members)
    if batch.ref_logprobs is not None and not kl_in_reward:
        # Measured without `beta` too, so that a run without a penalty still shows its drift.
        kl = _kl_terms(logprobs, old, batch.ref_logprobs, options)
        metrics["loss/kl"] = _add_up(kl, members, options)
        if options.beta != 0:
            total += options.beta * metrics["loss/kl"][0]
    return (total, weight), metrics


def with_entropy(
    loss: LossSum, entropy: Float[Array, "B T"], batch: PolicyBatch, options: PolicyOptions
) -> LossSum:
    """Returns a loss of `policy_loss` less `entropy_coef` times the entropy, averaged alike.

    Args:
        loss: the sum and the weight of the batch.
        entropy: entropy of the distribution that each token is drawn from, in nats, with gradient.
        batch: the batch of the loss.
        options: the loss.

    Reference: Mnih et al. 2016, arXiv:1602.01783, section 4.
    """
    total, weight = loss
    bonus, _ = _add_up(entropy, _members(batch, options), options)
    return total - options.entropy_coef * bonus, weight


def group_advantages(
    rewards: Float[np.ndarray, "N G"], scale_rewards: str
) -> Float[np.ndarray, "N G"]:
    """Returns the advantage of each member of each group, in float32.

    It is the reward less the group's mean, over a standard deviation (ddof 1) plus a small floor.
    A member without a score has the advantage 0 and does not affect the others. A group with fewer
    than two scored members, or with equal rewards, has exactly 0 everywhere.

    Args:
        rewards: rewards of N groups of G members; NaN for a member without a score.
        scale_rewards: source of the standard deviation: `none` (do not divide), `group`, or `batch`
            (all scored rewards given).

    Raises:
        ValueError: if a reward is infinite, or `scale_rewards` has no such value.

    Reference:
        Shao et al. 2024, arXiv:2402.03300, section 4.1.2. `none`: Liu et al. 2025,
        arXiv:2503.20783. `batch`: Liu et al. 2025, arXiv:2508.08221.
    """
    _one_of("scale_rewards", scale_rewards)
    rewards = rewards.astype(np.float64)
    # Infinity less a mean is NaN, which would reach every parameter.
    infinite = np.argwhere(np.isinf(rewards))
    if infinite.size:
        group, member = infinite[0]
        raise ValueError(
            f"the reward of member {member} of group {group} is {rewards[group, member]}; "
            "use a finite number, or NaN if it could not be scored"
        )
    scored = ~np.isnan(rewards)
    count = scored.sum(axis=1, keepdims=True)
    # Relative to the lowest reward, so that the mean of equal rewards has no rounding error and
    # their advantages are exactly 0.
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
    for name in (
        "loss_type",
        "importance_sampling",
        "importance_sampling_mode",
        "kl_estimator",
        "loss_divisor",
    ):
        _one_of(name, getattr(options, name))
    if options.beta != 0 and batch.ref_logprobs is None:
        raise ValueError(
            f"no reference log-probabilities for beta={options.beta}; "
            "compute ref_logprobs of the batch, or set beta=0"
        )


def _one_of(name: str, value: str) -> None:
    """Raises `ValueError` unless `value` is a choice of that option."""
    fields.check(name, value, fields.hints(PolicyLossConfig)[name])


def _members(batch: PolicyBatch, options: PolicyOptions) -> Bool[Array, "B T G"]:
    """Returns a one-hot: entry `[b, t, g]` is true for a trained token of completion g + 1."""
    ids = jnp.arange(1, options.num_sequences + 1)
    return (batch.sequence_ids[..., None] == ids) & batch.loss_mask[..., None]


def _sequence_sum(
    values: Float[Array, "B T"], members: Bool[Array, "B T G"]
) -> Float[Array, "B T"]:
    """Returns at each trained token the sum of `values` over its completion, and 0 elsewhere."""
    sums = jnp.sum(jnp.where(members, values[..., None], 0.0), axis=1, keepdims=True)
    return jnp.sum(jnp.where(members, sums, 0.0), axis=-1)


def _following_sum(
    values: Float[Array, "B T"], members: Bool[Array, "B T G"]
) -> Float[Array, "B T"]:
    """Returns at each trained token the sum of `values` from it to the end of its completion."""
    each = jnp.where(members, values[..., None], 0.0)
    return jnp.sum(jnp.where(members, jax.lax.cumsum(each, 1, reverse=True), 0.0), axis=-1)


def _over_length(values: Float[Array, "B T"], members: Bool[Array, "B T G"]) -> Float[Array, "B T"]:
    """Returns `values` divided by the number of trained tokens of their completion."""
    return values / jnp.maximum(_sequence_sum(jnp.ones_like(values), members), 1.0)


def _num_sequences(members: Bool[Array, "B T G"]) -> Float[Array, ""]:
    """Returns the number of completions with a trained token."""
    return jnp.sum(members.any(axis=1)).astype(jnp.float32)


def _token_sum(values: Float[Array, "B T"], members: Bool[Array, "B T G"]) -> LossSum:
    """Returns the sum over trained tokens, and their number."""
    mask = members.any(axis=-1)
    return jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask).astype(jnp.float32)


def _sequence_mean_sum(values: Float[Array, "B T"], members: Bool[Array, "B T G"]) -> LossSum:
    """Returns the sum of the completions' means over trained tokens, and their number."""
    return _token_sum(_over_length(values, members), members)[0], _num_sequences(members)


def _add_up(
    terms: Float[Array, "B T"], members: Bool[Array, "B T G"], options: PolicyOptions
) -> LossSum:
    """Returns the loss sum and the weight of the loss type.

    - grpo, gspo, gspo_token: the means over each completion's trained tokens; the weight is the
      number of completions.
    - bnpo, dapo, cispo: all trained tokens; the weight is their number. bnpo divides by the tokens
      of the batch and dapo by those of the group. Both are the same here, because all microbatches
      share one weight.
    - dr_grpo: all trained tokens; the weight is the number of completions times `max_new_tokens`.
      The paper's advantages are not divided by a standard deviation.

    The completions that count are those with a trained token (`loss_divisor` trained), or all, as
    in the papers, whose 1/G does not depend on what was cut or could not be scored.

    Reference: as for `_policy_terms`. dr_grpo: section 3.
    """
    # Each row has all of its completions, also those of which nothing trains.
    every = jnp.float32(members.shape[0] * members.shape[2])
    completions = every if options.loss_divisor == "all" else _num_sequences(members)
    if options.loss_type in _BY_COMPLETION:
        return _token_sum(_over_length(terms, members), members)[0], completions
    total, num_tokens = _token_sum(terms, members)
    if options.loss_type == "dr_grpo":
        return total, completions * options.max_new_tokens
    return total, num_tokens


def _kl_terms(
    logprobs: Float[Array, "B T"],
    old: Float[Array, "B T"],
    ref: Float[Array, "B T"],
    options: PolicyOptions,
) -> Float[Array, "B T"]:
    """Returns the tokens' KL terms, of which `beta` times each is added to the loss.

    With `d = ref - logprobs`, `k3 = exp(d) - d - 1` and tokens that the policy sampled,

    - k3: the derivative with respect to `logprobs` is `1 - exp(d)`. The mean of
      `(1 - ref / pi) grad log pi` over `pi` is `-sum ref grad log pi`. This is the gradient of
      KL(ref || pi), though the value of `k3` estimates KL(pi || ref).
    - unbiased: `r k3`, whose derivative is `r k3 + r (1 - exp(d)) = -r d`. The mean of
      `(log pi - log ref) grad log pi` over `pi` is the gradient of KL(pi || ref). The ratio `r` is
      that of the token, so this holds also for tokens of the policy before the update.

    Near the reference `exp(d) - 1` is `d` and both agree. Where the policy has left the reference,
    `k3` pulls without bound at tokens that the reference prefers, and `unbiased` by the logarithm.

    Reference: Schulman 2020, "Approximating KL divergence". k3: Shao et al. 2024,
    arXiv:2402.03300, eq. 4. unbiased: DeepSeek-AI 2025, arXiv:2512.02556, eq. 7; the default of TRL
    1.16.
    """
    kl = _k3(ref - logprobs)
    return kl * jnp.exp(logprobs - old) if options.kl_estimator == "unbiased" else kl


def _less_kl(
    advantages: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"],
    members: Bool[Array, "B T G"],
    options: PolicyOptions,
) -> Float[Array, "B T"]:
    """Returns the advantages with a KL penalty in the reward (`kl_estimator=in_reward`).

    Each token's reward is `-beta (old - ref)`, unscaled and without a baseline, and its advantage
    has those of the token and all after it. Where `r = 1` the derivative of the loss with respect
    to a token's log-probability is `beta` times their sum: that of `unbiased` for the token itself,
    plus the divergence of what it leads to. Its mean is the gradient of KL(pi || ref) of whole
    completions. It is clipped and weighted as the policy term is.

    Args:
        advantages: of the tokens.
        log_ratio: `old - ref`, without gradient.
        members: the completion of each trained token, from `_members`.
        options: `beta`.

    Reference: Ouyang et al. 2022, arXiv:2203.02155, eq. 2, by token.
    """
    return advantages - options.beta * _following_sum(log_ratio, members)


def _distances(
    logprobs: Float[Array, "B T"], batch: PolicyBatch, members: Bool[Array, "B T G"]
) -> dict[str, LossSum]:
    """Returns the policy's distances to what sampled and to the reference; see `policy_loss`."""
    old = jax.lax.stop_gradient(logprobs if batch.old_logprobs is None else batch.old_logprobs)
    mismatch = _k3(old - batch.rollout_logprobs)
    found = {"rollout/mismatch_kl": _token_sum(mismatch, members)}
    if batch.version_lags is not None:
        fresh = members & (batch.version_lags == 0)[..., None]
        found["rollout/fresh_mismatch_kl"] = _token_sum(mismatch, fresh)
    if batch.ref_logprobs is not None:
        found["policy/kl"] = _token_sum(_k3(batch.ref_logprobs - logprobs), members)
    return found


def _policy_terms(
    logprobs: Float[Array, "B T"],
    old: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    members: Bool[Array, "B T G"],
    options: PolicyOptions,
) -> tuple[Float[Array, "B T"], dict[str, LossSum]]:
    """Returns the tokens' policy terms, and metrics of their ratios.

    With the ratio `r = exp(logprobs - old)`, the advantage `A` and `clip` to the bounds of
    `options`, a token's term is

    - grpo, bnpo, dr_grpo, dapo: `-min(r A, clip(r) A)`
    - gspo: the same, with `s = exp(mean_t (logprobs - old))` of the whole completion for `r`
    - gspo_token: the value of gspo, with the gradient of
      `s exp(logprobs - stop_gradient(logprobs))` for that of `s`. It equals gspo where all tokens
      of a completion have one advantage. Where turns have rewards, each moves by its own.
    - cispo: `-stop_gradient(clip(r)) A logprobs`. The paper has no lower bound, which an
      `epsilon_low` of at least 1 gives.

    `delta` bounds it where `A` is negative: `-max(min(r A, clip(r) A), delta A)`. A token whose
    probability has grown then cannot outweigh the batch.

    Reference:
        grpo: Shao et al. 2024, arXiv:2402.03300, eq. 3. dr_grpo: Liu et al. 2025, arXiv:2503.20783.
        dapo: Yu et al. 2025, arXiv:2503.14476, eq. 8. gspo and gspo_token: Zheng et al. 2025,
        arXiv:2507.18071, eq. 5-7 and 13-14. cispo: MiniMax 2025, arXiv:2506.13585, eq. 4-5. bnpo:
        `loss_type="bnpo"` of TRL. delta: Ye et al. 2020, arXiv:1912.09729, eq. 5, where it is c.
    """
    per_sequence = options.loss_type in _OF_COMPLETION
    log_ratio = logprobs - old
    if per_sequence:
        log_ratio = _sequence_sum(_over_length(log_ratio, members), members)
    if options.loss_type == "gspo_token":
        log_ratio = jax.lax.stop_gradient(log_ratio - logprobs) + logprobs
    # Gradients go through `free` or `logprobs` alone, which the selections below keep finite.
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
    bound = jnp.clip(ratio, 1 - options.epsilon_low, 1 + options.epsilon_high)
    if options.loss_type == "cispo":
        clipped = bound != ratio
        terms = -bound * advantages * logprobs
    else:
        clipped = bound * advantages < ratio * advantages
        if options.delta:
            outweighs = (advantages < 0) & (ratio > options.delta)
            bound = jnp.where(outweighs, options.delta, bound)
            clipped |= outweighs
        # Selections before and after the exponential: unused entries may overflow, and the gradient
        # through an overflow is 0 * inf = NaN.
        free = jnp.exp(jnp.where(clipped, 0.0, log_ratio))
        # The minimum of ratio * advantage and bound * advantage, by the selection above.
        terms = -jnp.where(clipped, bound, free) * advantages
    mean = _sequence_mean_sum if per_sequence else _token_sum
    return terms, {
        "policy/ratio_mean": mean(ratio, members),
        "policy/clip_frac": mean(clipped.astype(jnp.float32), members),
    }


def _importance_weights(
    log_weights: Float[Array, "B T"], members: Bool[Array, "B T G"], options: PolicyOptions
) -> tuple[Float[Array, "B T"], dict[str, LossSum]]:
    """Returns the tokens' importance weights, and metrics of them.

    A weight is `exp(old - rollout)` of the token, or of the summed difference of its completion. It
    corrects for the engine, whose numbers differ from the trainer's for equal weights. Above the
    cap it becomes the cap (`truncate`) or 0 (`mask`).

    Args:
        log_weights: the trainer's less the engine's log-probabilities, without gradient.
        members: the completion of each trained token, from `_members`.
        options: the level, the mode and the cap.

    Reference: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training". `mask`: `vllm_importance_sampling_mode` of TRL.
    """
    per_sequence = options.importance_sampling == "sequence"
    mean = _sequence_mean_sum if per_sequence else _token_sum
    # The cap keeps one unlikely token from outweighing the rest of the batch.
    raw = jnp.exp(_sequence_sum(log_weights, members) if per_sequence else log_weights)
    capped = raw > options.importance_sampling_cap
    limit = 0.0 if options.importance_sampling_mode == "mask" else options.importance_sampling_cap
    weights = jnp.where(capped, limit, raw)
    return weights, {
        "rollout/importance_weight": mean(weights, members),
        "rollout/importance_capped_frac": mean(capped.astype(jnp.float32), members),
    }


def _k3(log_ratio: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns estimates of KL(p || q) in nats, from `log q - log p` of tokens sampled from p.

    Reference: Schulman 2020, "Approximating KL divergence", k3.
    """
    return jnp.expm1(log_ratio) - log_ratio
