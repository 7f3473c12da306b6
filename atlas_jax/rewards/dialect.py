"""Parameters of a chat completion that a model accepts, learned from its endpoint's refusals.

Compatible endpoints differ: some accept no JSON schema, and reasoning models require
`max_completion_tokens` instead of `max_tokens` and their default temperature.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from atlas_jax.llm_client import RefusedError
from atlas_jax.rewards.judges import SCHEMA
from atlas_jax.types import Message

_FORMATS: dict[str, dict[str, Any] | None] = {
    "json_schema": {
        "type": "json_schema",
        "json_schema": {"name": "judgement", "schema": SCHEMA},
    },
    "json_object": {"type": "json_object"},
    "none": None,
}
_REFUSALS = (400, 404, 415, 422, 501)
_FORMAT_WORDS = re.compile("response_format|json_schema|json_object|schema|structured|guided")
_TOO_MUCH = re.compile("too large|at most|exceed|maximum|greater than|less than|context length")
_SHOWN = 600  # characters of a refusal that are searched; later ones may quote our request


class Dialect(NamedTuple):
    """Parameters that a model accepts, as far as its endpoint has shown."""

    num_formats_refused: int = 0
    """Number of response formats that were refused, counted from the strictest."""
    room: str = "max_tokens"
    """Name of the parameter for the largest number of tokens of a reply."""
    takes_temperature: bool = True

    def easier_of(self, other: Dialect) -> Dialect:
        """Returns the dialect that uses only parameters of both."""
        return Dialect(
            num_formats_refused=max(self.num_formats_refused, other.num_formats_refused),
            room=min(
                self.room, other.room
            ),  # of the two names, the newer one comes first in the alphabet
            takes_temperature=self.takes_temperature and other.takes_temperature,
        )


_EVERYTHING = Dialect()


@dataclasses.dataclass
class KnownDialect:
    """Knowledge of a model's dialect."""

    latest: Dialect = _EVERYTHING
    """Dialect according to the refusals."""
    taken: Dialect = _EVERYTHING
    """Dialect of requests that it has accepted."""


class ChatRequest(NamedTuple):
    """A chat completion to request from a model."""

    model: str
    messages: Sequence[Message]
    temperature: float
    max_tokens: int
    response_format: str
    """`json_schema`, `json_object`, `none`, or `auto`: the strictest one that the model accepts."""


def payload(request: ChatRequest, dialect: Dialect) -> dict[str, Any]:
    """Returns the body of a chat completion."""
    body: dict[str, Any] = {"model": request.model, "messages": list(request.messages)}
    body[dialect.room] = request.max_tokens
    if dialect.takes_temperature:
        body["temperature"] = request.temperature
    if wanted := _FORMATS[_format(request, dialect)]:
        body["response_format"] = wanted
    return body


def after(error: RefusedError, request: ChatRequest, dialect: Dialect) -> Dialect | None:
    """Returns the dialect of a model after its refusal; None if the refusal has another reason.

    Each dialect uses fewer parameters than the one before, so the sequence ends.
    """
    if error.status not in _REFUSALS:
        return None
    parameter, text = _named(error.body)
    if "temperature" in (parameter or text) and dialect.takes_temperature:
        return dialect._replace(takes_temperature=False)
    is_room = "max_tokens" in (parameter or text) and not _TOO_MUCH.search(text)
    if (is_room or "max_completion_tokens" in text) and dialect.room == "max_tokens":
        return dialect._replace(room="max_completion_tokens")
    can_ease = request.response_format == "auto" and _format(request, dialect) != "none"
    if can_ease and _FORMAT_WORDS.search(f"{parameter} {text}"):
        return dialect._replace(num_formats_refused=dialect.num_formats_refused + 1)
    return None


def _format(request: ChatRequest, dialect: Dialect) -> str:
    wanted = request.response_format
    return list(_FORMATS)[dialect.num_formats_refused] if wanted == "auto" else wanted


def _named(body: str) -> tuple[str, str]:
    """Returns the parameter that a refusal names in a field ("" if none), and its text."""
    try:
        value = json.loads(body)
        error = (value[0] if isinstance(value, list) else value)["error"]
        parameter = error.get("param") or ""
        text = str(error.get("message") or body)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        parameter = ""
        text = body
    return str(parameter).lower(), text[:_SHOWN].lower()
