"""The way from a config file to checked options. Imports no JAX.

A config file calls `defaults(SFTConfig)`, which returns a locked `ConfigDict` with every field, and
changes what differs; `train.py` calls `freeze` on the result, which gives back the frozen
dataclass of `options`, and `validate` on that.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from ml_collections import ConfigDict

from atlas_jax import masking
from atlas_jax.options.data import ColumnsConfig, DataConfig, LessonsConfig
from atlas_jax.options.fields import flat, hints, moved, moved_to, nearest, option, read
from atlas_jax.options.model import HostsConfig, MeshConfig, ModelOptions
from atlas_jax.options.train import SFTConfig, TrainConfig

if TYPE_CHECKING:
    from atlas_jax.options.grpo import GRPOConfig, TeachingConfig
    from atlas_jax.options.judges import RIMConfig
    from atlas_jax.options.reward import RewardConfig
    from atlas_jax.options.rollout import RolloutConfig

__all__ = [
    "ColumnsConfig",
    "DataConfig",
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
    "GRPOConfig": "atlas_jax.options.grpo",
    "RIMConfig": "atlas_jax.options.judges",
    "RewardConfig": "atlas_jax.options.reward",
    "RolloutConfig": "atlas_jax.options.rollout",
    "TeachingConfig": "atlas_jax.options.grpo",
}
"""Name -> its module, imported at the first use, since SFT needs no options of rewards."""

ALGORITHMS = {"sft": "SFTConfig", "grpo": "GRPOConfig"}
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
    """Returns the defaults of all options of all algorithms by name."""
    options: dict[str, Any] = {}
    for algorithm in ALGORITHMS:
        options |= flat(schema(algorithm)())
    return options


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Division of the rows of one optimizer step."""

    global_rows: int
    """Rows an optimizer step, over all devices."""
    microbatches: int
    """Sequential forward passes an optimizer step."""
    device_rows: int
    """Rows in one forward pass on each device of the `data` and `fsdp` axes."""


def defaults(schema: type[TrainConfig]) -> ConfigDict:
    """Returns a locked `ConfigDict` with every field of `schema`, for a config file to change.

    A former name of an option refers to the same value as its present name.
    """

    def as_dict(group: Any) -> ConfigDict:
        values = {name: getattr(group, name) for name in hints(type(group))}
        return ConfigDict(
            {
                name: as_dict(value) if dataclasses.is_dataclass(value) else value
                for name, value in values.items()
                if not moved_to(hints(type(group))[name])
            }
        )

    config = as_dict(schema())
    for former, present in moved(schema).items():
        group, _, name = former.rpartition(".")
        present_group, _, present_name = present.rpartition(".")
        _at(config, group)[name] = _at(config, present_group).get_ref(present_name)
    return config.lock()


def _at(config: ConfigDict, name: str) -> Any:
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
    from atlas_jax import config_files  # a run that has its config reads no file of one

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
    from atlas_jax import config_files

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


def batch_plan(config: TrainConfig, num_replicas: int) -> BatchPlan:
    """Returns how one optimizer step is divided over `num_replicas` (the data and fsdp axes).

    With `train_batch_size` alone, a device has as many rows at one time as divide its share and are
    at most `per_device_train_batch_size`.

    Raises:
        ValueError: if the three batch sizes contradict each other, or the devices have no equal
            shares; names the nearest sizes that fit.
    """
    limit = config.per_device_train_batch_size
    total = config.train_batch_size
    if config.gradient_accumulation_steps or not total:
        steps = config.gradient_accumulation_steps or 1
        rows = limit * num_replicas * steps
        if total not in (0, rows):
            raise ValueError(
                f"train_batch_size={total} is not per_device_train_batch_size={limit} x "
                f"gradient_accumulation_steps={steps} x {num_replicas} devices = {rows}; use "
                f"{rows}, or set one of train_batch_size and gradient_accumulation_steps to 0, "
                "which infers it"
            )
        return BatchPlan(rows, steps, limit)
    if total % num_replicas:
        raise ValueError(
            f"train_batch_size={total} does not divide over the {num_replicas} devices of "
            f"mesh.data x mesh.fsdp; set train_batch_size="
            f"{multiples_near(total, num_replicas, config.group_size)}"
        )
    share = total // num_replicas
    device_rows = max(k for k in range(1, limit + 1) if share % k == 0)
    return BatchPlan(total, share // device_rows, device_rows)


def multiples_near(number: int, *divisors: int) -> str:
    """Returns, as words, the common multiples of `divisors` below and above `number`."""
    unit = math.lcm(*divisors)
    below = number // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"


def masked(config: TrainConfig) -> dict[str, Any]:
    """Returns the config as a JSON-ready nested dict, without passwords and keys."""

    def mask(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: mask(k, v) for k, v in value.items()}
        if isinstance(value, tuple):
            return [mask(name, v) for v in value]
        if isinstance(value, str) and value and masking.is_secret_name(name):
            return masking.HIDDEN
        return masking.hide(value) if isinstance(value, str) else value

    return mask("", _present(dataclasses.asdict(config), moved(type(config))))


def _present(values: dict[str, Any], former: dict[str, str], prefix: str = "") -> dict[str, Any]:
    """Returns nested values without the former names of options."""
    return {
        name: _present(value, former, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in values.items()
        if prefix + name not in former
    }
