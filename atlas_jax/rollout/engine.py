"""Interfaces of everything that generates text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from atlas_jax.rollout.sampling import Sampling
from atlas_jax.types import Completion, Metrics, Params


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


class ChatModel(NamedTuple):
    """A model that answers messages: its tokenizer, chat template and generation."""

    encode: Callable[[str], tuple[int, ...]]
    """A user's message -> the prompt under the model's chat template."""
    generate: Generate
    context: int
    """Tokens that a prompt and its completion may have together."""
    vocab_size: int
    """Tokens that the model knows; a tokenizer may have more."""


@runtime_checkable
class Backend(Protocol):
    """The place where a run generates: this process, or vLLM servers."""

    @property
    def student(self) -> ChatModel | None:
        """The frozen student; None under `protocol=direct`."""

    def publish(self, params: Params, version: int) -> ChatModel:
        """Returns the policy with these parameters; every process calls it together.

        Args:
            params: the trained parameters.
            version: the step after which they are those of the policy.

        Raises:
            DependencyError: if the weights reach no server.
        """

    def metrics(self) -> Metrics:
        """Returns the metrics of the last publication, once."""

    def close(self) -> None:
        """Gives up generation that is in flight."""
