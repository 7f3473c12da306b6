"""The options of every run, as frozen dataclasses; `options_grpo` has GRPO's. Imports no JAX.

What is absent here cannot be set anywhere; the text behind an option is its documentation.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """What rows call the fields that training reads; empty for the names that are looked for."""

    messages: str = ""
    """A conversation, for SFT."""
    prompt: str = ""
    """What is given, for SFT."""
    completion: str = ""
    """What is learned, for SFT."""
    tools: str = ""
    """Tools that the assistant may call, for SFT."""
    question: str = ""
    """What is asked, for GRPO."""
    ground_truth: str = ""
    """What is right, for GRPO."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where training rows come from and how they become token sequences."""

    dataset_path: str = ""
    """A file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.arrow`; texts may end in `.gz` or
    `.zst`), a pattern such as `data/*.jsonl`, a directory, a hub dataset (`owner/name`), or one
    file of it (`owner/name:folder/file.jsonl`); several are separated by commas."""
    dataset_config: str = ""
    """Subset of a hub dataset, such as `main` of `openai/gsm8k`."""
    dataset_split: str = "train"
    """Split of a hub dataset; files have none, also those of a hub dataset."""
    dataset_max_samples: int = 0
    """Rows kept, drawn at random with `seed`; 0 keeps all."""
    format: str = "auto"
    """`messages`, `prompt_completion`, `teaching`, `session` (traces of the Atlas runtime), or
    `auto`: told from the fields of the rows, for all but sessions."""
    columns: ColumnsConfig = ColumnsConfig()
    db_url: str = ""
    """The runtime's database, `postgresql://user:password@host:5432/name`, in place of
    `dataset_path`."""
    refresh: bool = False
    """Read the database again, which a run otherwise does once, for its snapshot."""
    statement_timeout_secs: float = 30.0
    """After which the database gives up a statement."""
    max_sessions: int = 0
    """Sessions read from the database, the newest; 0 reads all."""
    min_reward: float = 0.0
    """Lowest `reward_stats.score` of a session; 0 takes those without a score too."""
    status_filters: tuple[str, ...] = ()
    """Sessions taken by status, such as `succeeded`; empty takes all."""
    review_status_filters: tuple[str, ...] = ("approved",)
    """Sessions taken by review; empty takes the pending and quarantined ones too."""
    learning_key: str = ""
    """The only learning key whose sessions are taken."""
    created_after: str = ""
    """Earliest time of a session, inclusive, such as `2025-12-31` or with a time of day, in UTC."""
    created_before: str = ""
    """Latest time of a session, exclusive."""
    include_trajectory_events: bool = True
    """Read a session's events, which tell what a teacher wrote where its steps do not."""
    answer_as_truth: bool = True
    """Take the final answer of a session that succeeded and was approved as the ground truth where
    none was recorded."""
    eval_path: str = ""
    """Rows to evaluate on, in the forms of `dataset_path`; takes precedence over the ratio."""
    eval_split: str = "test"
    """Split that is read where `eval_path` is a whole hub dataset."""
    eval_split_ratio: float = 0.0
    """Share of the rows held out for evaluation when `eval_path` is empty."""
    shuffle: bool = True
    """Draw a new order every epoch; false keeps the order of the file."""
    completion_only: bool = True
    """Train on what the assistant writes only; false trains on prompts too."""
    turns: str = "each"
    """Where the chat template changes earlier turns (Qwen3): `each` makes an example of every
    assistant turn, as the model would have seen it, at a cost that grows with the square of a
    conversation's length; `history` makes one of the conversation, its earlier turns trained as the
    template shows them before later ones."""
    system_prompt: str = ""
    """System message put before rows that have none."""
    teacher_template: str = ""
    """User message of a `teaching` row; fields `{question}` and `{approach}`."""
    lesson_template: str = ""
    """Assistant message of a `teaching` row; fields `{approach} {diagnosis} {teaching}`."""
    length_buckets: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    """Row lengths that unpacked batches are padded to; one compilation each."""
    max_rejected_frac: float = 0.01
    """Share of rows above which the run stops: those that cannot be read, are empty, or are cut or
    left without a trained token by `max_seq_length`."""
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
class HostsConfig:
    """How long the processes of a run wait for each other before they end with an error."""

    start_timeout_secs: int = 300
    """For the last process to start."""
    heartbeat_timeout_secs: int = 100
    """For a sign of life of a process."""
    stall_timeout_secs: int = 1800
    """For a process that lives to come to where the others wait."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How the model is held and computed; what it is comes from its `config.json`."""

    param_dtype: str = "float32"
    """dtype of the parameters between steps. `bfloat16` halves their memory; updates are still
    computed in float32 and added with stochastic rounding, and gradient sums, norms and the second
    moment are float32."""
    compute_dtype: str = "auto"
    """dtype of activations and of the weights in matrix products; `auto` is bfloat16 on
    accelerators and float32 on CPU. Norms, logits, losses and log-probabilities are float32.
    `float32` means full float32 products, not TF32 or bfloat16 passes."""
    export_dtype: str = "auto"
    """dtype of `final/`; `auto` stores each tensor in the dtype that it has in the files of
    `model_name_or_path`, whatever their `config.json` says."""
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
    chat_template_kwargs: str = ""
    """Variables of the chat template as a JSON object, such as `{"enable_thinking": false}`; for
    training and generation alike."""
    output_dir: str = ""
    """Everything that the run writes. Running the same command again continues there."""
    resume_from: str = ""
    """Where a new run takes its weights from: the `output_dir` of another run, one of its
    `checkpoints/STEP`, or a model directory. Step, optimizer, schedule and position in the data
    begin anew. A run that has a checkpoint of its own continues from that, whatever this says."""
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
    adam_mu_dtype: str = "auto"
    """dtype of the first moment; `auto` is `model.param_dtype`. The second moment is float32."""
    num_train_epochs: float = 1.0
    """Passes over the data when `max_steps` is -1."""
    max_steps: int = -1
    """Optimizer steps; -1 takes `num_train_epochs`."""
    per_device_train_batch_size: int = 2
    """Rows in one forward pass on each device of the `data` and `fsdp` axes; where
    `gradient_accumulation_steps` is inferred, the most of them."""
    gradient_accumulation_steps: int = 0
    """Forward passes an optimizer step; 0 is inferred from `train_batch_size`, or is 1."""
    train_batch_size: int = 0
    """Rows an optimizer step over all devices, of which any number that divides it then trains the
    same; 0 is the product of the other two."""
    gradient_checkpointing: str = "full"
    """`none` computes no matrix product twice, `dots` recomputes attention, `full` keeps a vector a
    layer and recomputes the rest; `true` and `false` mean `full` and `none`."""
    attn_implementation: str = "auto"
    """`xla`, `cudnn` (NVIDIA), `splash` (TPU), or `auto`: the device's flash attention."""
    max_seq_length: int = 2048
    """Tokens in a row; longer examples are cut there and counted."""
    packing: bool = False
    """Put several examples in a row (best fit), kept apart by segment ids."""
    loss_chunk_size: int = 1024
    """Trained positions of a device whose logits exist at one time."""
    logging_steps: int = 1
    """Steps between lines of the log and of the reports."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Where metrics go beside `metrics.jsonl`: some of `tensorboard`, `wandb`, `trackio`, and
    functions `package.module:function`, which are called with the step and a dict of its metrics;
    `none` reports nowhere."""
    profile_steps: tuple[int, ...] = ()
    """First and last step that `jax.profiler` traces into `output_dir/profile`; empty traces
    none."""
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
    """What rests in host memory: `none`, or with commas some of `optimizer` (its state), `params`
    (of the layers, each fetched as it computes; not with `rollout.backend=local`), `activations`
    (what `gradient_checkpointing=full` keeps) and `reference` (the layers of GRPO's reference
    model)."""
    compilation_cache_dir: str = "~/.cache/atlas_jax/xla"
    """Compiled programs are kept here between runs; empty keeps none, nor does a run on
    several CPU devices."""
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    model: ModelOptions = ModelOptions()

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that the model reads or writes."""
        return self.max_seq_length


@dataclasses.dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning: cross entropy on what the assistant writes."""

    algorithm: str = "sft"
