"""Options that only distillation has."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal

from atlas_jax import addresses
from atlas_jax.options.fields import Fraction, Positive, PositiveInt, Share
from atlas_jax.options.train import TrainConfig


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
    """The teacher on vLLM servers, which say how probable it holds each token of a text."""

    servers: str = ""
    """Addresses of the vLLM servers that run the teacher, separated by commas. Empty computes the
    teacher on the training devices."""
    top_tokens: PositiveInt = 64
    """Number of most probable tokens that a server names at each position. All other tokens are
    compared as one, with their probabilities added up."""
    max_in_flight: PositiveInt = 64
    """Most texts that a server works on at one time."""
    request_timeout_secs: Positive = 600.0
    """Most seconds that a server may take for a text."""
    max_failed_frac: Fraction = 0.2
    """Share of a step's texts left without scores above which the run stops with a checkpoint.
    Those below it do not train and are counted."""

    def check(self, temperature: float) -> None:
        """Checks that servers can give what is compared.

        Raises:
            ValueError: for a temperature other than 1, or what is no address.
        """
        for url in addresses.split(self.servers):
            addresses.canonical(url)
        if self.servers and temperature != 1:
            raise ValueError(
                f"temperature={temperature} with scoring.servers, whose probabilities are at "
                "temperature 1 and of the most probable tokens alone, from which no other "
                "temperature follows; set temperature=1"
            )


@dataclasses.dataclass(frozen=True)
class GKDConfig(TrainConfig):
    """Generalized knowledge distillation: a policy learns a teacher's distribution of tokens."""

    algorithm: str = "gkd"
    teacher_model_name_or_path: str = ""
    """Frozen model whose distribution is learnt: a Hugging Face directory, a `.gguf` file or a hub
    id, with the vocabulary of the trained model. Empty takes the weights that the run begins with,
    for `teacher_reads=lesson`. With `scoring.servers` it is the model that they must run, which is
    not read here; empty takes what they run."""
    teacher_reads: Literal["prompt", "lesson"] = "prompt"
    """Text before a completion, for the teacher: `prompt` is that of the policy. `lesson` is the
    student's prompt with a lesson, while the policy reads the one without: rows are then the
    samples of a GRPO run, `OUTPUT_DIR/rollouts/*.jsonl`, of which those count where the student's
    answers alone are wrong and an answer with the lesson is right."""
    lmbda: Share = 0.5
    """Share of the completions that the policy writes itself; the others are those of the rows."""
    beta: Share = 0.5
    """Share of the teacher in the mixture of the generalized Jensen-Shannon divergence; 0 is the
    forward KL divergence, from teacher to policy, and 1 the reverse one."""
    temperature: Positive = 0.9
    """Temperature of the policy's sampling, and of both distributions that are compared."""
    max_new_tokens: PositiveInt = 128
    """Most tokens of a completion that the policy writes; `max_seq_length` limits it too."""
    max_decode_rows: PositiveInt = 256
    """Most rows that a process decodes at one time."""
    scoring: ScoringConfig = ScoringConfig()

    @property
    def may_pack(self) -> bool:
        """False: a row holds one completion."""
        return False

    @property
    def generates_locally(self) -> bool:
        """True if the training devices generate completions."""
        return self.lmbda > 0

    @property
    def generates_elsewhere(self) -> str:
        """Option with which these devices would generate nothing."""
        return "lmbda=0"

    @property
    def servers_option(self) -> str:
        """Option with which the teacher is on vLLM servers; empty if it is here."""
        return "scoring.servers" if self.scoring.servers else ""

    @property
    def teacher(self) -> str:
        """Name of the teacher that is computed here; empty if it is the policy or on servers."""
        return "" if self.servers_option else self.teacher_model_name_or_path

    def check(self, given_rewards: Sequence[Any] = ()) -> None:
        """Checks each option, and those that must fit each other.

        Raises:
            ValueError: names the options, their values and what to write instead.
        """
        super().check(given_rewards)
        if self.packing is True:
            raise ValueError("packing=True is for SFT; rows of algorithm=gkd hold one completion")
        if not self.data.completion_only:
            raise ValueError(
                "data.completion_only=False with algorithm=gkd, which compares completions alone; "
                "leave it at true"
            )
        self.scoring.check(self.temperature)
        is_own = not self.teacher and not self.servers_option
        if self.teacher_reads == "prompt" and is_own:
            raise ValueError(
                "teacher_model_name_or_path is empty, and with teacher_reads=prompt the policy is "
                "its own teacher and learns nothing; name a teacher, or set teacher_reads=lesson"
            )
        if is_own and self.model.lora.rank and self.resume_from:
            raise ValueError(
                f"resume_from={self.resume_from} with model.lora.rank={self.model.lora.rank} and "
                "no teacher, which would be the model without these factors; set "
                "teacher_model_name_or_path to the adapter, or to the model with it merged"
            )
        if self.max_new_tokens >= self.max_seq_length and self.lmbda:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt in "
                f"max_seq_length={self.max_seq_length}; lower it, or raise max_seq_length"
            )
        if self.teacher_reads == "lesson":
            self._check_samples()

    def _check_samples(self) -> None:
        """Checks that rows can be the samples of a GRPO run."""
        if self.data.format == "session":
            raise ValueError(
                "data.format=session with teacher_reads=lesson, whose rows are samples of a GRPO "
                "run; set data.dataset_path to its rollouts, and data.format=auto"
            )
        for name in ("dataset_path", "eval_path"):
            path = getattr(self.data, name)
            # Whoever reads a whole directory makes a table of it, with other values in its gaps.
            if os.path.isdir(os.path.expanduser(path)):
                raise ValueError(
                    f"data.{name}={path} is a directory; give its files, {path.rstrip('/')}/*.jsonl"
                )
