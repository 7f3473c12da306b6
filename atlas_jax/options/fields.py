"""Types of options: the allowed values of each, as checks, errors and documentation use them.

An option is a dataclass field with one of these types, or with a `Literal` of its choices; the
string after it is its meaning. The checks themselves are msgspec's. Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

FUNCTION = r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*"
"""Pattern of a function of the user's own, `package.module:function`."""


@dataclasses.dataclass(frozen=True)
class Words:
    """Other words that users write for the values of an option."""

    values: tuple[tuple[str, str], ...]
    """Pairs of a word in lower case and the value that it stands for."""


@dataclasses.dataclass(frozen=True)
class Moved:
    """An option's former place; its values go to the option at `to`."""

    to: str
    """The whole name of the option, such as `teaching.lesson_template`."""


class _Emptied:
    """A text that `none` and `null` empty although its default is not empty."""


Positive = Annotated[float, Meta(gt=0)]
PositiveInt = Annotated[int, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
PositiveShare = Annotated[float, Meta(gt=0, le=1)]
OptionalPath = Annotated[str, _Emptied()]
JsonObject = Annotated[str, Meta(extra={"rule": "a JSON object, or empty"})]


def choices_or_function(*names: str) -> Meta:
    """Returns the rule for one of `names`, or a function as `package.module:function`."""
    return Meta(
        pattern=rf"^(?:{'|'.join(map(re.escape, names))}|{FUNCTION})$",
        extra={"choices": (*names, "package.module:function")},
    )


def function_reference() -> Meta:
    """Returns the rule for an object of the user's own as `package.module:NAME`."""
    return Meta(pattern=f"^{FUNCTION}$", extra={"rule": "package.module:NAME"})


def some_of(*names: str) -> Meta:
    """Returns the rule for `none`, or some of `names` with commas between them."""
    one = f"(?:{'|'.join(map(re.escape, names))})"
    return Meta(
        pattern=rf"^(?:none|{one}(?:,{one})*)$",
        extra={"parts": names, "rule": f"none, or some of {', '.join(names)} with commas"},
    )


def hints(schema: Any) -> dict[str, Any]:
    """Returns the annotations of a dataclass by field, with their rules."""
    return _hints(schema)


@functools.cache
def _hints(schema: Any) -> dict[str, Any]:
    found = get_type_hints(schema, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(schema)}


def moved_to(hint: Any) -> str:
    """Returns the present name of an option that a former name's annotation gives, or ""."""
    return next((rule.to for rule in get_args(hint) if isinstance(rule, Moved)), "")


def moved(schema: type[Any], prefix: str = "") -> dict[str, str]:
    """Returns `{former name: present name}` of the options of a schema."""
    names: dict[str, str] = {}
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.default):
            names |= moved(type(field.default), f"{prefix}{field.name}.")
        elif present := moved_to(hints(schema)[field.name]):
            names[prefix + field.name] = present
    return names


def option(schema: type[Any], name: str) -> tuple[Any, Any]:
    """Returns the annotation and the default of an option by its whole name."""
    group, _, last = name.rpartition(".")
    owner = type(_at(schema, group)) if group else schema
    return hints(owner)[last], _at(schema, name)


def take_moved(config: Any) -> None:
    """Moves the values that a new `config` was given under former names to the present ones.

    Raises:
        ValueError: if an option was given other values under both of its names.
    """
    for former, present in moved(type(config)).items():
        value = _at(config, former)
        if value is None:
            continue
        other = _at(config, present)
        default = _at(type(config), present)
        if other not in (default, value):
            raise ValueError(
                f"{former}={value!r} and {present}={other!r} are two names of one option; leave "
                f"{former} out"
            )
        _set(config, former, None)
        _set(config, present, value)


def _at(config: Any, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


def _set(config: Any, name: str, value: Any) -> None:
    """Changes a config that is being constructed; its groups, which others may hold, stay."""
    first, _, rest = name.partition(".")
    if rest:
        value = dataclasses.replace(getattr(config, first), **{rest: value})
    object.__setattr__(config, first, value)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns `{"group.name": value}` of a frozen config, without former names."""
    result: dict[str, Any] = {}
    for name, hint in hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            result |= flat(value, f"{prefix}{name}.")
        elif not moved_to(hint):
            result[prefix + name] = value
    return result


def check_values(config: Any, prefix: str = "") -> None:
    """Checks each option by itself.

    Args:
        config: a frozen config, or a group of one.
        prefix: the group's name with a dot after it.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    for name, hint in hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            check_values(value, f"{prefix}{name}.")
        else:
            check(prefix + name, value, hint)


def check(name: str, value: Any, hint: Any) -> Any:
    """Returns `value` in the type of its option; whole numbers become floats where these stand.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    try:
        value = msgspec.convert(value, hint)
    except msgspec.ValidationError:
        raise ValueError(_refusal(name, value, hint)) from None
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{name}={value} must be finite")
    return value


def read(name: str, value: Any, hint: Any, default: Any) -> Any:
    """Returns a value that a user wrote, other words for it understood; raises as `check` does."""
    rules = get_args(hint) if get_origin(hint) is Annotated else ()
    word = str(value).lower()
    for rule in rules:
        if isinstance(rule, Words):
            value = dict(rule.values).get(word, value)
    is_emptied = default == "" or any(isinstance(rule, _Emptied) for rule in rules)
    if is_emptied and word in ("none", "null"):
        return ""
    if get_origin(hint) is tuple and isinstance(value, tuple | list):
        value = _items(value)
    return check(name, value, hint)


_BRACKETS = re.compile(r"[\[(](.*)[\])]", re.DOTALL)


def _items(values: Sequence[Any]) -> Sequence[Any]:
    """Returns the items of a list, also of one that a flag brought as one text in brackets."""
    if len(values) == 1 and isinstance(values[0], str) and (m := _BRACKETS.fullmatch(values[0])):
        return [item.strip(" \"'") for item in m[1].split(",") if item.strip()]
    return values


def _refusal(name: str, value: Any, hint: Any) -> str:
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
