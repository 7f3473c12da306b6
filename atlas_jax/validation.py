"""What options may hold, alone and together: checked before JAX starts. Imports no JAX."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from typing import Any

from atlas_jax import addresses, endpoints, sockets
from atlas_jax.option_rules import (
    CHOICES,
    FRACTIONS,
    NOT_NEGATIVE,
    OFFLOADS,
    POSITIVE,
    REWARDS,
    SHARES,
)
from atlas_jax.options import MeshConfig, TrainConfig
from atlas_jax.options_grpo import GRPOConfig, RolloutConfig
from atlas_jax.options_rim import UNKNOWN_PRICE, JudgeModel, RIMConfig


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
    if "params" in parts and isinstance(config, GRPOConfig) and config.rollout.backend == "local":
        raise ValueError(
            f"offload={config.offload} with rollout.backend=local, which would fetch every layer "
            "from host memory for every token; use rollout.backend=vllm, or leave params out"
        )


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
        if not addresses.split(getattr(rollout, f"{role}_servers")):
            raise ValueError(
                f"rollout.backend=vllm without rollout.{role}_servers; give their addresses, or "
                "run launch/launch_with_server.sh"
            )
    _check_addresses(rollout)
    if config.min_p:
        raise ValueError(
            f"min_p={config.min_p} with rollout.backend=vllm: vLLM cuts by min_p before it takes "
            "log-probabilities, so that they lack what was cut; use top_p or top_k, and min_p=0"
        )
    if rollout.max_staleness and rollout.refill_rounds:
        raise ValueError(
            f"rollout.refill_rounds={rollout.refill_rounds} with rollout.max_staleness="
            f"{rollout.max_staleness}: processes agree on refills, which they cannot do beside a "
            "step; set one of them to 0"
        )
    if rollout.max_staleness and rollout.weight_sync == "restart":
        raise ValueError(
            f"rollout.max_staleness={rollout.max_staleness} with rollout.weight_sync=restart, "
            "which ends what is in flight; use 0, or servers that reload"
        )
    if rollout.max_staleness and config.importance_sampling == "none":
        raise ValueError(
            f"rollout.max_staleness={rollout.max_staleness} trains on completions of older "
            "weights, which importance_sampling=none leaves uncorrected; use token or sequence"
        )


def _check_addresses(rollout: RolloutConfig) -> None:
    """Checks that each server is named once: it has the weights of one role."""
    named: dict[str, str] = {}
    for option in ("teacher_servers", "student_servers"):
        for url in addresses.split(getattr(rollout, option)):
            server = addresses.canonical(url)
            if server in named:
                raise ValueError(
                    f"rollout.{option} has {url}, which stands in rollout.{named[server]} already; "
                    "start a server for each role, and name each of them once"
                )
            named[server] = option


def _check_rewards(config: GRPOConfig) -> None:
    reward = config.reward
    for name in reward.names:
        if name not in REWARDS and not sockets.is_reference(name):
            hint = nearest(name, REWARDS)
            raise ValueError(
                f"reward.names has {name!r}; known are {', '.join(REWARDS)}, and functions of your "
                f"own as package.module:function{hint}"
            )
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
    for name, model in (("small_model", rim.small_model), ("large_model", rim.large_model)):
        _check_prices(f"reward.rim.{name}", model, rim.limits.max_cost)


def _check_prices(name: str, model: JudgeModel, max_cost: float) -> None:
    """Checks the prices of a judge's model, and that they are known where a budget needs them."""
    for option in ("input_price", "output_price"):
        price = getattr(model, option)
        if price < 0 and price != UNKNOWN_PRICE:
            raise ValueError(
                f"{name}.{option}={price} must be 0 or more, or {UNKNOWN_PRICE:g} where it is not "
                "known"
            )
    if max_cost and endpoints.prices(model) is None:
        where = f" at {model.base_url}" if model.base_url else ""
        raise ValueError(
            f"reward.rim.limits.max_cost={max_cost:g}, and the price of {name} ({model.model}"
            f"{where}) is not known; set {name}.input_price and {name}.output_price, or max_cost=0"
        )


def check_environment(config: TrainConfig) -> None:
    """Checks the keys that a run reads from the environment.

    Raises:
        ValueError: names the variable that is not set.
    """
    if isinstance(config, GRPOConfig) and "rim" in config.reward.parts:
        rim = config.reward.rim
        for endpoint in endpoints.resolve_all(rim).values() if not rim.replay else ():
            endpoints.api_key(endpoint)


def mesh_shape(mesh: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Returns the sizes of the axes `data`, `fsdp` and `tensor` over so many devices.

    Raises:
        ValueError: if they do not multiply to the number of devices.
    """
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    fixed = math.prod(size for size in sizes if size != -1)
    if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
        raise ValueError(
            f"mesh data={mesh.data} x fsdp={mesh.fsdp} x tensor={mesh.tensor} does not use "
            f"{num_devices} devices exactly; set one size to -1 and let the others divide "
            f"{num_devices}"
        )
    data, fsdp, tensor = (num_devices // fixed if size == -1 else size for size in sizes)
    return data, fsdp, tensor


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
    for name, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name}={value} must be finite")
