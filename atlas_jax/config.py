"""From a config file to checked options. Imports no JAX.

A config file calls `defaults(SFTConfig)`, which returns a locked `ConfigDict` with every field, and
changes what differs; `train.py` calls `freeze` on the result, which gives back the frozen
dataclass of `options`, and `validate` on that.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import re
from typing import Any, TypeVar

from ml_collections import ConfigDict

from atlas_jax.option_rules import (
    ALGORITHMS,
    CHOICES,
    FRACTIONS,
    NOT_NEGATIVE,
    POSITIVE,
    REWARDS,
    SYNONYMS,
)
from atlas_jax.options import (
    DataConfig,
    HostsConfig,
    MeshConfig,
    ModelOptions,
    SFTConfig,
    TrainConfig,
)
from atlas_jax.options_grpo import GRPOConfig, RewardConfig, RolloutConfig

__all__ = [
    "ALGORITHMS",
    "CHOICES",
    "REWARDS",
    "DataConfig",
    "GRPOConfig",
    "HostsConfig",
    "MeshConfig",
    "ModelOptions",
    "RewardConfig",
    "RolloutConfig",
    "SFTConfig",
    "TrainConfig",
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
        **parts: the names that hold where the argument says nothing, in order of application.

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
        module = f"configs.{kind}.{name}"
        try:
            importlib.import_module(module).apply(config)
        except ModuleNotFoundError as error:
            if error.name not in (module, f"configs.{kind}", "configs"):
                raise
            raise ValueError(
                f"configs/{kind}/{name}.py does not exist; run from the repository root and give "
                f"the name of a file in configs/{kind}/"
            ) from None
    return config


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
            fields[name] = _frozen(type(default), value, f"{name}.")
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


def nearest(name: str, known: Any) -> str:
    """Returns "; did you mean X?" for the name in `known` that is closest, or ""."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns `{"group.name": value}` of a frozen config."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            result |= flat(value, f"{prefix}{field.name}.")
        else:
            result[prefix + field.name] = value
    return result


def validate(config: TrainConfig) -> None:
    """Checks what can be known before JAX starts.

    Raises:
        ValueError: names the option, its value and what to write instead.
    """
    values = flat(config)
    for name in ("model_name_or_path", "output_dir", "data.dataset_path"):
        if name in values and not values[name]:
            raise ValueError(f"{name} is empty; set --config.{name}=…")
    _check_values(values)
    if os.path.realpath(config.output_dir) == os.path.realpath(config.model_name_or_path):
        raise ValueError(
            f"output_dir={config.output_dir} is the model's own directory; name another one"
        )
    if config.max_steps == 0 or config.max_steps < -1:
        raise ValueError(f"max_steps={config.max_steps} must be above 0, or -1 to count epochs")
    if isinstance(config, GRPOConfig):
        _check_grpo(config)
    axes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if sum(a == -1 for a in axes) > 1 or any(a == 0 or a < -1 for a in axes):
        raise ValueError(f"mesh sizes {axes} must be positive, and one of them at most -1")


def _check_grpo(config: GRPOConfig) -> None:
    """Checks what only GRPO has."""
    if config.num_generations < 2:
        raise ValueError(
            f"num_generations={config.num_generations}: a group of one has no mean to compare "
            "with; use 2 or more"
        )
    if not 0 < config.top_p <= 1:
        raise ValueError(f"top_p={config.top_p} must be above 0 and at most 1; 1 keeps all tokens")
    if not 0 < config.ref_model_mixup_alpha <= 1:
        raise ValueError(
            f"ref_model_mixup_alpha={config.ref_model_mixup_alpha} must be above 0 and at most 1"
        )
    if config.packing:
        raise ValueError("packing=True is for SFT; GRPO rows hold a prompt and its completions")
    if config.sync_ref_model and not config.beta:
        raise ValueError("sync_ref_model=True without a reference; raise beta above 0")
    if config.rollout.protocol == "teaching" and not config.student_model:
        raise ValueError(
            "student_model is empty; set --config.student_model=…, or "
            "--config.rollout.protocol=direct to train without a student"
        )
    _check_rewards(config)


def _check_rewards(config: GRPOConfig) -> None:
    reward = config.reward
    for name in reward.names:
        if name not in REWARDS:
            hint = nearest(name, REWARDS)
            raise ValueError(f"reward.names has {name!r}; known are {', '.join(REWARDS)}{hint}")
    if reward.weights and len(reward.weights) != len(reward.names):
        raise ValueError(
            f"reward.weights={reward.weights} for reward.names={reward.names}; give one weight "
            "for each name, or none"
        )
    if not reward.names or len(set(reward.names)) < len(reward.names):
        raise ValueError(
            f"reward.names={reward.names} must name each reward once, and one at least"
        )
    if config.rollout.protocol == "direct" and "teaching_gain" in reward.names:
        raise ValueError(
            "the reward teaching_gain compares a student's answers, and protocol=direct has no "
            "student; use reward.names=('exact_match',)"
        )


def _check_values(values: dict[str, Any]) -> None:
    """Checks each option by itself."""
    for name, choices in CHOICES.items():
        if name in values and values[name] not in choices:
            hint = nearest(str(values[name]), choices)
            raise ValueError(f"{name}={values[name]!r} is not one of {', '.join(choices)}{hint}")
    for names, holds, rule in (
        (POSITIVE, lambda v: v > 0, "above 0"),
        (NOT_NEGATIVE, lambda v: v >= 0, "0 or more"),
        (FRACTIONS, lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ):
        for name in names:
            if name in values and not holds(values[name]):
                raise ValueError(f"{name}={values[name]} must be {rule}")


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


_SECRET_NAME = re.compile(r"token$|secret|password|api_key|credential", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(\w+://[^/\s:@]*):[^/\s@]*@")


def masked(config: TrainConfig) -> dict[str, Any]:
    """Returns the config as a JSON-ready nested dict, without passwords and keys."""

    def mask(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: mask(k, v) for k, v in value.items()}
        if isinstance(value, str) and value and _SECRET_NAME.search(name):
            return "***"
        return _URL_PASSWORD.sub(r"\1:***@", value) if isinstance(value, str) else value

    return mask("", dataclasses.asdict(config))
