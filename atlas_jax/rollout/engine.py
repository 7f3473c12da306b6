"""What the teaching protocol asks of whatever generates text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from atlas_jax.rollout.sampling import Sampling
from atlas_jax.types import Completion


class Request(NamedTuple):
    """A prompt to continue."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    """Tokens that a completion may have, its stop token included."""
    seed: int
    """Root of the random numbers, below 2**32; sample g of the request uses stream g."""
    num_samples: int = 1


Generate = Callable[[Sequence[Request], Sampling], list[list[Completion]]]
"""Returns the completions of each request, in order."""


class Speaker(NamedTuple):
    """A model as the protocol sees it: its own tokenizer, chat template and generation."""

    encode: Callable[[str], tuple[int, ...]]
    """A user's message -> the prompt under the model's chat template."""
    generate: Generate
    context: int
    """Tokens that a prompt and its completion may have together."""
    vocab_size: int
    """Tokens that the model knows; a tokenizer may have more."""
