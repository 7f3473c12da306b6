"""From a config file to checked options. Imports no JAX.

A config file calls `defaults(SFTConfig)`, which returns a locked `ConfigDict` with every field, and
changes what differs; `train.py` calls `freeze` on the result, which gives back the frozen
dataclass of `options`, and `validate` on that.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, TypeVar, get_args, get_type_hints

from ml_collections import ConfigDict

from atlas_jax import config_files, masking
from atlas_jax.option_rules import ALGORITHMS, CHOICES, EMPTIED, REWARDS, SYNONYMS
from atlas_jax.options import (
    ColumnsConfig,
    DataConfig,
    HostsConfig,
    MeshConfig,
    ModelOptions,
    SFTConfig,
    TrainConfig,
)
from atlas_jax.options_grpo import GRPOConfig, RewardConfig, RolloutConfig
from atlas_jax.options_rim import RIMConfig
from atlas_jax.validation import check_environment, check_rim, flat, nearest, validate

__all__ = [
    "ALGORITHMS",
    "CHOICES",
    "REWARDS",
    "ColumnsConfig",
    "DataConfig",
    "GRPOConfig",
    "HostsConfig",
    "MeshConfig",
    "ModelOptions",
    "RIMConfig",
    "RewardConfig",
    "RolloutConfig",
    "SFTConfig",
    "TrainConfig",
    "check_environment",
    "check_rim",
    "flat",
    "nearest",
    "validate",
]

T = TypeVar("T")

_BRACKETS = re.compile(r"[\[(](.*)[\])]", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How the rows of one optimizer step are divided."""

    global_rows: int
    """Rows an optimizer step, over all devices."""
    microbatches: int
    """Sequential forward passes an optimizer step."""
    device_rows: int
    """Rows in one forward pass on each device of the `data` and `fsdp` axes."""


def defaults(schema: type[TrainConfig]) -> ConfigDict:
    """Returns a locked `ConfigDict` with every field of `schema`, for a config file to change."""

    def as_dict(cls: type[Any]) -> ConfigDict:
        values = {f.name: f.default for f in dataclasses.fields(cls)}
        return ConfigDict(
            {k: as_dict(type(v)) if dataclasses.is_dataclass(v) else v for k, v in values.items()}
        )

    return as_dict(schema).lock()


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
        ValueError: if the file is missing, or sets an option that does not exist.
    """
    draft = defaults(GRPOConfig)
    config_files.run(reference, "apply", draft, folder="")
    config = freeze(draft)
    assert isinstance(config, GRPOConfig)
    return config.reward.rim


def freeze(config: ConfigDict) -> TrainConfig:
    """Returns `config` as the frozen dataclass of its algorithm, synonyms resolved.

    Raises:
        ValueError: for an unknown algorithm or a value of the wrong type.
    """
    if config.algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm {config.algorithm!r} is not one of {', '.join(ALGORITHMS)}")
    return _frozen(ALGORITHMS[config.algorithm], config, "")


def _frozen(cls: type[T], values: ConfigDict, prefix: str) -> T:
    known = {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ValueError(f"unknown option {prefix}{name}{nearest(name, known)}")
    hints = get_type_hints(cls)
    fields: dict[str, Any] = {}
    for name, default in known.items():
        value = values[name]
        if dataclasses.is_dataclass(default):
            fields[name] = _frozen(type(default), value, f"{prefix}{name}.")
        elif isinstance(default, tuple) and isinstance(value, tuple | list):
            fields[name] = _items(prefix + name, value, get_args(hints[name])[0])
        else:
            fields[name] = _typed(prefix + name, value, default)
    return cls(**fields)


def _typed(name: str, value: Any, default: Any) -> Any:
    value = SYNONYMS.get((name, str(value).lower()), value)
    if (default == "" or name in EMPTIED) and str(value).lower() in ("none", "null"):
        return ""
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(
            f"{name}={value!r} is a {type(value).__name__}; it must be a {type(default).__name__}"
        )
    return value


def _items(name: str, values: Sequence[Any], kind: type[Any]) -> tuple[Any, ...]:
    """Returns the values of an option that holds several."""
    if kind is str and len(values) == 1 and (match := _BRACKETS.fullmatch(str(values[0]))):
        values = [item.strip(" \"'") for item in match[1].split(",") if item.strip()]
    items = [float(v) if kind is float and type(v) is int else v for v in values]
    for item in items:
        if type(item) is not kind:
            raise ValueError(
                f"{name} holds {item!r}, a {type(item).__name__}; each of its items must be "
                f"{'an' if kind is int else 'a'} {kind.__name__}"
            )
    return tuple(items)


def batch_plan(config: TrainConfig, num_replicas: int) -> BatchPlan:
    """Returns how one optimizer step is divided over `num_replicas` (the data and fsdp axes).

    With `train_batch_size` alone, a device has as many rows at one time as divide its share and are
    at most `per_device_train_batch_size`.

    Raises:
        ValueError: if the three batch sizes contradict each other, or the devices have no equal
            shares; names the nearest sizes that fit.
    """
    limit, total = config.per_device_train_batch_size, config.train_batch_size
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
        group = config.num_generations if isinstance(config, GRPOConfig) else 1
        raise ValueError(
            f"train_batch_size={total} does not divide over the {num_replicas} devices of "
            f"mesh.data x mesh.fsdp; set train_batch_size="
            f"{multiples_near(total, num_replicas, group)}"
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

    return mask("", dataclasses.asdict(config))
