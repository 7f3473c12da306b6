"""Options on the command line, `--config.NAME=VALUE`, and names that it does not take.

Values are read by the type of the option, in the notations that people use: `true`, `yes` and `1`;
`null` and `none`; `1e-5`; `[a, b]`, `(a, b)` and `a,b`. Imports no JAX.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args, get_type_hints

from ml_collections import ConfigDict

from atlas_jax import migration
from atlas_jax.config import ALGORITHMS, flat, former_names, has_words, nearest, schema
from atlas_jax.config import option as declared

PATTERN = re.compile(r"--?(?P<no>no)?config\.(?P<name>[^=]*)(?:=(?P<value>.*))?", re.DOTALL)

_TRUE = ("true", "yes", "on", "1", "t", "y")
_FALSE = ("false", "no", "off", "0", "f", "n")
_NULL = ("null", "none")
_NULL_VALUES = {
    "max_steps": -1, "eval_steps": 0, "save_steps": 0, "save_total_limit": 0, "top_k": 0,
    "min_p": 0.0, "train_batch_size": 0, "gradient_accumulation_steps": 0, "max_grad_norm": 0.0,
    "data.dataset_max_samples": 0, "data.max_sessions": 0, "data.min_reward": 0.0,
    "data.eval_split_ratio": 0.0, "rollout.max_answer_tokens": 0,
    "teaching.max_answer_tokens": 0, "rollout.eval_limit": 0,
}  # fmt: skip
"""Numbers that mean "none" where an option is a number."""
_BRACKETS = re.compile(r"\s*[\[(](.*)[\])]\s*", re.DOTALL)
_ITEM = re.compile(r"""\s*('[^']*'|"[^"]*"|[^,]+)\s*(?:,|$)""", re.DOTALL)


class Option(NamedTuple):
    """One option as it was written."""

    name: str
    value: str

    def __str__(self) -> str:
        return f"--config.{self.name}={self.value}"


def separate(words: Sequence[str], config: ConfigDict) -> tuple[list[Option], list[str]]:
    """Returns the options among the words of a command line, and the other words."""
    options: list[Option] = []
    others: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        match = PATTERN.fullmatch(word)
        if not match:
            others.append(word)
            continue
        name = match["name"]
        value = match["value"]
        if match["no"]:
            value = "false"
        elif value is None:
            switch = isinstance(_get(config, name), bool) or not remaining
            alone = switch or remaining[0].startswith("--") or PATTERN.fullmatch(remaining[0])
            value = "true" if alone else remaining.pop(0)
        options.append(Option(name, value))
    return options, others


def apply(config: ConfigDict, options: Sequence[Option]) -> list[str]:
    """Sets options of a config.

    Returns:
        A sentence about each option of another program that changes nothing here.

    Raises:
        ValueError: for an unknown option, or a value of another type.
    """
    _check_given_once(config, [option.name for option in options])
    notes: list[str] = []
    several: dict[str, tuple[Any, ...]] = {}
    for option in options:
        if not _has(config, option.name):
            foreign = migration.find(option.name)
            if foreign is None or not foreign.accepts(option.value):
                raise ValueError(unknown(option.name, config))
            notes.append(f"{option.name}={option.value}: {foreign.answer}")
            if not foreign.same_as:
                continue
            option = option._replace(name=foreign.same_as)
        value = read(option, config)
        if isinstance(value, tuple):
            # A list may be given item by item, in several flags.
            several[option.name] = value = several.get(option.name, ()) + value
        *groups, last = option.name.split(".")
        _get(config, ".".join(groups))[last] = value
    return notes


def _check_given_once(config: ConfigDict, names: Sequence[str]) -> None:
    """Checks that no option is given under its former name and its present one."""
    former = former_names(config)
    for name in names:
        if former.get(name) in names:
            raise ValueError(f"{name} and {former[name]} are two names of one option; give one")


def read(option: Option, config: ConfigDict) -> Any:
    """Returns the value of an option.

    Raises:
        ValueError: if it is not of the option's type.
    """
    before = _get(config, option.name)
    if isinstance(before, ConfigDict):
        raise ValueError(_group(option, before))
    if isinstance(before, tuple):
        kind = type(before[0]) if before else _item_type(option.name, config)
        return _items(option, kind)
    if option.value.lower() in _NULL and option.name in _NULL_VALUES:
        return _NULL_VALUES[option.name]
    hint, _ = declared(schema(config.algorithm), option.name)
    return option.value if has_words(hint) else _scalar(option, option.value, type(before))


def unknown(name: str, config: ConfigDict) -> str:
    """Returns the sentence about an option that a config does not have."""
    found = migration.find(name)
    if found:
        return f"unknown option {name}: {found.answer}"
    for algorithm in ALGORITHMS:
        if name in flat(schema(algorithm)()):
            return (
                f"unknown option {name}: it is one of algorithm={algorithm}, and this config has "
                f"algorithm={config.algorithm}"
            )
    names = _names(config)
    same = [option for option in names if option.split(".")[-1] == name.split(".")[-1]]
    hint = f"; did you mean {same[0]!r}?" if same else nearest(name, names)
    return f"unknown option {name}{hint or '; --options lists all'}"


def _items(option: Option, kind: type[Any]) -> tuple[Any, ...]:
    if option.value.lower() in _NULL:
        return ()
    match = _BRACKETS.fullmatch(option.value)
    found = _ITEM.findall(match[1] if match else option.value)
    texts = [text.strip() for text in found]
    return tuple(_scalar(option, text.strip("'\""), kind) for text in texts if text)


def _scalar(option: Option, text: str, kind: type[Any]) -> Any:
    readers: dict[type[Any], tuple[Callable[[str], Any], str]] = {
        bool: (_boolean, "true or false"),
        int: (_whole, "a whole number"),
        float: (float, "a number"),
    }
    if kind not in readers:
        return text
    reader, meaning = readers[kind]
    try:
        return reader(text)
    except ValueError:
        shown = "" if text == option.value else f", and {text!r} is not"
        raise ValueError(f"{option} must be {meaning}{shown}") from None


def _boolean(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(text)
    return text.lower() in _TRUE


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)  # 1e3
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def _item_type(name: str, config: ConfigDict) -> type[Any]:
    """Returns the type of the items of an option that holds several."""
    group: Any = schema(config.algorithm)()
    *groups, last = name.split(".")
    for part in groups:
        group = getattr(group, part)
    return get_args(get_type_hints(type(group))[last])[0]


def _group(option: Option, group: ConfigDict) -> str:
    name, value = option
    some = ", ".join(f"{name}.{each}" for each in list(group)[:3])
    swap = f"; to take configs/{name}/{value}.py, write --config NAME:{name}={value}"
    return (
        f"{name}={value}: {name} is a group of options ({some}, …); set one of these"
        f"{swap if name in ('model', 'data') else ''}"
    )


def _has(config: ConfigDict, name: str) -> bool:
    return _get(config, name) is not None


def _get(config: ConfigDict, name: str) -> Any:
    """Returns a value or a group of a config; None if there is no such option."""
    value: Any = config
    for part in name.split(".") if name else ():
        if not isinstance(value, ConfigDict) or part not in value:
            return None
        value = value[part]
    return value


def _names(config: ConfigDict, prefix: str = "") -> list[str]:
    """Returns the options of a config, those of groups as `group.name`."""
    names: list[str] = []
    for name, value in config.items():
        inner = isinstance(value, ConfigDict)
        names += _names(value, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return names
