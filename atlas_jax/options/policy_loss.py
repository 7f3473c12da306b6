"""Options of GRPO's loss, which `losses` reads too."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from atlas_jax.options.fields import (
    NonNegative,
    Positive,
    PositiveInt,
    choices_or_function,
)


@dataclasses.dataclass(frozen=True)
class PolicyLossConfig:
    """The policy's loss and its corrections."""

    beta: NonNegative = 0.04
    """Weight of the KL divergence to the reference model; 0 keeps no reference."""
    kl_estimator: Literal["k3", "unbiased", "in_reward"] = "k3"
    """Place and gradient of that divergence: `k3` adds it to the loss as GRPO's paper does, with
    the gradient of KL(reference || policy); `unbiased` weighs it by the ratio of probabilities, so
    that the gradient is that of KL(policy || reference), as TRL does by default; `in_reward` takes
    the log-ratios of a token and those after it off its advantage."""
    loss_type: Annotated[
        str, choices_or_function("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "gspo_token", "cispo")
    ] = "grpo"
    """Loss of the policy, by its name in the literature, or a function of your own as in
    examples/custom_loss.py."""
    epsilon_low: Positive = 0.2
    """Distance below 1 at which the ratio of probabilities is clipped."""
    epsilon_high: Positive = 0.2
    """Distance above 1 at which the ratio of probabilities is clipped."""
    delta: NonNegative = 0.0
    """Largest ratio of probabilities of a token with a negative advantage (dual clip), above
    1 + `epsilon_high`; 0 sets no bound."""
    entropy_coef: NonNegative = 0.0
    """Weight of the policy's entropy, which is taken off the loss."""
    loss_divisor: Literal["trained", "all"] = "trained"
    """Completions that a mean over completions divides by: those with a trained token, or `all` of
    the step, so that cut ones and those without a score do not make the others count more."""
    num_iterations: PositiveInt = 1
    """Number of passes over each batch of completions. One step makes all updates of them."""
    steps_per_generation: PositiveInt = 1
    """Number of updates that a pass over the batch makes, each on an equal part of it."""
    scale_rewards: Literal["none", "group", "batch"] = "group"
    """Standard deviation that advantages are divided by: that of the `group`, of the `batch`, or
    `none`."""
    importance_sampling: Literal["none", "token", "sequence"] = "token"
    """Correction between the probabilities that sampled and those that train, by token or by whole
    completion."""
    importance_sampling_mode: Literal["truncate", "mask"] = "truncate"
    """Fate of a weight of that correction above the cap: `truncate` lowers it to the cap, `mask` to
    0, so that its token or completion does not train the policy."""
    importance_sampling_cap: Positive = 2.0
    """Largest weight of that correction."""

    @property
    def updates_per_step(self) -> int:
        """Number of updates on the completions of a step."""
        return self.num_iterations * self.steps_per_generation

    @property
    def updates_per_pass(self) -> int:
        """Number of equal parts of a step's rows, each of which makes an update of its own."""
        return self.steps_per_generation

    @property
    def idle(self) -> str:
        """Options that were set and cannot act, with the reason; empty if there are none.

        The one update of a batch has no earlier policy to differ from.
        """
        changed = [
            f"{name}={getattr(self, name)}"
            for name in ("epsilon_low", "epsilon_high", "delta")
            if getattr(self, name) != getattr(PolicyLossConfig, name)
        ]
        if self.loss_type in ("gspo", "gspo_token", "cispo"):
            changed.append(f"loss_type={self.loss_type}")
        if not changed or self.updates_per_step > 1 or ":" in self.loss_type:
            return ""
        return (
            f"{', '.join(changed)} cannot act: with num_iterations=1 and steps_per_generation=1 "
            "every ratio of probabilities is 1, so that nothing is clipped; raise one of the two"
        )

    def check_loss(self) -> None:
        """Checks options of the loss against each other.

        Raises:
            ValueError: names the options, their values and what to write instead.
        """
        if self.kl_estimator != "k3" and not self.beta:
            raise ValueError(
                f"kl_estimator={self.kl_estimator} without a reference; raise beta above 0"
            )
        if self.importance_sampling_mode != "truncate" and self.importance_sampling == "none":
            raise ValueError(
                f"importance_sampling_mode={self.importance_sampling_mode} with "
                "importance_sampling=none, which has no weights; use token or sequence"
            )
        if self.delta and (self.delta <= 1 + self.epsilon_high or self.loss_type == "cispo"):
            raise ValueError(
                f"delta={self.delta} with epsilon_high={self.epsilon_high} and loss_type="
                f"{self.loss_type}: it bounds what the clip leaves free, so that it must be above "
                "1 + epsilon_high, and cispo leaves no ratio free; raise it, or use 0"
            )
        if self.loss_divisor == "all" and self.loss_type in ("bnpo", "dapo", "cispo"):
            raise ValueError(
                f"loss_divisor=all with loss_type={self.loss_type}, which divides by its trained "
                "tokens; use trained, or the loss_type grpo, gspo, gspo_token or dr_grpo"
            )
        if self.entropy_coef and ":" in self.loss_type:
            raise ValueError(
                f"entropy_coef={self.entropy_coef} with loss_type={self.loss_type}, whose average "
                "is your own; use 0"
            )
