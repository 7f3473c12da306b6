"""Chat models that say what a test wrote down, in the place of an engine."""

from __future__ import annotations

from collections.abc import Callable

from atlas_jax.rollout.engine import ChatModel, Request
from atlas_jax.rollout.teaching import Limits, TeachingProtocol, Templates
from atlas_jax.types import Completion, Question

STOP = 0


def completion(text: str, num_tokens: int = 2, finish: str = "stop", prompt="p") -> Completion:
    """Returns a completion that counts `num_tokens`."""
    zeros = (0.0,) * num_tokens
    return Completion((1,) * len(prompt), (5,) * num_tokens, zeros, zeros, finish, text, 0)


def encode_turn(messages, ended_by=None) -> tuple[int, ...]:
    """Returns the tokens after the last answer: `|text`, with another bar before the next turn."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    return tuple(map(ord, "".join(f"|{m['content']}" for m in messages[last + 1 :]) + "|"))


class Script:
    """A model of one token a character, which answers as `say(prompt, member)` does."""

    def __init__(self, say: Callable[[str, int], str], context: int = 1000, version: int = 0):
        self._say = say
        self._context = context
        self._version = version
        self.calls: list[list[Request]] = []

    @property
    def requests(self) -> list[Request]:
        """All that was asked, call after call."""
        return [request for call in self.calls for request in call]

    @property
    def prompts(self) -> list[str]:
        """What was asked, as text."""
        return ["".join(map(chr, request.prompt_ids)) for request in self.requests]

    @property
    def model(self) -> ChatModel:
        """The script as the protocol sees a model."""
        return ChatModel(
            lambda text: tuple(map(ord, text)),
            self._generate,
            self._context,
            0x110000,
            encode_turn,
        )

    def _generate(self, requests, sampling):
        self.calls.append(list(requests))
        return [[self._complete(r, g) for g in range(r.num_samples)] for r in requests]

    def _complete(self, request: Request, member: int) -> Completion:
        text = self._say("".join(map(chr, request.prompt_ids)), member)
        tokens = (*map(ord, text), STOP)[: request.max_tokens]
        finish = "stop" if tokens[-1] == STOP else "length"
        zeros = (-1.0,) * len(tokens)
        text = text[: request.max_tokens]
        return Completion(request.prompt_ids, tokens, zeros, zeros, finish, text, self._version)


TEMPLATES = Templates(
    baseline="alone {question}",
    diagnostic="probe {question}",
    teacher="teach {question} {approach}",
    with_teaching="with {teaching}: {question}",
    direct="direct {question}",
)


def protocol(missing: str = "none", size: int = 3, **limits) -> TeachingProtocol:
    """Returns a protocol with room for short texts."""
    lengths = {"policy": 60, "probe": 20, "answer": 30, "prompt": 100} | limits
    return TeachingProtocol(TEMPLATES, Limits(**lengths), size, missing)


def questions(count: int) -> list[Question]:
    """Returns the questions q0, q1, ... with the truths 0, 1, ..."""
    return [Question(f"id{i}", f"q{i}", str(i), {}) for i in range(count)]
