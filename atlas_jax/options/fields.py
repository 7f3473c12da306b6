"""Types of options: the allowed values of each, as checks, errors and documentation use them.

An option is a dataclass field with one of these types, or with a `Literal` of its choices; the
string after it is its meaning. The checks themselves are msgspec's. Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_type_hints

import msgspec
from msgspec import Meta

FUNCTION = r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*"
"""Pattern of a function of the user's own, `package.module:function`."""


@dataclasses.dataclass(frozen=True)
class Words:
    """Other words that users write for the values of an option."""

    values: tuple[tuple[str, str | bool], ...]
    """Pairs of a word in lower case and the value that it stands for."""


@dataclasses.dataclass(frozen=True)
class Moved:
    """An option's former place; its values go to the option at `to`."""

    to: str
    """The whole name of the option, such as `teaching.lesson_template`."""


class Emptied:
    """A text that `none` and `null` empty although its default is not empty."""


Positive = Annotated[float, Meta(gt=0)]
PositiveInt = Annotated[int, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
PositiveShare = Annotated[float, Meta(gt=0, le=1)]
OptionalPath = Annotated[str, Emptied()]
JsonObject = Annotated[str, Meta(extra={"rule": "a JSON object, or empty"})]


def is_reference(name: str) -> bool:
    """Returns true for `module:function`, false for the name of something built in."""
    return ":" in name


def labels(names: Sequence[str]) -> tuple[str, ...]:
    """Returns a short name for each of several names, such as `brevity` for `rewards:brevity`.

    References that would get the same short name keep their module.
    """
    short = [name.rpartition(":")[2] for name in names]
    return tuple(
        label if short.count(label) == 1 else name.replace(":", ".")
        for name, label in zip(names, short, strict=True)
    )


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
        from atlas_jax.options import descriptions  # for errors and for the documentation

        raise ValueError(descriptions.refusal(name, value, hint)) from None
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{name}={value} must be finite")
    return value
