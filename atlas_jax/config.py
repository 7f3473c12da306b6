"""The way from a config file to checked options. Imports no JAX.

A config file calls `defaults(SFTConfig)`, which returns a locked `ConfigDict` with every field, and
changes what differs; `train.py` calls `freeze` on the result, which gives back the frozen
dataclass of `options`, and `validate` on that. The code of a run has its options already, and
imports `options` alone.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, overload

from ml_collections import ConfigDict, FieldReference

from atlas_jax import config_files
from atlas_jax.options.data import ColumnsConfig, DataConfig, LessonsConfig
from atlas_jax.options.descriptions import nearest
from atlas_jax.options.fields import Emptied, Words, check, flat, hints, moved, moved_to
from atlas_jax.options.train import (
    HostsConfig,
    MeshConfig,
    ModelOptions,
    SFTConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from atlas_jax.options.gkd import GKDConfig
    from atlas_jax.options.grpo import GRPOConfig, TeachingConfig
    from atlas_jax.options.judges import RIMConfig
    from atlas_jax.options.reward import RewardConfig
    from atlas_jax.options.rollout import RolloutConfig

__all__ = [
    "ColumnsConfig",
    "DataConfig",
    "GKDConfig",
    "GRPOConfig",
    "HostsConfig",
    "LessonsConfig",
    "MeshConfig",
    "ModelOptions",
    "RIMConfig",
    "RewardConfig",
    "RolloutConfig",
    "SFTConfig",
    "TeachingConfig",
    "TrainConfig",
    "flat",
    "nearest",
]

T = TypeVar("T")
Config = TypeVar("Config", bound=TrainConfig)

_LATE = {
    "GKDConfig": "atlas_jax.options.gkd",
    "GRPOConfig": "atlas_jax.options.grpo",
    "RIMConfig": "atlas_jax.options.judges",
    "RewardConfig": "atlas_jax.options.reward",
    "RolloutConfig": "atlas_jax.options.rollout",
    "TeachingConfig": "atlas_jax.options.grpo",
}
"""Name -> its module, imported at the first use, since SFT needs no options of rewards."""

ALGORITHMS = {"sft": "SFTConfig", "grpo": "GRPOConfig", "gkd": "GKDConfig"}
"""Algorithm -> the name of its schema in this module."""


def __getattr__(name: str) -> Any:
    """Returns a schema that is imported at its first use."""
    if name not in _LATE:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(_LATE[name]), name)


def schema(algorithm: str) -> type[TrainConfig]:
    """Returns the options of an algorithm.

    Raises:
        ValueError: for an unknown algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm {algorithm!r} is not one of {', '.join(ALGORITHMS)}")
    name = ALGORITHMS[algorithm]
    return globals()[name] if name in globals() else __getattr__(name)


def former_names(config: ConfigDict) -> dict[str, str]:
    """Returns `{former name: present name}` of the options that a config has."""
    algorithm = config.get("algorithm")
    return moved(schema(algorithm)) if algorithm in ALGORITHMS else {}


def all_options() -> dict[str, Any]:
    """Returns the defaults of all options by name, of the first algorithm that has each."""
    options: dict[str, Any] = {}
    for algorithm in ALGORITHMS:
        options = flat(schema(algorithm)()) | options
    return options


def defaults(schema: type[TrainConfig]) -> ConfigDict:
    """Returns a locked `ConfigDict` with every field of `schema`, for a config file to change.

    A former name of an option refers to the same value as its present name.
    """

    def as_dict(group: Any) -> ConfigDict:
        return ConfigDict(
            {
                name: as_value(getattr(group, name), hint)
                for name, hint in hints(type(group)).items()
                if not moved_to(hint)
            }
        )

    def as_value(value: Any, hint: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return as_dict(value)
        # A `ConfigDict` keeps a field to the type of its default, but `True` may be another word.
        return FieldReference(value, field_type=object) if has_words(hint) else value

    config = as_dict(schema())
    for former, present in moved(schema).items():
        group, _, name = former.rpartition(".")
        present_group, _, present_name = present.rpartition(".")
        _at(config, group)[name] = _at(config, present_group).get_ref(present_name)
    return config.lock()


def _at(config: Any, name: str) -> Any:
    """Returns the option or group of that name; the whole config for ""."""
    return functools.reduce(getattr, name.split("."), config) if name else config


def apply_parts(config: ConfigDict, argument: str | None, **parts: str) -> ConfigDict:
    """Applies the preset of each `kind=name` to `config`, and returns it.

    Args:
        config: the config that the presets change; each preset has `apply(config) -> None`.
        argument: what follows after the colon of `--config NAME:model=x,data=y`. A name is that of
            a file in `configs/<kind>/`, or the dotted name of a user's module.
        **parts: the names that hold where the argument says nothing, in order of application;
            "" applies nothing. The files of `rim` lie in `configs/` itself.

    Raises:
        ValueError: for a kind or a name that does not exist.
    """
    for item in filter(None, map(str.strip, (argument or "").split(","))):
        kind, separator, name = (part.strip() for part in item.partition("="))
        if not separator or kind not in parts:
            raise ValueError(
                f"config argument {item!r} is not one of {', '.join(f'{k}=NAME' for k in parts)}"
                f"{nearest(kind, parts)}"
            )
        parts[kind] = name
    for kind, name in parts.items():
        if name:
            _apply("" if kind == "rim" else kind, name, config)
    return config


def _apply(folder: str, name: str, config: ConfigDict) -> None:
    names = config_files.shipped(folder)
    if name in names or "." in name:
        config_files.run(name, "apply", config, folder=folder)
        return
    path = "/".join(filter(None, ("configs", folder)))
    raise ValueError(
        f"{path}/{name}.py does not exist; give the name of a file in {path}/, or PACKAGE.MODULE"
        f"{nearest(name, names)}"
    )


def read_rim(reference: str) -> RIMConfig:
    """Returns the options of the judges that a file like `configs/rim_config.py` sets.

    Args:
        reference: path, shipped name or dotted name of the file.

    Raises:
        ValueError: if the file is missing, or sets unknown options.
    """
    grpo = __getattr__("GRPOConfig")
    draft = defaults(grpo)
    config_files.run(reference, "apply", draft, folder="")
    return freeze(draft, grpo).reward.rim


@overload
def freeze(config: ConfigDict) -> TrainConfig: ...
@overload
def freeze(config: ConfigDict, expected: type[Config]) -> Config: ...


def freeze(config: ConfigDict, expected: type[TrainConfig] = TrainConfig) -> TrainConfig:
    """Returns `config` as the frozen dataclass of its algorithm, synonyms resolved.

    Args:
        config: the options as a config file and flags give them.
        expected: the schema that the caller works with.

    Raises:
        ValueError: for an unknown algorithm or option, another schema than the expected one, or a
            value that its option does not allow.
    """
    config_class = schema(config.algorithm)
    if not issubclass(config_class, expected):
        raise ValueError(
            f"--config has algorithm={config.algorithm!r}; use a run file with algorithm="
            f"{expected().algorithm!r}"
        )
    return _frozen(config_class, config, "", _former_values(config_class, config))


def _former_values(cls: type[TrainConfig], config: ConfigDict) -> dict[str, Any]:
    """Returns the values that stand under former names only, where references were resolved."""
    values: dict[str, Any] = {}
    for former, present in moved(cls).items():
        group, _, name = former.rpartition(".")
        value = _at(config, group).get(name)
        hint, default = option(cls, present)
        if value not in (None, default, _at(config, present)):
            values[former] = read(former, value, hint, default)
    return values


def _frozen(cls: type[T], values: Any, prefix: str, former: dict[str, Any]) -> T:
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(values, ConfigDict):
        some = ", ".join(list(defaults)[:3])
        raise ValueError(f"{prefix[:-1]}={values!r} must be a group of options ({some}, …)")
    for name in values:
        if name not in defaults:
            raise ValueError(f"unknown option {prefix}{name}{nearest(name, defaults)}")
    fields: dict[str, Any] = {}
    for name, default in defaults.items():
        hint = hints(cls)[name]
        if dataclasses.is_dataclass(default):
            fields[name] = _frozen(type(default), values[name], f"{prefix}{name}.", former)
        elif not moved_to(hint):
            fields[name] = read(prefix + name, values[name], hint, default)
        elif prefix + name in former:
            fields[name] = former[prefix + name]
    return cls(**fields)


def validate(config: TrainConfig, given_rewards: Sequence[Any] = ()) -> None:
    """Checks options that can be checked before JAX starts.

    Args:
        config: the run.
        given_rewards: rewards of a caller from Python, in place of `reward.names`.

    Raises:
        ValueError: names the option, its value and what to write instead.
    """
    config.check(given_rewards)
    if config.judges:
        check_rim(config.judges)


def check_rim(rim: RIMConfig) -> None:
    """Checks the options of the judges, their addresses and prices; raises as `validate` does."""
    from atlas_jax import endpoints  # the judges' own, which most runs do not need

    rim.check()
    endpoints.check(rim)


def check_environment(config: TrainConfig) -> None:
    """Checks the keys that a run reads from the environment.

    Raises:
        ValueError: names the variable that is not set.
    """
    if config.judges and not config.judges.replay:
        from atlas_jax import endpoints

        for endpoint in endpoints.resolve_all(config.judges).values():
            endpoints.api_key(endpoint)


def option(schema: type[Any], name: str) -> tuple[Any, Any]:
    """Returns the annotation and the default of an option by its whole name."""
    group, _, last = name.rpartition(".")
    owner = type(_at(schema, group)) if group else schema
    return hints(owner)[last], _at(schema, name)


def read(name: str, value: Any, hint: Any, default: Any) -> Any:
    """Returns a value that a user wrote, other words for it understood; raises as `check` does."""
    rules = _rules(hint)
    word = str(value).lower()
    for rule in rules:
        if isinstance(rule, Words):
            value = dict(rule.values).get(word, value)
    is_emptied = default == "" or any(isinstance(rule, Emptied) for rule in rules)
    if is_emptied and word in ("none", "null"):
        return ""
    if get_origin(hint) is tuple and isinstance(value, tuple | list):
        value = _items(value)
    return check(name, value, hint)


def has_words(hint: Any) -> bool:
    """Returns whether other words than its values may be written for an option."""
    return any(isinstance(rule, Words) for rule in _rules(hint))


def _rules(hint: Any) -> tuple[Any, ...]:
    """Returns what an annotation says beside the type."""
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


_BRACKETS = re.compile(r"[\[(](.*)[\])]", re.DOTALL)


def _items(values: Sequence[Any]) -> Sequence[Any]:
    """Returns the items of a list, also of one that a flag brought as one text in brackets."""
    if len(values) == 1 and isinstance(values[0], str) and (m := _BRACKETS.fullmatch(values[0])):
        return [item.strip(" \"'") for item in m[1].split(",") if item.strip()]
    return values
