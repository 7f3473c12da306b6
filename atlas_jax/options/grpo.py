"""Options that only GRPO has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta

from atlas_jax.options.data import LessonsConfig
from atlas_jax.options.fields import (
    Fraction,
    JsonObject,
    Moved,
    NonNegativeInt,
    Positive,
    PositiveInt,
    PositiveShare,
)
from atlas_jax.options.judges import RIMConfig
from atlas_jax.options.policy_loss import PolicyLossConfig
from atlas_jax.options.reward import RewardConfig
from atlas_jax.options.rollout import RolloutConfig
from atlas_jax.options.train import TrainConfig

GroupSize = Annotated[int, Meta(ge=2, extra={"why": "a group of one has no mean to compare with"})]


@dataclasses.dataclass(frozen=True)
class TeachingConfig(LessonsConfig):
    """Messages and limits of the two passes in which a teacher helps a student."""

    student_system_prompt: str = ""
    """System message of the student; `teaching.system_prompt` is the teacher's."""
    student_chat_template_kwargs: JsonObject = ""
    """Variables of the student's chat template; empty takes those of `chat_template_kwargs`."""
    student_diagnostic_template: str = ""
    """User message that asks the student for its approach, with the field `{question}`."""
    student_baseline_template: str = ""
    """User message that asks the student for an answer without a lesson, with the field
    `{question}`."""
    student_with_teaching_template: str = ""
    """User message that asks the student for an answer with a lesson, with the fields `{question}`
    and `{teaching}`."""
    missing_teaching: Literal["none", "whole", "unscored"] = "none"
    """Meaning of a teacher's text without `<teaching>`: `none` takes it for no lesson, so that the
    student's answer without one counts; `whole` takes all of it for the lesson; `unscored` skips
    the sample. A lesson that is not closed, or has no letter and no digit, is none."""
    max_probe_tokens: PositiveInt = 500
    """Most tokens of the approach that the student writes."""
    max_answer_tokens: NonNegativeInt = 0
    """Most tokens of a student's answer; 0 takes `max_new_tokens`."""


@dataclasses.dataclass(frozen=True)
class GRPOConfig(PolicyLossConfig, TrainConfig):
    """Group relative policy optimization of a teacher, or of a plain policy."""

    algorithm: str = "grpo"
    student_model: str = ""
    """Frozen student that the teacher helps: a Hugging Face directory, a `.gguf` file or a hub
    id."""
    num_generations: GroupSize = 8
    """Number of completions of one prompt. They are a group, whose mean reward is the baseline."""
    max_prompt_length: PositiveInt = 2048
    """Most tokens of a prompt. A longer one is skipped and counted."""
    max_new_tokens: PositiveInt = 512
    """Most tokens of a completion."""
    temperature: Positive = 0.7
    """Temperature of sampling, and of the log-probabilities that are trained on."""
    top_p: PositiveShare = 0.95
    """Share of the probability that the most likely tokens must have together to be drawn from; 1
    keeps all tokens."""
    top_k: NonNegativeInt = 0
    """Number of the most likely tokens that are drawn from; 0 keeps all."""
    min_p: Fraction = 0.0
    """Share of the most likely token's probability below which a token is not drawn; 0 keeps all.
    For `rollout.backend=local` only."""
    mask_truncated_completions: bool = False
    """Trains nothing on completions that reached `max_new_tokens`."""
    sync_ref_model: bool = False
    """Moves the reference model after the policy during training."""
    ref_model_mixup_alpha: PositiveShare = 0.6
    """Share of the policy in the new reference model."""
    ref_model_sync_steps: PositiveInt = 512
    """Steps between two moves of the reference model."""
    teaching: TeachingConfig = TeachingConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    max_probe_tokens: Annotated[int | None, Moved("teaching.max_probe_tokens")] = None

    @property
    def asks_questions(self) -> bool:
        """True: rows are questions."""
        return True

    @property
    def group_size(self) -> int:
        """Number of completions of one prompt."""
        return self.num_generations

    @property
    def has_reference(self) -> bool:
        """True if the KL divergence to a reference model has a weight."""
        return self.beta > 0

    @property
    def generates_locally(self) -> bool:
        """True if the training devices generate completions."""
        return self.rollout.backend == "local"

    @property
    def generates_elsewhere(self) -> str:
        """Option with which these devices would generate nothing."""
        return "rollout.backend=vllm"

    @property
    def servers_option(self) -> str:
        """Option with which vLLM servers generate completions; empty if none do."""
        return "rollout.backend=vllm" if self.rollout.backend == "vllm" else ""

    @property
    def sends_by_nccl(self) -> bool:
        """True if servers get the weights through NCCL."""
        return bool(self.servers_option) and self.rollout.weight_sync == "nccl"

    @property
    def functions(self) -> dict[str, str]:
        """Options whose values are functions of the user's own, `package.module:function`."""
        named = {"loss_type": self.loss_type, "rollout.protocol": self.rollout.protocol}
        return super().functions | {option: name for option, name in named.items() if ":" in name}

    @property
    def has_episodes(self) -> bool:
        """True if a function of the user's own leads the conversations."""
        return ":" in self.rollout.protocol

    @property
    def reward_functions(self) -> tuple[str, ...]:
        """Rewards that are functions of the user's own, `package.module:function`."""
        return self.reward.functions

    @property
    def longest_generation(self) -> int:
        """Most tokens of a prompt with its completion."""
        return self.max_prompt_length + self.max_new_tokens

    @property
    def student(self) -> str:
        """Name of the frozen student model; empty if the protocol has none."""
        return self.student_model if self.rollout.has_student else ""

    @property
    def answer_tokens(self) -> int:
        """Most tokens of a student's answer."""
        return self.teaching.max_answer_tokens or self.max_new_tokens

    @property
    def judges(self) -> RIMConfig | None:
        """Options of the judges; None if none are asked."""
        return self.reward.rim if "rim" in self.reward.parts else None

    def check(self, given_rewards: Sequence[Any] = ()) -> None:
        """Checks each option, and those that must fit each other.

        Raises:
            ValueError: names the options, their values and what to write instead.
        """
        super().check(given_rewards)
        if self.packing is True:
            raise ValueError("packing=True is for SFT; GRPO rows hold a prompt and its completions")
        if self.metric_for_best_model == "eval/loss":
            raise ValueError(
                "metric_for_best_model=eval/loss with algorithm=grpo, whose evaluations have no "
                "loss; set eval/student_accuracy, or eval/accuracy without a student"
            )
        if self.sync_ref_model and not self.beta:
            raise ValueError("sync_ref_model=True without a reference; raise beta above 0")
        self._check_lora()
        if self.rollout.has_student and not self.student_model:
            raise ValueError(
                "student_model is empty; set --config.student_model=…, or "
                "--config.rollout.protocol=direct to train without a student"
            )
        self.rollout.check()
        self.reward.check(given_rewards)
        self.check_loss()
        self._check_sampling()
        self._check_missing_lessons()
        if self.reward.overlong_tokens > self.max_new_tokens:
            raise ValueError(
                f"reward.overlong_tokens={self.reward.overlong_tokens} is more than max_new_tokens="
                f"{self.max_new_tokens}; use a part of it"
            )
        if not self.rollout.has_student:
            self._check_alone(given_rewards)

    def _check_lora(self) -> None:
        """Checks what differs where factors are trained, and what needs them."""
        rank = self.model.lora.rank
        if rank and (self.sync_ref_model or "reference" in self.offload):
            raise ValueError(
                f"model.lora.rank={rank} with sync_ref_model or offload=reference: "
                "the reference is the model without the factors, which takes no memory of its own "
                "and stays as it is; leave both out"
            )
        if self.servers_option and self.rollout.weight_sync == "adapter" and not rank:
            raise ValueError(
                "rollout.weight_sync=adapter with model.lora.rank=0, which trains no adapter; "
                "raise the rank, or use rollout.weight_sync=reload"
            )

    def _check_sampling(self) -> None:
        """Checks how tokens are drawn against where they are drawn and what weights draw them."""
        if self.rollout.backend == "vllm" and self.min_p:
            raise ValueError(
                f"min_p={self.min_p} with rollout.backend=vllm: vLLM cuts by min_p before it takes "
                "log-probabilities, so that those of the cut tokens are missing; use top_p or "
                "top_k, and min_p=0"
            )
        if self.rollout.max_staleness and self.importance_sampling == "none":
            raise ValueError(
                f"rollout.max_staleness={self.rollout.max_staleness} trains on completions of "
                "older weights, which importance_sampling=none leaves uncorrected; use token or "
                "sequence"
            )

    def _check_missing_lessons(self) -> None:
        """Checks that a text without a lesson has the reward that its penalty lowers."""
        penalty = f"reward.missing_lesson_penalty={self.reward.missing_lesson_penalty}"
        if self.reward.missing_lesson_penalty and not self.rollout.has_student:
            raise ValueError(
                f"{penalty} with rollout.protocol={self.rollout.protocol}, which has no lessons; "
                "leave it at 0"
            )
        if self.reward.missing_lesson_penalty and self.teaching.missing_teaching == "unscored":
            raise ValueError(
                f"{penalty} with teaching.missing_teaching=unscored, under which a text without a "
                "lesson has no reward; use none"
            )

    def _check_alone(self, given_rewards: Sequence[Any]) -> None:
        """Checks that no reward needs a student, who takes part in the teaching protocol alone."""
        protocol = f"protocol={self.rollout.protocol}"
        names = self.judges.need_student if self.judges else ()
        if names:
            raise ValueError(
                f"the judges {', '.join(names)} are active, and {protocol} has no lesson to "
                "judge; leave accuracy alone on in reward.rim.active_judges, and let judges of "
                "your own see question, ground_truth and answer alone"
            )
        if "teaching_gain" in self.reward.rules(given_rewards):
            raise ValueError(
                f"the reward teaching_gain compares a student's answers, and {protocol} has no "
                "student; use reward.names=('exact_match',)"
            )
