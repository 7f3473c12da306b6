"""Rewards of completions: rules that compare answers, and judges."""

from typing import TYPE_CHECKING, Any

from atlas_jax.rewards.answers import is_correct
from atlas_jax.rewards.gaming import find as find_gaming

if TYPE_CHECKING:
    from atlas_jax.options.judges import Judge
    from atlas_jax.rewards.rim import RIMReward

__all__ = ["Judge", "RIMReward", "find_gaming", "is_correct"]


def __getattr__(name: str) -> Any:
    """Imports the judges when their name is asked for: they need an HTTP client, rules do not."""
    if name == "Judge":
        from atlas_jax.options.judges import Judge

        return Judge
    if name != "RIMReward":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from atlas_jax.rewards.rim import RIMReward

    return RIMReward
