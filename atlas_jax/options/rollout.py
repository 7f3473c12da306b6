"""Options of GRPO's completions: what is asked, how it is generated, and the servers' weights."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from atlas_jax import addresses
from atlas_jax.options.fields import (
    Moved,
    NonNegativeInt,
    Positive,
    PositiveInt,
    choices_or_function,
)


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

    weight_sync: Literal["reload", "restart"] = "reload"
    """Way in which a server takes new weights: `reload` loads them in place; `restart` waits until
    a server that cannot do that is started again with them, by `serve --follow SYNC_DIR/latest`."""
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
    """Most rows that a process decodes at one time, with `rollout.backend=local`."""
    refill_rounds: NonNegativeInt = 0
    """Number of further draws of questions that replace groups whose rewards are all equal or of
    which nothing trains (DAPO's dynamic sampling, arXiv:2503.14476)."""
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

    def _check_servers(self) -> None:
        """Checks that every role has servers, and that each server has the weights of one role."""
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
