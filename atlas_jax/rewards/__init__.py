"""What completions are worth: rules that compare answers, and judges."""

from atlas_jax.rewards.rim import RIMReward

__all__ = ["RIMReward"]
