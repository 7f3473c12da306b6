"""From a config file to checked options. Imports no JAX.

A config file calls `defaults(SFTConfig)`, which returns a locked `ConfigDict` with every field, and
changes what differs; `train.py` calls `freeze` on the result, which gives back the frozen
dataclass of `options`, and `validate` on that.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
from typing import Any, TypeVar

from ml_collections import ConfigDict

from atlas_jax import masking
from atlas_jax.option_rules import ALGORITHMS, CHOICES, REWARDS, SYNONYMS
from atlas_jax.options import (
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


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How the rows of one optimizer step are divided."""

    global_rows: int
    """Rows an optimizer step, over all devices."""
    microbatches: int
    """Sequential forward passes an optimizer step."""


def defaults(schema: type[TrainConfig]) -> ConfigDict:
    """Returns a locked `ConfigDict` with every field of `schema`, for a config file to change."""

    def as_dict(cls: type[Any]) -> ConfigDict:
        values = {f.name: f.default for f in dataclasses.fields(cls)}
        return ConfigDict(
            {k: as_dict(type(v)) if dataclasses.is_dataclass(v) else v for k, v in values.items()}
        )

    return as_dict(schema).lock()


def apply_parts(config: ConfigDict, argument: str | None, **parts: str) -> ConfigDict:
    """Applies `configs/<kind>/<name>.py` to `config` for each `kind=name`, and returns it.

    Args:
        config: what the parts change; each part module has `apply(config) -> None`.
        argument: what stands behind the colon of `--config file.py:model=x,data=y`.
        **parts: the names that hold where the argument says nothing, in order of application;
            "" applies nothing. The files of `rim` lie in `configs/` itself.

    Raises:
        ValueError: for a kind or a name that does not exist.
    """
    for item in filter(None, (argument or "").split(",")):
        kind, separator, name = item.partition("=")
        if not separator or kind not in parts:
            raise ValueError(
                f"config argument {item!r} is not one of {', '.join(f'{k}=NAME' for k in parts)}"
            )
        parts[kind] = name
    for kind, name in parts.items():
        folder = "configs" if kind == "rim" else f"configs.{kind}"
        if name:
            _apply(folder, name, config)
    return config


def _apply(folder: str, name: str, config: ConfigDict) -> None:
    module, path = f"{folder}.{name}", folder.replace(".", "/")
    try:
        importlib.import_module(module).apply(config)
    except ModuleNotFoundError as error:
        if error.name not in (module, folder, "configs"):
            raise
        raise ValueError(
            f"{path}/{name}.py does not exist; run from the repository root and give the name of "
            f"a file in {path}/"
        ) from None


def read_rim(path: str) -> RIMConfig:
    """Returns the options of the judges that a file like `configs/rim_config.py` sets.

    Raises:
        ValueError: if the file is missing, or sets what there is not.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist; name a file like configs/rim_config.py")
    spec = importlib.util.spec_from_file_location("rim_options", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file; name one like configs/rim_config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    draft = defaults(GRPOConfig)
    try:
        module.apply(draft)
    except AttributeError as error:
        raise ValueError(f"{path}: {error}; see configs/rim_config.py") from None
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
    fields = {}
    for name, default in known.items():
        value = values[name]
        if dataclasses.is_dataclass(default):
            fields[name] = _frozen(type(default), value, f"{prefix}{name}.")
        else:
            fields[name] = _typed(prefix + name, value, default)
    return cls(**fields)


def _typed(name: str, value: Any, default: Any) -> Any:
    value = SYNONYMS.get((name, str(value).lower()), value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if isinstance(default, tuple):
        value = tuple(value)
    if type(value) is not type(default):
        raise ValueError(
            f"{name}={value!r} is a {type(value).__name__}; it must be a {type(default).__name__}"
        )
    return value


def batch_plan(config: TrainConfig, num_replicas: int) -> BatchPlan:
    """Returns how one optimizer step is divided over `num_replicas` (the data and fsdp axes).

    Raises:
        ValueError: if the three batch sizes contradict each other; names the nearest that fit.
    """
    rows = config.per_device_train_batch_size * num_replicas
    steps, total = config.gradient_accumulation_steps, config.train_batch_size
    if not total:
        return BatchPlan(rows * (steps or 1), steps or 1)
    if steps and steps * rows != total:
        raise ValueError(
            f"train_batch_size={total} is not per_device_train_batch_size="
            f"{config.per_device_train_batch_size} x gradient_accumulation_steps={steps} x "
            f"{num_replicas} devices = {steps * rows}; use {steps * rows}, or 0 to infer one"
        )
    if total % rows:
        below, above = total // rows * rows, (total // rows + 1) * rows
        nearest_sizes = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"train_batch_size={total} does not divide over per_device_train_batch_size="
            f"{config.per_device_train_batch_size} x {num_replicas} devices = {rows} rows; "
            f"use {nearest_sizes}"
        )
    return BatchPlan(total, total // rows)


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
