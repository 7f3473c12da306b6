"""The options that only GRPO has, as frozen dataclasses. Imports no JAX."""

from __future__ import annotations

import dataclasses

from atlas_jax import sockets
from atlas_jax.options import TrainConfig
from atlas_jax.options_rim import RIMConfig


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How completions come about: the protocol, its templates, and generation."""

    protocol: str = "teaching"
    """`teaching`: the trained teacher helps a frozen student; `direct`: plain GRPO, the trained
    model answers the questions itself."""
    student_baseline_template: str = ""
    """User message for the student's answer alone; field `{question}`."""
    student_diagnostic_template: str = ""
    """User message that asks for the student's approach; field `{question}`."""
    student_with_teaching_template: str = ""
    """User message for the student's answer with a lesson; fields `{question} {teaching}`."""
    direct_template: str = "{question}"
    """User message of `protocol=direct`; field `{question}`."""
    question_fields: tuple[str, ...] = ()
    """Further fields of the rows that templates may use."""
    student_system_prompt: str = ""
    """System message of the student; `data.system_prompt` is the trained model's."""
    student_chat_template_kwargs: str = ""
    """Variables of the student's chat template as a JSON object; empty takes those of
    `chat_template_kwargs`."""
    missing_teaching: str = "none"
    """What a text without `<teaching>` counts as: `none` is no teaching (the answer alone stands),
    `whole` makes all of it the lesson, `unscored` skips the sample."""
    max_answer_tokens: int = 0
    """New tokens of a student's answer; 0 takes `max_new_tokens`."""
    share_prompt: bool = True
    """Process a prompt once for several of its completions, in training as in generation."""
    max_rows: int = 256
    """Rows that a process decodes at one time."""
    refill_rounds: int = 0
    """Further draws of questions to replace groups whose rewards are all equal or of which nothing
    trains (DAPO's dynamic sampling, arXiv:2503.14476)."""
    eval_limit: int = 64
    """Held-out questions of an evaluation, the first ones; 0 takes all."""
    backend: str = "local"
    """`local` generates with the training devices, `vllm` with servers over HTTP."""
    teacher_servers: str = ""
    """Addresses of the vLLM servers of the model that is trained, separated by commas."""
    student_servers: str = ""
    """Those of the student; no weights are ever pushed to them."""
    max_in_flight: int = 256
    """Completions that a server works on at one time."""
    request_timeout_secs: float = 1800.0
    """Longest that a completion may take, its wait at a paused server included."""
    sync_dir: str = ""
    """Where new weights go on their way to the servers, which read it under the same path. Empty is
    `/dev/shm` if all servers are on this host and it has room, else `output_dir`."""
    weight_sync: str = "reload"
    """`reload` loads new weights in place; `restart` waits until servers that cannot are started
    again with them, by `serve --follow SYNC_DIR/latest`."""
    sync_dtype: str = "bfloat16"
    """dtype of the weights on their way."""
    sync_timeout_secs: float = 600.0
    """Longest that pausing and reloading a server may take together, and then its probe."""
    pause_mode: str = "keep"
    """While weights change, completions in flight are frozen and go on with the new ones (`keep`),
    or end first (`wait`)."""
    probe_tolerance: float = 0.1
    """Mean absolute difference of log-probabilities on a fixed prompt, in nats, above which a
    server is held to have other weights than the trainer."""
    max_staleness: int = 0
    """Updates by which the weights that begin a completion may be older than those it trains;
    0 generates and trains in turn, more generates ahead while training goes on."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What a completion is worth."""

    kind: str = "rule"
    """`rule` adds up the rewards of `names`, `rim` asks judges, `mixed` adds up both."""
    names: tuple[str, ...] = ("teaching_gain",)
    """Rules that are added up: `teaching_gain`, `exact_match`, or functions of your own as
    `package.module:function`; `kind=rim` has none."""
    weights: tuple[float, ...] = ()
    """One weight for each of the rules, then one for the judges; empty weighs each 1."""
    efficiency_weight: float = 1.0
    """What a fully saved answer adds to a right one (`teaching_gain`)."""
    degradation_penalty: float = 1.0
    """What a right answer turned wrong costs (`teaching_gain`)."""
    answer_leak_penalty: float = 0.5
    """How far a lesson that states the answer, or aims at the judges, stays below the lowest honest
    one of its group. Where none is honest, the group trains nothing."""
    max_failed_frac: float = 0.2
    """Share of a step's samples that servers or judges left without a score, above which the run
    waits and asks again for them, and stops with a checkpoint when that does not help. Skipped
    samples count neither way: prompts that are too long, missing lessons."""
    retry_waits_secs: tuple[float, ...] = (30.0, 60.0, 120.0, 300.0, 600.0)
    """Waits before each further attempt to score them."""
    timeout_secs: float = 10.0
    """Longest that a call of a function of your own may take; its samples then have no score."""
    num_workers: int = 8
    """Processes that run each sync function of your own."""
    rim: RIMConfig = dataclasses.field(default=RIMConfig())

    @property
    def parts(self) -> tuple[str, ...]:
        """What is added up, in the order of `weights`."""
        rules = () if self.kind == "rim" else self.names
        return rules if self.kind == "rule" else (*rules, "rim")

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names of `parts`, for metrics and records."""
        return sockets.labels(self.parts)

    @property
    def needs_truth(self) -> bool:
        """True if a question without a ground truth cannot be scored."""
        return any(name != "rim" and not sockets.is_reference(name) for name in self.parts)


@dataclasses.dataclass(frozen=True)
class GRPOConfig(TrainConfig):
    """Group relative policy optimization of a teacher, or of a plain policy."""

    algorithm: str = "grpo"
    student_model: str = ""
    """Hugging Face directory, `.gguf` file or hub id of the frozen student."""
    num_generations: int = 8
    """Completions of one prompt: the group whose mean is the baseline."""
    max_prompt_length: int = 2048
    """Tokens of a prompt; a longer one is skipped and counted."""
    max_new_tokens: int = 512
    """Tokens of a completion."""
    max_probe_tokens: int = 500
    """Tokens of the student's approach."""
    temperature: float = 0.7
    """Of sampling, and of the log-probabilities that are trained on."""
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    beta: float = 0.04
    """Weight of the KL divergence to the reference; 0 keeps no reference."""
    loss_type: str = "grpo"
    """`grpo`, `bnpo`, `dr_grpo`, `dapo`, `gspo` or `cispo`."""
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    num_iterations: int = 1
    """Updates on each batch of completions; one step makes all of them."""
    scale_rewards: str = "group"
    """What advantages are divided by: the standard deviation of the `group`, of the `batch`, or
    `none`."""
    importance_sampling: str = "token"
    """Correction between what sampled and what trains: `none`, `token` or `sequence`."""
    importance_sampling_cap: float = 2.0
    mask_truncated_completions: bool = False
    """Train nothing on completions that ran into `max_new_tokens`."""
    sync_ref_model: bool = False
    """Let the reference follow the policy."""
    ref_model_mixup_alpha: float = 0.6
    """Share of the policy in the new reference."""
    ref_model_sync_steps: int = 512
    """Steps between two such updates."""
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
