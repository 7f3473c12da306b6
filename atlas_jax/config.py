"""Every option of every run, as frozen dataclasses. Imports no JAX.

A config file calls `defaults(SFTConfig)`, which returns a locked `ConfigDict` with every field, and
changes what differs; `train.py` calls `freeze` on the result, which gives back the frozen
dataclass, and `validate` on that. A field that is absent here cannot be set anywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import re
from typing import Any, TypeVar

from ml_collections import ConfigDict

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where training rows come from and how they become token sequences."""

    dataset_path: str = ""
    """A `.jsonl` or `.parquet` file, several separated by commas, a hub dataset (`owner/name`), or
    one file of it (`owner/name:folder/file.jsonl`)."""
    dataset_split: str = "train"
    """Split of a hub dataset; files have none."""
    dataset_max_samples: int = 0
    """Rows kept, drawn at random with `seed`; 0 keeps all."""
    format: str = "auto"
    """`messages`, `prompt_completion`, `teaching`, or `auto`: told from the fields of the rows."""
    eval_path: str = ""
    """Rows to evaluate on, in the forms of `dataset_path`; takes precedence over the ratio."""
    eval_split: str = "test"
    """Split that is read where `eval_path` is a hub dataset."""
    eval_split_ratio: float = 0.0
    """Share of the rows held out for evaluation when `eval_path` is empty."""
    shuffle: bool = True
    """Draw a new order every epoch; false keeps the order of the file."""
    completion_only: bool = True
    """Train on what the assistant writes only; false trains on prompts too."""
    system_prompt: str = ""
    """System message put before rows that have none."""
    teacher_template: str = ""
    """User message of a `teaching` row; fields `{question}` and `{approach}`."""
    lesson_template: str = ""
    """Assistant message of a `teaching` row; fields `{approach} {diagnosis} {teaching}`."""
    length_buckets: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    """Row lengths that unpacked batches are padded to; one compilation each."""
    max_rejected_frac: float = 0.01
    """Share of unreadable rows above which the run stops."""
    num_workers: int = 2
    """Threads that assemble batches ahead of the step."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left."""

    data: int = 1
    """Replicas of the model; batch rows are split over them."""
    fsdp: int = -1
    """Parts that parameters, gradients and optimizer state are split in; batch rows too."""
    tensor: int = 1
    """Parts that heads, hidden units and the vocabulary are split in."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How the model is held and computed; what it is comes from its `config.json`."""

    param_dtype: str = "float32"
    """dtype of the master parameters and of the optimizer's moments."""
    compute_dtype: str = "auto"
    """dtype of activations and of the weights in matrix products; `auto` is bfloat16 on
    accelerators and float32 on CPU. Norms, logits, losses and log-probabilities are float32."""
    export_dtype: str = "auto"
    """dtype of `final/`; `auto` is what the source was stored in."""
    max_shard_size: int = 5_000_000_000
    """Bytes above which an export is split over several safetensors files."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What every recipe shares; the names are those of TRL and of the original."""

    algorithm: str = ""
    """The recipe that runs; set by the config file, never by hand."""
    model_name_or_path: str = ""
    """Hugging Face directory, `.gguf` file or hub id of the model that is trained."""
    tokenizer_name_or_path: str = ""
    """Where the tokenizer comes from; empty takes the model's own."""
    output_dir: str = ""
    """Everything that the run writes. Running the same command again continues there."""
    resume_from: str = ""
    """Another run's `output_dir` to start from, when this run has no checkpoint of its own."""
    seed: int = 42
    learning_rate: float = 2e-5
    """Peak of the schedule."""
    lr_scheduler_type: str = "cosine"
    """`constant`, `linear` or `cosine`, each after the warm-up."""
    warmup_ratio: float = 0.1
    """Share of all steps over which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """Decoupled (AdamW) and for matrices only: norms and biases have none."""
    max_grad_norm: float = 1.0
    """Global norm that gradients are clipped to; 0 clips nothing."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    num_train_epochs: float = 1.0
    """Passes over the data when `max_steps` is -1."""
    max_steps: int = -1
    """Optimizer steps; -1 takes `num_train_epochs`."""
    per_device_train_batch_size: int = 2
    """Rows in one forward pass on each device of the `data` and `fsdp` axes."""
    gradient_accumulation_steps: int = 0
    """Forward passes an optimizer step; 0 is inferred from `train_batch_size`, or is 1."""
    train_batch_size: int = 0
    """Rows an optimizer step over all devices; 0 is the product of the other two."""
    gradient_checkpointing: str = "full"
    """`none` computes no matrix product twice, `dots` recomputes attention, `full` keeps a vector a
    layer and recomputes the rest; `true` and `false` mean `full` and `none`."""
    attn_implementation: str = "auto"
    """`xla`, `cudnn` (NVIDIA), `splash` (TPU), or `auto`: the device's flash attention."""
    max_seq_length: int = 2048
    """Tokens in a row; longer examples are cut there and counted."""
    packing: bool = False
    """Put several examples in a row (best fit), kept apart by segment ids."""
    loss_chunk_size: int = 256
    """Positions a row whose logits exist at one time."""
    logging_steps: int = 1
    save_steps: int = 100
    """Steps between checkpoints; 0 saves at the end only."""
    save_total_limit: int = 3
    """Checkpoints kept, newest first; 0 keeps all."""
    eval_steps: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    sharding: str = "fsdp"
    """`fsdp` splits parameters, gradients and optimizer state over the `fsdp` axis (ZeRO-3),
    `zero1` gradients and optimizer state (ZeRO-1/2), `replicated` nothing."""
    offload: str = "none"
    """`optimizer` keeps the optimizer state in host memory between steps."""
    compilation_cache_dir: str = "~/.cache/atlas_jax/xla"
    """Compiled programs are kept here between runs; empty keeps none."""
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    model: ModelOptions = ModelOptions()


@dataclasses.dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning: cross entropy on what the assistant writes."""

    algorithm: str = "sft"


ALGORITHMS: dict[str, type[TrainConfig]] = {"sft": SFTConfig}

CHOICES = {
    "lr_scheduler_type": ("constant", "linear", "cosine"),
    "gradient_checkpointing": ("none", "dots", "full"),
    "attn_implementation": ("auto", "xla", "cudnn", "splash"),
    "sharding": ("fsdp", "zero1", "replicated"),
    "offload": ("none", "optimizer"),
    "data.format": ("auto", "messages", "prompt_completion", "teaching"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.compute_dtype": ("auto", "float32", "bfloat16"),
    "model.export_dtype": ("auto", "float32", "bfloat16", "float16"),
}

_SYNONYMS = {
    ("gradient_checkpointing", "true"): "full",
    ("gradient_checkpointing", "false"): "none",
    ("attn_implementation", "flash_attention_2"): "auto",
}

_POSITIVE = (
    "per_device_train_batch_size", "max_seq_length", "loss_chunk_size", "logging_steps",
    "num_train_epochs", "learning_rate", "adam_epsilon", "model.max_shard_size", "data.num_workers",
)  # fmt: skip
_NOT_NEGATIVE = (
    "gradient_accumulation_steps", "train_batch_size", "save_steps", "save_total_limit",
    "eval_steps", "weight_decay", "max_grad_norm", "data.dataset_max_samples",
)  # fmt: skip
_FRACTIONS = ("warmup_ratio", "data.eval_split_ratio", "data.max_rejected_frac")


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
    value = _SYNONYMS.get((name, str(value).lower()), value)
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
    axes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if sum(a == -1 for a in axes) > 1 or any(a == 0 or a < -1 for a in axes):
        raise ValueError(f"mesh sizes {axes} must be positive, and one of them at most -1")


def _check_values(values: dict[str, Any]) -> None:
    """Checks each option by itself."""
    for name, choices in CHOICES.items():
        if name in values and values[name] not in choices:
            hint = nearest(str(values[name]), choices)
            raise ValueError(f"{name}={values[name]!r} is not one of {', '.join(choices)}{hint}")
    for names, holds, rule in (
        (_POSITIVE, lambda v: v > 0, "above 0"),
        (_NOT_NEGATIVE, lambda v: v >= 0, "0 or more"),
        (_FRACTIONS, lambda v: 0 <= v < 1, "at least 0 and below 1"),
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
