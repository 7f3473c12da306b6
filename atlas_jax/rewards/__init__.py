"""Rewards of completions: rules that compare answers, and judges."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atlas_jax.options.judges import Judge
    from atlas_jax.rewards.answers import is_correct
    from atlas_jax.rewards.gaming import find as find_gaming
    from atlas_jax.rewards.rim import RIMReward

__all__ = ["Judge", "RIMReward", "find_gaming", "is_correct"]

_PLACES = {
    "Judge": ("atlas_jax.options.judges", "Judge"),
    "RIMReward": ("atlas_jax.rewards.rim", "RIMReward"),
    "find_gaming": ("atlas_jax.rewards.gaming", "find"),
    "is_correct": ("atlas_jax.rewards.answers", "is_correct"),
}
"""Public name -> its module and its name there."""


def __getattr__(name: str) -> Any:
    """Imports a name when it is asked for, since judges need an HTTP client and rules do not."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, inside = _PLACES[name]
    return getattr(importlib.import_module(module), inside)
