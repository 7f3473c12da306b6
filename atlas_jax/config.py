"""From a config file to checked options. Imports no JAX.

A config file calls `defaults(SFTConfig)`, which returns a locked `ConfigDict` with every field, and
changes what differs; `train.py` calls `freeze` on the result, which gives back the frozen
dataclass of `options`, and `validate` on that.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import os
import re
from typing import Any, TypeVar

from ml_collections import ConfigDict

from atlas_jax import endpoints
from atlas_jax.option_rules import (
    ALGORITHMS,
    CHOICES,
    FRACTIONS,
    NOT_NEGATIVE,
    OFFLOADS,
    POSITIVE,
    REWARDS,
    SHARES,
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
from atlas_jax.options_rim import RIMConfig

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
    for name in ("model_name_or_path", "output_dir"):
        if name in values and not values[name]:
            raise ValueError(f"{name} is empty; set --config.{name}=…")
    _check_values(values)
    if bool(config.data.dataset_path) == bool(config.data.db_url):
        state = "both set" if config.data.db_url else "empty"
        raise ValueError(
            f"data.dataset_path and data.db_url are {state}; set one of them with --config.data.…=…"
        )
    if os.path.realpath(config.output_dir) == os.path.realpath(config.model_name_or_path):
        raise ValueError(
            f"output_dir={config.output_dir} is the model's own directory; name another one"
        )
    if config.max_steps == 0 or config.max_steps < -1:
        raise ValueError(f"max_steps={config.max_steps} must be above 0, or -1 to count epochs")
    _check_offload(config)
    if isinstance(config, GRPOConfig):
        _check_grpo(config)
    axes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if sum(a == -1 for a in axes) > 1 or any(a == 0 or a < -1 for a in axes):
        raise ValueError(f"mesh sizes {axes} must be positive, and one of them at most -1")


def _check_offload(config: TrainConfig) -> None:
    parts = config.offload.split(",")
    for part in parts:
        if part not in OFFLOADS or ("none" in parts and len(parts) > 1):
            raise ValueError(
                f"offload={config.offload!r} is not none, nor some of {', '.join(OFFLOADS[1:])}"
                f"{nearest(part, OFFLOADS)}"
            )
    if "activations" in parts and config.gradient_checkpointing != "full":
        raise ValueError(
            f"offload=activations moves what gradient_checkpointing=full keeps, not "
            f"{config.gradient_checkpointing}; use full, or no activations"
        )
    if "reference" in parts and not (isinstance(config, GRPOConfig) and config.beta):
        raise ValueError("offload=reference without a reference model; take it out of offload")


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
    _check_backend(config)
    _check_rewards(config)


def _check_backend(config: GRPOConfig) -> None:
    """Checks what generation by servers needs."""
    rollout = config.rollout
    if rollout.backend == "local":
        if rollout.max_staleness:
            raise ValueError(
                f"rollout.max_staleness={rollout.max_staleness} with rollout.backend=local, where "
                "the training devices generate; use rollout.backend=vllm, or 0"
            )
        return
    needed = ("teacher",) if rollout.protocol == "direct" else ("teacher", "student")
    for role in needed:
        if not getattr(rollout, f"{role}_servers"):
            raise ValueError(
                f"rollout.backend=vllm without rollout.{role}_servers; give their addresses, or "
                "run launch/launch_with_server.sh"
            )
    if config.min_p:
        raise ValueError(
            f"min_p={config.min_p} with rollout.backend=vllm: vLLM cuts by min_p before it takes "
            "log-probabilities, so that they lack what was cut; use top_p or top_k, and min_p=0"
        )
    if rollout.max_staleness and config.importance_sampling == "none":
        raise ValueError(
            f"rollout.max_staleness={rollout.max_staleness} trains on completions of older "
            "weights, which importance_sampling=none leaves uncorrected; use token or sequence"
        )


def _check_rewards(config: GRPOConfig) -> None:
    reward = config.reward
    for name in reward.names:
        if name not in REWARDS:
            hint = nearest(name, REWARDS)
            raise ValueError(f"reward.names has {name!r}; known are {', '.join(REWARDS)}{hint}")
    if reward.weights and len(reward.weights) != len(reward.parts):
        raise ValueError(
            f"reward.weights={reward.weights} for {reward.parts}; give one weight for each name, "
            "or none"
        )
    if not reward.names or len(set(reward.names)) < len(reward.names):
        raise ValueError(
            f"reward.names={reward.names} must name each reward once, and one at least"
        )
    if any(secs < 0 for secs in reward.retry_waits_secs):
        raise ValueError(
            f"reward.retry_waits_secs={reward.retry_waits_secs} must be 0 or more; give none to "
            "stop at once"
        )
    if "rim" in reward.parts:
        check_rim(reward.rim)
        if config.rollout.protocol == "direct" and set(reward.rim.judge_names) - {"accuracy"}:
            raise ValueError(
                f"the judges {', '.join(reward.rim.judge_names)} are active, and protocol=direct "
                "has no lesson to judge; leave accuracy alone on in reward.rim.active_judges"
            )
    if config.rollout.protocol == "direct" and "teaching_gain" in reward.parts:
        raise ValueError(
            "the reward teaching_gain compares a student's answers, and protocol=direct has no "
            "student; use reward.names=('exact_match',)"
        )


def check_rim(rim: RIMConfig) -> None:
    """Checks the options of the judges.

    Raises:
        ValueError: names the option, its value and what to write instead.
    """
    _check_values(flat(rim, "reward.rim."))
    if not rim.judge_names:
        raise ValueError("reward.rim.active_judges are all False; set one at least to True")
    temperatures = rim.temperatures
    if len(set(temperatures)) != max(len(temperatures), 1) or min(temperatures) < 0:
        raise ValueError(
            f"reward.rim.temperatures={temperatures} must be 0 or more, each of them once, and "
            "one at least"
        )
    if rim.replay and not rim.cache_dir:
        raise ValueError("reward.rim.replay=True without a cache; set reward.rim.cache_dir")
    endpoints.resolve_all(rim)


def check_environment(config: TrainConfig) -> None:
    """Checks the keys that a run reads from the environment.

    Raises:
        ValueError: names the variable that is not set.
    """
    if isinstance(config, GRPOConfig) and "rim" in config.reward.parts:
        rim = config.reward.rim
        for endpoint in endpoints.resolve_all(rim).values() if not rim.replay else ():
            endpoints.api_key(endpoint)


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
        (SHARES, lambda v: 0 <= v <= 1, "at least 0 and at most 1"),
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
_PASSWORD = re.compile(
    r"(?P<url>\w+://[^/\s:@]*:)\S*(?=@)|(?P<key>password=)('(\\.|[^'\\])*'|[^\s&]*)", re.IGNORECASE
)


def masked(config: TrainConfig) -> dict[str, Any]:
    """Returns the config as a JSON-ready nested dict, without passwords and keys."""

    def mask(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: mask(k, v) for k, v in value.items()}
        if isinstance(value, str) and value and _SECRET_NAME.search(name):
            return "***"
        if not isinstance(value, str):
            return value
        return _PASSWORD.sub(lambda m: f"{m['url'] or m['key']}***", value)

    return mask("", dataclasses.asdict(config))
