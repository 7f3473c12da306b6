"""Interfaces of everything that generates text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from atlas_jax import stopping
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.types import Completion, Message, Metrics, Params


class Request(NamedTuple):
    """A prompt to continue."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    """Tokens that a completion may have, its stop token included."""
    seed: int
    """Root of the random numbers, below 2**32; sample g of the request uses stream g."""
    num_samples: int = 1


def version_spans(versions: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Returns the version of each token as pairs of a version and its number of tokens."""
    return tuple((version, sum(1 for _ in group)) for version, group in itertools.groupby(versions))


Generate = Callable[[Sequence[Request], Sampling], list[list[Completion]]]
"""Returns the completions of each request, in order."""

Complete = Callable[[Request, int, Sampling], Coroutine[Any, Any, Completion]]
"""Returns sample g of a request, which is the same as in a batch."""


@runtime_checkable
class EncodeTurn(Protocol):
    """The prompt of a model's next turn."""

    def __call__(self, messages: Sequence[Message], ended_by: int | None = None) -> tuple[int, ...]:
        """Returns the tokens after the last answer of a conversation, with a generation prompt.

        Args:
            messages: the whole conversation; without an answer, all of it is the prompt.
            ended_by: the stop token that the model sampled at the end of that answer, which is then
                not repeated; None if it sampled none.
        """


def alone(waiting: bool) -> bool:
    """Returns `waiting`: this process generates without the others.

    Raises:
        StopRequestedError: if the run was asked to stop.
    """
    stopping.check()
    return waiting


class ChatModel(NamedTuple):
    """A model that answers messages: its tokenizer, chat template and generation."""

    encode: Callable[[str], tuple[int, ...]]
    """A user's message -> the prompt under the model's chat template."""
    generate: Generate
    context: int
    """Tokens that a prompt and its completion may have together."""
    vocab_size: int
    """Tokens that the model knows; a tokenizer may have more."""
    encode_turn: EncodeTurn
    """A conversation -> the prompt of the model's next turn in it."""
    goes_on: Callable[[bool], bool] = alone
    """Returns true if any process that must generate together with this one has requests. It is
    called before each call of `generate` whose number the processes do not know beforehand."""
    complete: Complete | None = None
    """Asks for one sample by itself, on any event loop; None where a batch is faster."""


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
