"""Options of every recipe, with those of devices and model, and of SFT, which has no others."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from atlas_jax import masking
from atlas_jax.options.data import DataConfig, LessonsConfig
from atlas_jax.options.fields import (
    Fraction,
    JsonObject,
    NonNegative,
    NonNegativeInt,
    OptionalPath,
    Positive,
    PositiveInt,
    PositiveShare,
    Share,
    Words,
    check_values,
    moved,
    some_of,
    take_moved,
)

if TYPE_CHECKING:
    from atlas_jax.options.judges import RIMConfig


AxisSize = Annotated[
    int, Meta(ge=-1, extra={"rule": "above 0, or -1 for all devices that are left"})
]


AutoOrBool = Annotated[
    bool | Literal["auto"],
    Meta(extra={"choices": ("auto", "true", "false")}),
    Words((("true", True), ("yes", True), ("false", False), ("no", False))),
]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left."""

    data: AxisSize = 1
    """Number of replicas of the model. The rows of a batch are split over them."""
    fsdp: AxisSize = -1
    """Number of parts that parameters, gradients and optimizer state are split into. The rows of a
    batch are split over them too."""
    tensor: AxisSize = 1
    """Number of parts that attention heads, hidden units and the vocabulary are split into."""

    def check(self) -> None:
        """Checks the sizes together.

        Raises:
            ValueError: names the sizes.
        """
        sizes = (self.data, self.fsdp, self.tensor)
        if 0 in sizes or sizes.count(-1) > 1:
            raise ValueError(f"mesh sizes {sizes} must be positive, and one of them at most -1")

    def shape(self, num_devices: int) -> tuple[int, int, int]:
        """Returns the sizes of the axes `data`, `fsdp` and `tensor` over so many devices.

        Raises:
            ValueError: if they do not multiply to the number of devices.
        """
        sizes = (self.data, self.fsdp, self.tensor)
        fixed = math.prod(size for size in sizes if size != -1)
        if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
            raise ValueError(
                f"mesh data={self.data} x fsdp={self.fsdp} x tensor={self.tensor} does not use "
                f"{num_devices} devices exactly; set one size to -1 and let the others divide "
                f"{num_devices}"
            )
        data, fsdp, tensor = (num_devices // fixed if size == -1 else size for size in sizes)
        return data, fsdp, tensor


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Times for which the processes of a run wait for each other before they end with an error."""

    start_timeout_secs: PositiveInt = 300
    """Seconds that processes wait at the start until the last one is there."""
    heartbeat_timeout_secs: PositiveInt = 100
    """Seconds without a heartbeat after which a process counts as dead."""
    stall_timeout_secs: PositiveInt = 1800
    """Seconds that processes wait for a live one at a point that all must reach."""


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Low-rank adaptation (arXiv:2106.09685): factors are trained, the model itself stays."""

    rank: NonNegativeInt = 0
    """Rank of the factors; 0 trains the whole model. Above 0 the model itself stays as it is, in
    `model.compute_dtype`."""
    alpha: Positive = 32.0
    """Product of the factors is multiplied by `alpha / rank`."""
    rslora: bool = False
    """Multiplies by `alpha / sqrt(rank)` instead (arXiv:2312.03732)."""
    dropout: Fraction = 0.0
    """Share of the inputs of the factors that are set to 0 in training."""
    targets: tuple[
        Literal[
            "all-linear",
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        ...,
    ] = ("all-linear",)
    """Matrices of each layer that have factors, by their names in PEFT; `all-linear` is all of
    them."""
    export: Literal["adapter", "merged"] = "adapter"
    """Content of `final/`: an adapter directory of PEFT, or the whole model with the factors
    added."""

    def check(self) -> None:
        """Checks the names together.

        Raises:
            ValueError: names them.
        """
        if not self.targets or ("all-linear" in self.targets and len(self.targets) > 1):
            raise ValueError(
                f"model.lora.targets={self.targets} must be all-linear alone, or names of matrices"
            )


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Number formats and files of the model; its `config.json` says what it is."""

    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the parameters between steps. `bfloat16` halves their memory; updates are still
    computed in float32 and added with stochastic rounding, and gradient sums, norms and the second
    moment stay float32."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of activations and of the weights in matrix products; `auto` is bfloat16 on
    accelerators and float32 on CPU. Norms, logits, losses and log-probabilities are float32.
    `float32` means full float32 products, not TF32 or bfloat16 passes."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which the gradients of layers are summed over devices. `bfloat16` halves the
    bytes that this sends, and rounds each device's gradient where `compute_dtype` is bfloat16.
    Microbatches are summed in float32 in any case."""
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights in `final/`; `auto` stores each tensor in the data type that it has
    in the files of `model_name_or_path`, whatever their `config.json` says."""
    max_shard_size: PositiveInt = 5_000_000_000
    """Bytes of a safetensors file above which an export is split over several files."""
    lora: LoraOptions = LoraOptions()


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of every recipe; the names are those of TRL and of the original."""

    algorithm: str = ""
    """Name of the recipe that runs. The config file sets it, never a flag."""
    model_name_or_path: str = ""
    """Model that is trained: a Hugging Face directory, a `.gguf` file or a hub id."""
    tokenizer_name_or_path: str = ""
    """Directory or hub id of the tokenizer; empty takes the model's own."""
    chat_template_kwargs: JsonObject = ""
    """Variables of the chat template, such as `{"enable_thinking": false}`, for training and
    generation alike."""
    output_dir: str = ""
    """Directory for everything that the run writes. Running the same command again continues
    there."""
    resume_from: str = ""
    """Source of a new run's weights: the `output_dir` of another run, one of its
    `checkpoints/STEP`, or a model directory. Step, optimizer, schedule and position in the data
    begin anew. A run that has a checkpoint of its own continues from that instead."""
    seed: NonNegativeInt = 42
    """Seed of everything that is drawn at random."""
    learning_rate: Positive = 2e-5
    """Highest learning rate of the schedule."""
    lr_scheduler_type: Annotated[
        Literal["constant", "linear", "cosine", "wsd"],
        Words(
            (
                ("constant_with_warmup", "constant"),
                ("cosine_with_min_lr", "cosine"),
                ("warmup_stable_decay", "wsd"),
            )
        ),
    ] = "cosine"
    """Course of the learning rate after the warm-up. `linear` and `cosine` fall from there to the
    end, `wsd` stays at the peak and falls, by half a cosine, over the last `lr_decay_ratio`."""
    warmup_ratio: Fraction = 0.1
    """Share of all steps over which the learning rate rises from 0."""
    lr_decay_ratio: PositiveShare = 0.1
    """Share of all steps over which `lr_scheduler_type=wsd` falls."""
    min_lr_ratio: Share = 0.0
    """Learning rate at the end over `learning_rate`. A constant one does not fall."""
    optim: Annotated[
        Literal["adamw", "muon"],
        Words((("adamw_torch", "adamw"), ("adamw_torch_fused", "adamw"), ("adamw_hf", "adamw"))),
    ] = "adamw"
    """Optimizer. `muon` orthogonalizes the momentum of each layer's matrices and takes AdamW for
    the tables, norms and biases. Its updates have the size of AdamW's, so `learning_rate` and
    `weight_decay` keep their meaning."""
    muon_momentum: Fraction = 0.95
    """Decay of Muon's momentum."""
    ema_decay: Fraction = 0.0
    """Decay of an exponential moving average of the weights, which `final/` and `best/` then hold;
    0 keeps none. It takes 4 bytes a parameter. Evaluations see the average, those of GRPO the
    trained weights, which its servers hold."""
    weight_decay: NonNegative = 0.01
    """Weight decay of AdamW, decoupled from the gradient. It applies to matrices only; norms and
    biases have none."""
    max_grad_norm: NonNegative = 1.0
    """Global norm that gradients are clipped to; 0 clips nothing."""
    adam_beta1: Fraction = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Fraction = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: Positive = 1e-8
    """Term that AdamW adds to the denominator."""
    adam_mu_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the first moment; `auto` is `model.param_dtype`. The second moment is
    float32."""
    num_train_epochs: Positive = 1.0
    """Number of passes over the data, where `max_steps` is -1."""
    max_steps: Annotated[int, Meta(ge=-1, extra={"rule": "above 0, or -1 to count epochs"})] = -1
    """Number of optimizer steps; -1 counts `num_train_epochs` instead."""
    per_device_train_batch_size: PositiveInt = 2
    """Rows of one forward pass on each device of the `data` and `fsdp` axes. Where
    `gradient_accumulation_steps` is inferred, it is the most rows of one forward pass."""
    gradient_accumulation_steps: NonNegativeInt = 0
    """Forward passes of an optimizer step; 0 infers it from `train_batch_size`, or is 1 without
    that."""
    train_batch_size: NonNegativeInt = 0
    """Rows of an optimizer step over all devices. Any number of devices that divides it trains the
    same. 0 is the product of `per_device_train_batch_size`, `gradient_accumulation_steps` and the
    devices."""
    gradient_checkpointing: Annotated[
        Literal["none", "dots", "mlp", "full"], Words((("true", "full"), ("false", "none")))
    ] = "full"
    """Recomputation in the backward pass, in order of memory: `none` computes no matrix product
    twice, `dots` also recomputes the scores of `xla` attention, `mlp` the MLP but no attention, and
    `full` all but attention. What attention returns is kept by each, except with
    `offload=activations`. `true` and `false` mean `full` and `none`."""
    attn_implementation: Annotated[
        Literal["auto", "xla", "cudnn", "splash"], Words((("flash_attention_2", "auto"),))
    ] = "auto"
    """Implementation of attention: `xla`, `cudnn` (NVIDIA), `splash` (TPU), or `auto` for the
    device's flash attention."""
    max_seq_length: PositiveInt = 2048
    """Most tokens of a row. Longer examples are cut there and counted."""
    packing: AutoOrBool = "auto"
    """Puts several examples in a row (best fit), kept apart by segment ids; batch sizes then count
    such rows. `auto` does so where attention needs no mask for it (TPU; NVIDIA from Hopper on).
    Without it the rows of a step are sorted by length, and each forward pass is padded for its own
    rows. For SFT only."""
    loss_chunk_size: PositiveInt = 1024
    """Number of trained positions of a device whose logits exist at one time."""
    logging_steps: PositiveInt = 1
    """Steps between two lines of metrics."""
    summary_steps: PositiveInt = 10
    """Steps between two summaries of the log: means since the last one, with arrows against it."""
    terminal: Literal["auto", "lines", "quiet"] = "auto"
    """Content of standard error: `auto` has a status line and summaries in a terminal, and all
    metrics of each step elsewhere; `lines` has the latter in a terminal too; `quiet` has warnings,
    errors and the result. `training.log` has all of it in any case."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Receivers of the metrics beside `metrics.jsonl`: some of `tensorboard`, `wandb`, `trackio`,
    `stdout` (lines of JSON) and functions `package.module:function`, which are called with the step
    and a dict of its metrics. `none` reports nowhere."""
    profile_steps: tuple[NonNegativeInt, ...] = ()
    """First and last step that `jax.profiler` traces into `output_dir/profile`; empty traces
    none."""
    save_steps: NonNegativeInt = 100
    """Steps between two checkpoints; 0 saves at the end only."""
    save_total_limit: NonNegativeInt = 3
    """Number of checkpoints that are kept, newest first; 0 keeps all."""
    save_only_model: bool = False
    """Leaves only the parameters in checkpoints before the newest one, which alone continues the
    run."""
    eval_steps: NonNegativeInt = 0
    """Steps between two evaluations; 0 evaluates at the end only."""
    eval_on_start: bool = False
    """Evaluates before the first step too."""
    metric_for_best_model: Annotated[
        str, Meta(pattern="^(eval/.+)?$", extra={"rule": "empty, or a metric such as eval/loss"})
    ] = ""
    """Metric of evaluations whose best model is kept in `best/`, a model directory as `final/` is;
    empty keeps none."""
    greater_is_better: AutoOrBool = "auto"
    """Direction of `metric_for_best_model`. `auto` is true unless the name ends with `loss`."""
    sharding: Literal["fsdp", "zero1", "replicated"] = "fsdp"
    """Trees that are split over the `fsdp` axis: `fsdp` splits parameters, gradients and optimizer
    state (ZeRO-3), `zero1` gradients and optimizer state (ZeRO-1/2), `replicated` nothing."""
    offload: Annotated[str, some_of("optimizer", "params", "activations", "reference")] = "none"
    """Arrays that stay in host memory: `optimizer` (its state), `params` (of the layers, each
    fetched as it computes; not with `rollout.backend=local`), `activations` (those that
    `gradient_checkpointing=full` keeps) and `reference` (the layers of GRPO's reference model)."""
    compilation_cache_dir: OptionalPath = "~/.cache/atlas_jax/xla"
    """Directory in which compiled programs are kept between runs; empty keeps none. A run on
    several CPU devices keeps none either. Hosts that do not share it keep them in `output_dir`."""
    data: DataConfig = DataConfig()
    teaching: LessonsConfig = LessonsConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    model: ModelOptions = ModelOptions()

    def __post_init__(self) -> None:
        """Moves values that were given under former names to the present ones."""
        take_moved(self)

    @property
    def asks_questions(self) -> bool:
        """True if rows are questions, false if they are examples to learn."""
        return False

    @property
    def may_pack(self) -> bool:
        """True if a row may hold several examples."""
        return not self.asks_questions

    @property
    def group_size(self) -> int:
        """Number of rows of a batch that belong together and must not be split over steps."""
        return 1

    @property
    def updates_per_step(self) -> int:
        """Number of updates on the rows of a step."""
        return 1

    @property
    def updates_per_pass(self) -> int:
        """Number of equal parts of a step's rows, each of which makes an update of its own."""
        return 1

    @property
    def has_reference(self) -> bool:
        """True if a frozen reference model is kept beside the trained one."""
        return False

    @property
    def generates_locally(self) -> bool:
        """True if the training devices generate completions."""
        return False

    @property
    def generates_elsewhere(self) -> str:
        """Option with which these devices would generate nothing; empty if they never do."""
        return ""

    @property
    def servers_option(self) -> str:
        """Option with which vLLM servers generate completions or score them; empty if none do."""
        return ""

    @property
    def sends_by_nccl(self) -> bool:
        """True if servers get the weights through NCCL."""
        return False

    @property
    def functions(self) -> dict[str, str]:
        """Options whose values are functions of the user's own, `package.module:function`."""
        return {"data.source": self.data.source} if self.data.source else {}

    @property
    def reward_functions(self) -> tuple[str, ...]:
        """Rewards that are functions of the user's own, `package.module:function`."""
        return ()

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that the model reads or writes."""
        return self.longest_generation or self.max_seq_length

    @property
    def longest_generation(self) -> int:
        """Most tokens of a prompt with its completion; 0 if nothing is generated."""
        return 0

    @property
    def student(self) -> str:
        """Name of the frozen student model; empty if there is none."""
        return ""

    @property
    def teacher(self) -> str:
        """Name of the frozen model whose distribution is learnt here; empty if there is none."""
        return ""

    @property
    def judges(self) -> RIMConfig | None:
        """Options of the judges; None if none are asked."""
        return None

    def check(self, given_rewards: Sequence[Any] = ()) -> None:
        """Checks each option, and those that must fit each other.

        Args:
            given_rewards: rewards of a caller from Python, in place of `reward.names`.

        Raises:
            ValueError: names the options, their values and what to write instead.
        """
        for name in ("model_name_or_path", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; set --config.{name}=…")
        check_values(self)
        self.data.check()
        self.mesh.check()
        self.model.lora.check()
        if os.path.realpath(self.output_dir) == os.path.realpath(self.model_name_or_path):
            raise ValueError(
                f"output_dir={self.output_dir} is the model's own directory; name another one"
            )
        if self.max_steps == 0:
            raise ValueError("max_steps=0 must be above 0, or -1 to count epochs")
        steps = self.profile_steps
        if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
            raise ValueError(
                f"profile_steps={steps} must be the first and the last step to trace, such as "
                "(10, 12)"
            )
        self._check_schedule()
        self._check_offload()

    def _check_schedule(self) -> None:
        if self.lr_scheduler_type == "constant" and self.min_lr_ratio:
            raise ValueError(
                f"min_lr_ratio={self.min_lr_ratio} with lr_scheduler_type=constant, which does not "
                "fall; choose linear, cosine or wsd, or set min_lr_ratio=0"
            )
        if self.optim == "muon" and self.model.lora.rank:
            raise ValueError(
                f"optim=muon with model.lora.rank={self.model.lora.rank}: Muon orthogonalizes "
                "whole matrices, not factors; use optim=adamw"
            )
        if self.lr_scheduler_type == "wsd" and self.warmup_ratio + self.lr_decay_ratio > 1:
            raise ValueError(
                f"warmup_ratio={self.warmup_ratio} and lr_decay_ratio={self.lr_decay_ratio} are "
                "more than all steps; lower one of them"
            )

    def _check_offload(self) -> None:
        parts = self.offload.split(",")
        if "activations" in parts and self.gradient_checkpointing != "full":
            raise ValueError(
                f"offload=activations moves what gradient_checkpointing=full keeps, not "
                f"{self.gradient_checkpointing}; use full, or no activations"
            )
        if "reference" in parts and not self.has_reference:
            raise ValueError("offload=reference without a reference model; take it out of offload")
        if "params" in parts and self.generates_locally:
            raise ValueError(
                f"offload={self.offload} with generation on these devices, which would fetch every "
                "layer from host memory for every token; leave params out, or set "
                f"{self.generates_elsewhere}"
            )


@dataclasses.dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning: cross entropy on what the assistant writes."""

    algorithm: str = "sft"


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Division of the rows of one optimizer step."""

    global_rows: int
    """Rows an optimizer step, over all devices."""
    microbatches: int
    """Sequential forward passes an optimizer step."""
    device_rows: int
    """Rows in one forward pass on each device of the `data` and `fsdp` axes."""


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
