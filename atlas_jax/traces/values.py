"""Values of trace records: JSON that may be a text, and errors that name the field."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

T = TypeVar("T", int, float)

_ENCODED = (str, bytes)
_decode = msgspec.json.Decoder().decode


def decoded(value: Any) -> Any:
    """Returns the JSON that a column or a text holds, also where it was encoded twice.

    All else is returned as it is.
    """
    if not isinstance(value, _ENCODED):
        return value
    value = decoded_once(value)
    return decoded_once(value) if isinstance(value, str) else value


def decoded_once(value: str | bytes) -> Any:
    """Returns the JSON of a text or of a `jsonb` column; the text itself if it holds none.

    Such a column cannot hold NaN, which texts may and msgspec refuses. What else msgspec refuses,
    such as numbers beyond a float, is left to the standard decoder.

    Args:
        value: a text, or what PostgreSQL sends of `jsonb` in its binary format: one byte for the
            version of the format, and the JSON in UTF-8.
    """
    if isinstance(value, bytes):
        value = value[1:]
        try:
            return _decode(value)
        except (msgspec.DecodeError, ValueError, RecursionError):
            value = value.decode(errors="replace")
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def as_object(value: Any) -> dict[str, Any]:
    """Returns an object of its own; a list is keyed by position, another value by `raw`."""
    value = decoded(value)
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, list):
        return {str(i): item for i, item in enumerate(value)}
    return {} if value is None or value == "" else {"raw": value}


def as_list(value: Any, field: str) -> list[Any]:
    """Returns a list, which may be given as a text; none is an empty one.

    Raises:
        ValueError: if it is something else.
    """
    value = decoded(value)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"has {shown(value)} as {field}; it must be a list")
    return value


def as_text(value: Any) -> str:
    """Returns a text; what is none is written as JSON, and nothing as an empty text."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def as_number(value: Any, field: str, kind: Callable[[Any], T]) -> T:
    """Returns a number, which may be given as a text.

    Raises:
        ValueError: if it is no number, or not finite.
    """
    try:
        number = kind(value)
        if math.isfinite(number):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"has {shown(value)} as {field}; it must be a finite number")


def as_time(value: Any, field: str) -> datetime.datetime | None:
    """Returns a point in time, in UTC; a text without a zone means UTC, an empty one none.

    Raises:
        ValueError: if it is no ISO 8601 text.
    """
    if value is None or value == "":
        return None
    try:
        when = datetime.datetime.fromisoformat(value)
        if when.tzinfo is None:
            return when.replace(tzinfo=datetime.UTC)
        return when.astimezone(datetime.UTC)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"has {shown(value)} as {field}; it must be a time such as 2025-12-31T23:59:59+00:00"
        ) from None


def shown(value: Any) -> str:
    """Returns a value as errors show it: in short, and without what lists and objects hold."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return f"a JSON {'object' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = str(value)[:40]
    return f"the {type(value).__name__} {text!r}"
