"""Rewards of completions: rules that compare answers, and judges."""

from atlas_jax.rewards.answers import is_correct
from atlas_jax.rewards.gaming import find as find_gaming
from atlas_jax.rewards.rim import RIMReward

__all__ = ["RIMReward", "find_gaming", "is_correct"]
