"""Options of GRPO's completions: what is asked, how it is generated, and the servers' weights."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from msgspec import Meta

from atlas_jax.options.fields import (
    Moved,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Share,
    choices_or_function,
)

StudentTemperature = Annotated[float, Meta(ge=-1)]


@dataclasses.dataclass(frozen=True)
class ServersConfig:
    """The vLLM servers that generate."""

    teacher_servers: str = ""
    """Addresses of the vLLM servers of the trained model, separated by commas."""
    student_servers: str = ""
    """Addresses of the vLLM servers of the student, separated by commas. They never get new
    weights."""
    max_in_flight: PositiveInt = 256
    """Most completions that a server works on at one time."""
    request_timeout_secs: Positive = 1800.0
    """Most seconds that a completion may take, its wait at a paused server included."""
    request_seeds: Literal["cpu", "always", "never"] = "cpu"
    """Servers that get a seed with each completion: `cpu` means those on CPUs alone. On a GPU seeds
    make sampling slower, and completions still depend on the other requests of their batch. Without
    seeds a run that is repeated has other completions."""
    max_staleness: NonNegativeInt = 0
    """Most updates by which the weights that begin a completion may be older than the weights that
    it trains; 0 generates and trains in turn, more generates ahead while training goes on."""


@dataclasses.dataclass(frozen=True)
class WeightSyncConfig:
    """Transport of new weights to the vLLM servers."""

    weight_sync: Literal["reload", "restart", "nccl", "adapter"] = "reload"
    """Way in which a server takes new weights: `reload` loads them in place from files; `restart`
    waits until a server that cannot do that is started again with them, by `serve --follow
    SYNC_DIR/latest`; `nccl` sends them from GPU to GPU, and through files once that has failed;
    `adapter` loads the factors of `model.lora` alone, at servers with `--enable-lora`."""
    sync_dir: str = ""
    """Directory for new weights on their way to the servers, which read it under the same path.
    Empty is `/dev/shm` if all servers are on this host and it has room, else `output_dir`."""
    sync_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the weights on their way to the servers."""
    sync_timeout_secs: Positive = 600.0
    """Most seconds that pausing and reloading a server may take together, and most seconds that its
    probe may take."""
    pause_mode: Literal["keep", "wait"] = "keep"
    """Fate of completions in flight when weights change: `keep` freezes them and continues them
    with the new weights, `wait` lets them end first."""
    probe_tolerance: Positive = 0.1
    """Mean absolute difference of log-probabilities on a fixed prompt, in nats, above which a
    server counts as having other weights than the trainer."""


@dataclasses.dataclass(frozen=True)
class RolloutConfig(WeightSyncConfig, ServersConfig):
    """Generation of completions: the protocol, and the engine."""

    protocol: Annotated[str, choices_or_function("teaching", "direct")] = "teaching"
    """Way in which a question is asked: `teaching` lets the trained teacher help a frozen student,
    `direct` is plain GRPO, in which the trained model answers the question itself. A function
    `async ask(policy, question)` of your own talks to the trained model over several turns."""
    max_turns: PositiveInt = 16
    """Most turns of the trained model in an episode of `rollout.protocol=package.module:function`.
    One that needs more ends there and counts as truncated."""
    episode_timeout_secs: Positive = 60.0
    """Most seconds that the function of an episode may take between two turns of the model. An
    episode that takes longer has failed."""
    direct_template: str = "{question}"
    """User message of `rollout.protocol=direct`, with the field `{question}`."""
    question_fields: tuple[str, ...] = ()
    """Names of further columns of the rows that templates may use as fields."""
    backend: Literal["local", "vllm"] = "local"
    """Place where completions are generated: `local` uses the training devices, `vllm` uses servers
    over HTTP."""
    share_prompt: bool = True
    """Processes a prompt once for several of its completions, in training as in generation."""
    max_rows: PositiveInt = 256
    """Most rows that a process decodes at one time, with `rollout.backend=local`; on a CPU at most
    32 of prompts with one row each."""
    difficulty: tuple[Share, ...] = ()
    """Lowest and highest share of right answers of the student alone with which a question is
    trained on, such as `(0.1, 0.9)`; an empty list trains on all. It is measured once, before
    training, and kept in `difficulty.jsonl` of `output_dir`."""
    difficulty_answers: PositiveInt = 8
    """Number of answers, drawn at `temperature`, by which `rollout.difficulty` is measured."""
    refill_rounds: NonNegativeInt = 0
    """Number of further draws of questions that replace groups whose rewards are all equal or of
    which nothing trains (DAPO's dynamic sampling, arXiv:2503.14476)."""
    student_temperature: StudentTemperature = -1.0
    """Temperature of the student's sampling; -1 takes `temperature`. With 0 the student takes the
    most probable tokens, so that the reward of a lesson depends on the lesson alone."""
    num_guided: PositiveInt = 1
    """Number of answers that the student gives with each lesson. The reward of a lesson is the mean
    over its answers."""
    num_baseline: PositiveInt = 1
    """Number of answers that the student gives to each question alone, for the same mean."""
    cache_student: Literal["greedy", "always", "never"] = "greedy"
    """Fate of what the student says to a question without a lesson: `greedy` keeps it where the
    student takes the most probable tokens, as in evaluations, and would write the same again;
    `always` keeps the first answer and approach also where they are drawn; `never` asks anew."""
    eval_limit: NonNegativeInt = 64
    """Number of held-out questions that an evaluation asks, the first ones; 0 asks all."""
    student_system_prompt: Annotated[str | None, Moved("teaching.student_system_prompt")] = None
    student_chat_template_kwargs: Annotated[
        str | None, Moved("teaching.student_chat_template_kwargs")
    ] = None
    student_diagnostic_template: Annotated[
        str | None, Moved("teaching.student_diagnostic_template")
    ] = None
    student_baseline_template: Annotated[
        str | None, Moved("teaching.student_baseline_template")
    ] = None
    student_with_teaching_template: Annotated[
        str | None, Moved("teaching.student_with_teaching_template")
    ] = None
    missing_teaching: Annotated[str | None, Moved("teaching.missing_teaching")] = None
    max_answer_tokens: Annotated[int | None, Moved("teaching.max_answer_tokens")] = None

    @property
    def has_student(self) -> bool:
        """True if a frozen student takes part."""
        return self.protocol == "teaching"

    def check(self) -> None:
        """Checks the options together.

        Raises:
            ValueError: names the options, their values and what to write instead.
        """
        self._check_student()
        if self.backend == "local":
            if self.max_staleness:
                raise ValueError(
                    f"rollout.max_staleness={self.max_staleness} with rollout.backend=local, where "
                    "the training devices generate; use rollout.backend=vllm, or 0"
                )
            return
        self._check_servers()
        if self.max_staleness and self.refill_rounds:
            raise ValueError(
                f"rollout.refill_rounds={self.refill_rounds} with rollout.max_staleness="
                f"{self.max_staleness}: processes agree on refills, which they cannot do beside a "
                "step; set one of them to 0"
            )
        if self.max_staleness and self.weight_sync == "restart":
            raise ValueError(
                f"rollout.max_staleness={self.max_staleness} with rollout.weight_sync=restart, "
                "which ends what is in flight; use 0, or servers that reload"
            )

    def _check_student(self) -> None:
        """Checks how the student answers."""
        if -1 < self.student_temperature < 0:
            raise ValueError(
                f"rollout.student_temperature={self.student_temperature} must be 0 or more, or -1 "
                "for that of the teacher"
            )
        if self.difficulty and (
            len(self.difficulty) != 2 or self.difficulty[0] > self.difficulty[1]
        ):
            raise ValueError(
                f"rollout.difficulty={self.difficulty} must be two shares, the lower one first, "
                "such as (0.1, 0.9), or empty"
            )
        alone = {"student_temperature": -1, "num_guided": 1, "num_baseline": 1, "difficulty": ()}
        for name, default in alone.items():
            if not self.has_student and getattr(self, name) != default:
                raise ValueError(
                    f"rollout.{name}={getattr(self, name)} with rollout.protocol={self.protocol}, "
                    f"which has no student; leave it at {default}"
                )
        fewer, more = sorted((self.num_guided, self.num_baseline))
        if more > 1 and self.student_temperature == 0:
            raise ValueError(
                f"rollout.num_guided={self.num_guided} and rollout.num_baseline="
                f"{self.num_baseline} with rollout.student_temperature=0, which writes the same "
                "answer each time; use 1 and 1, or a temperature above 0"
            )
        if more % fewer:
            raise ValueError(
                f"rollout.num_guided={self.num_guided} and rollout.num_baseline="
                f"{self.num_baseline} cannot be paired evenly; let one be a multiple of the other"
            )

    def _check_servers(self) -> None:
        """Checks that every role has servers, and that each server has the weights of one role."""
        from atlas_jax import addresses  # of servers, where they generate

        needed = ("teacher", "student") if self.has_student else ("teacher",)
        for role in needed:
            if not addresses.split(getattr(self, f"{role}_servers")):
                raise ValueError(
                    f"rollout.backend=vllm without rollout.{role}_servers; give their addresses, "
                    "or run launch/launch_with_server.sh"
                )
        named: dict[str, str] = {}
        for option in ("teacher_servers", "student_servers"):
            for url in addresses.split(getattr(self, option)):
                server = addresses.canonical(url)
                if server in named:
                    raise ValueError(
                        f"rollout.{option} has {url}, which stands in rollout.{named[server]} "
                        "already; start a server for each role, and name each of them once"
                    )
                named[server] = option
