"""Which parameters of a chat completion a model takes, told by what its endpoint refuses.

Endpoints that all call themselves compatible differ: some take no JSON schema, and reasoning models
want `max_completion_tokens` for `max_tokens` and no temperature but their own.
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
_SHOWN = 600  # characters of a refusal in which a parameter is looked for; behind them stands ours


class Dialect(NamedTuple):
    """What a model takes, as far as its endpoint has said."""

    num_formats_refused: int = 0
    """How many of the response formats, the strictest first."""
    room: str = "max_tokens"
    """The parameter for the most tokens of a reply."""
    takes_temperature: bool = True

    def easier_of(self, other: Dialect) -> Dialect:
        """Returns what asks for no more than either of two."""
        return Dialect(
            num_formats_refused=max(self.num_formats_refused, other.num_formats_refused),
            room=min(self.room, other.room),  # the later name comes first in the alphabet
            takes_temperature=self.takes_temperature and other.takes_temperature,
        )


_EVERYTHING = Dialect()


@dataclasses.dataclass
class Known:
    """What is known of a model."""

    latest: Dialect = _EVERYTHING
    """What refusals say that it takes."""
    taken: Dialect = _EVERYTHING
    """What it has taken."""


class Request(NamedTuple):
    """What a model is asked."""

    model: str
    messages: Sequence[Message]
    temperature: float
    max_tokens: int
    response_format: str
    """`json_schema`, `json_object`, `none`, or `auto`: the strictest that the model takes."""


def payload(request: Request, dialect: Dialect) -> dict[str, Any]:
    """Returns the body of a chat completion."""
    body: dict[str, Any] = {"model": request.model, "messages": list(request.messages)}
    body[dialect.room] = request.max_tokens
    if dialect.takes_temperature:
        body["temperature"] = request.temperature
    if wanted := _FORMATS[_format(request, dialect)]:
        body["response_format"] = wanted
    return body


def after(error: RefusedError, request: Request, dialect: Dialect) -> Dialect | None:
    """Returns what a model takes that has refused a request; None if that was for another reason.

    A dialect that follows from another one asks for less, so that there is always a last one.
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


def _format(request: Request, dialect: Dialect) -> str:
    wanted = request.response_format
    return list(_FORMATS)[dialect.num_formats_refused] if wanted == "auto" else wanted


def _named(body: str) -> tuple[str, str]:
    """Returns the parameter that a refusal names in its own field, "" if none, and its text."""
    try:
        value = json.loads(body)
        error = (value[0] if isinstance(value, list) else value)["error"]
        parameter = error.get("param") or ""
        text = str(error.get("message") or body)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        parameter = ""
        text = body
    return str(parameter).lower(), text[:_SHOWN].lower()
