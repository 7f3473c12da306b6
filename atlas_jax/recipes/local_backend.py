"""The backend of this process: the policy and the student generate on its own devices."""

from __future__ import annotations

from collections.abc import Callable

from atlas_jax.checkpoint import hf
from atlas_jax.options.grpo import GRPOConfig
from atlas_jax.recipes import chat_models
from atlas_jax.rollout.engine import ChatModel
from atlas_jax.startup.model import Model
from atlas_jax.types import Metrics, Params


class LocalBackend:
    """Generation with the parameters as they are, on the devices that train them."""

    def __init__(self, bind: Callable[[Params, int], ChatModel], student: ChatModel | None) -> None:
        """Keeps what generates.

        Args:
            bind: parameters and their version -> the policy.
            student: the frozen student; None under `protocol=direct`.
        """
        self._bind = bind
        self._student = student

    @property
    def student(self) -> ChatModel | None:
        """The frozen student; None under `protocol=direct`."""
        return self._student

    def publish(self, params: Params, version: int) -> ChatModel:
        """Returns the policy with these parameters, which need no transport."""
        return self._bind(params, version)

    def metrics(self) -> Metrics:
        """Returns no metrics: nothing is sent anywhere."""
        return {}

    def close(self) -> None:
        """Does nothing: generation ends with the call that asks for it."""


def make_local_backend(config: GRPOConfig, model: Model, student: Model | None) -> LocalBackend:
    """Returns the backend of a run, the student's parameters loaded.

    Raises:
        ValueError: if the student has too few positions for a lesson and an answer.
    """
    bind = chat_models.local(model, config.teaching.system_prompt, config.rollout.max_rows)
    return LocalBackend(bind, None if student is None else load_student(config, student))


def load_student(config: GRPOConfig, model: Model) -> ChatModel:
    """Loads the parameters of the frozen student.

    Raises:
        ValueError: if it has too few positions for a lesson and an answer.
    """
    student = load_chat_model(config, model, config.teaching.student_system_prompt)
    return chat_models.check_student(config, student)


def load_chat_model(config: GRPOConfig, model: Model, system_prompt: str) -> ChatModel:
    """Loads the parameters of a model that only generates."""
    bind = chat_models.local(model, system_prompt, config.rollout.max_rows)
    return bind(hf.load(model.source, model.decoder), 0)
