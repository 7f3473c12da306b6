"""Options of GRPO's loss, which `losses` reads too."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from atlas_jax.options.fields import NonNegative, Positive, PositiveInt, choices_or_function


@dataclasses.dataclass(frozen=True)
class PolicyLossConfig:
    """The policy's loss and its corrections."""

    beta: NonNegative = 0.04
    """Weight of the KL divergence to the reference model; 0 keeps no reference."""
    loss_type: Annotated[
        str, choices_or_function("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo")
    ] = "grpo"
    """Loss of the policy, by its name in the literature, or a function of your own as in
    examples/custom_loss.py."""
    epsilon_low: Positive = 0.2
    """Distance below 1 at which the ratio of probabilities is clipped."""
    epsilon_high: Positive = 0.2
    """Distance above 1 at which the ratio of probabilities is clipped."""
    num_iterations: PositiveInt = 1
    """Number of updates on each batch of completions. One step makes all of them."""
    scale_rewards: Literal["none", "group", "batch"] = "group"
    """Standard deviation that advantages are divided by: that of the `group`, of the `batch`, or
    `none`."""
    importance_sampling: Literal["none", "token", "sequence"] = "token"
    """Correction between the probabilities that sampled and those that train, by token or by whole
    completion."""
    importance_sampling_cap: Positive = 2.0
    """Largest weight of that correction."""
