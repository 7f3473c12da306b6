"""Words for the values of options: what a value may be, and why one is refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta


def refusal(name: str, value: Any, hint: Any) -> str:
    """Returns the sentence about an option whose value is not one of its type."""
    if get_origin(hint) is tuple and isinstance(value, tuple | list):
        item_hint = get_args(hint)[0]
        wrong = next(item for item in value if not _fits(item, item_hint))
        return f"{name}={value!r} holds {wrong!r}; each item {_must(wrong, item_hint)}"
    return f"{name}={value!r} {_must(value, hint)}"


def _fits(value: Any, hint: Any) -> bool:
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError:
        return False
    return True


def _must(value: Any, hint: Any) -> str:
    """Returns what a refused value must be, as the rest of a sentence."""
    if names := choices(hint):
        return f"must be one of {', '.join(names)}{nearest(str(value), names)}"
    base, meta = _parts(hint)
    rule = rule_text(meta) if _fits(value, base) or base is str else ""
    parts = (meta.extra or {}).get("parts", ()) if meta else ()
    wrong = [part for part in str(value).split(",") if part not in parts]
    hint_at = nearest(wrong[0], parts) if parts and wrong else ""
    return f"must be {rule or allowed(hint)}{_why(meta)}{hint_at}"


def _parts(hint: Any) -> tuple[Any, Meta | None]:
    """Returns the plain type of an annotation and its rule."""
    if get_origin(hint) is not Annotated:
        return hint, None
    base, *rules = get_args(hint)
    return base, next((rule for rule in rules if isinstance(rule, Meta)), None)


def choices(hint: Any) -> tuple[str, ...]:
    """Returns the names that an option may have as its value; () for numbers and free texts."""
    base, meta = _parts(hint)
    if get_origin(base) is Literal:
        return get_args(base)
    return tuple((meta.extra or {}).get("choices", ())) if meta else ()


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def allowed(hint: Any) -> str:
    """Returns the allowed values of an option as words, such as `a number above 0`."""
    if names := choices(hint):
        return f"one of {', '.join(names)}"
    base, meta = _parts(hint)
    if get_origin(base) is tuple:
        return f"a list, each item {allowed(get_args(base)[0])}"
    rule = rule_text(meta)
    if base is str:
        return rule or _KINDS[base]
    return " ".join(filter(None, (_KINDS[base], rule and _joined(rule))))


def rule_text(meta: Meta | None) -> str:
    """Returns the limits of a number as words, such as `at least 0 and below 1`."""
    if meta is None:
        return ""
    if rule := (meta.extra or {}).get("rule"):
        return str(rule)
    low = f"above {meta.gt}" if meta.gt is not None else ""
    if meta.ge is not None:
        low = f"at least {meta.ge}"
    high = f"below {meta.lt}" if meta.lt is not None else ""
    if meta.le is not None:
        high = f"at most {meta.le}"
    if low.startswith("at least") and not high:
        return f"{meta.ge} or more"
    return " and ".join(filter(None, (low, high)))


def _joined(rule: str) -> str:
    return rule if rule.startswith("above") else f"of {rule}"


def _why(meta: Meta | None) -> str:
    why = (meta.extra or {}).get("why", "") if meta else ""
    return f": {why}" if why else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean X?" for the name in `known` that is closest, or ""."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
