"""Models as the teaching protocol uses them: prompts under their own chat template, generation."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

from atlas_jax.config import GRPOConfig
from atlas_jax.data.chat_template import ChatTemplate
from atlas_jax.data.questions import check_templates
from atlas_jax.recipes.setup import Model
from atlas_jax.rollout.engine import Speaker
from atlas_jax.rollout.local import LocalEngine
from atlas_jax.rollout.teaching import Limits, Protocol, Templates
from atlas_jax.types import Message, Metrics, Params


class Engines(NamedTuple):
    """What generates in a run."""

    policy: Callable[[Params, int], Speaker]
    """Parameters and their version -> the trained model; every process calls it together."""
    student: Speaker | None
    pushed: Callable[[], Metrics] = dict
    """Metrics of the last time that the policy was brought to where it generates, once."""
    close: Callable[[], None] = lambda: None
    """Gives up what is in flight."""


def local(
    model: Model, system_prompt: str, max_rows: int, stop_ids: tuple[int, ...] | None = None
) -> Callable[[Params, int], Speaker]:
    """Returns a function of parameters and their version: the model that generates with them.

    Args:
        model: what generates.
        system_prompt: put before every message; empty puts none.
        max_rows: rows that are decoded at one time.
        stop_ids: tokens that end a text; None takes the model's own, see `stop_tokens`.
    """
    if stop_ids is None:
        stop_ids = stop_tokens(model)
    engine = LocalEngine(model.decoder, model.files.tokenizer, stop_ids, max_rows)
    encode = encoder(model.template, system_prompt)
    context = model.decoder.config.max_positions

    def bind(params: Params, version: int) -> Speaker:
        generate = functools.partial(engine.generate, params, version)
        return Speaker(encode, generate, context, model.decoder.config.vocab_size)

    return bind


def stop_tokens(model: Model) -> tuple[int, ...]:
    """Returns the tokens that end a text, see `Model.stop_ids`.

    Raises:
        ValueError: if there is none.
    """
    if not model.stop_ids:
        raise ValueError(
            f"{model.files.tokenizer.name_or_path} has no stop token; set eos_token_id in its "
            "generation_config.json"
        )
    return model.stop_ids


def encoder(template: ChatTemplate, system_prompt: str) -> Callable[[str], tuple[int, ...]]:
    """Returns a user's message -> prompt ids, under the chat template if the tokenizer has one.

    It may be called from several threads.
    """
    lock = threading.Lock()  # a tokenizer is no thread's but one's at a time

    def encode(text: str) -> tuple[int, ...]:
        messages = [Message(role="user", content=text)]
        if system_prompt:
            messages.insert(0, Message(role="system", content=system_prompt))
        with lock:
            return template.prompt_ids(messages)

    return encode


def check_student(config: GRPOConfig, student: Speaker) -> Speaker:
    """Returns the student.

    Raises:
        ValueError: if it lacks positions for a lesson and an answer.
    """
    longest = config.max_new_tokens + config.answer_tokens
    if longest > student.context:
        raise ValueError(
            f"student {config.student_model} has {student.context} positions, fewer than a lesson "
            f"of max_new_tokens={config.max_new_tokens} and an answer ({longest} together); lower "
            "max_new_tokens or teaching.max_answer_tokens"
        )
    return student


def protocol(config: GRPOConfig, num_generations: int) -> Protocol:
    """Returns how groups come about.

    Raises:
        ValueError: for a template with an unknown field or without a needed one.
    """
    check_templates(config)
    teaching = config.teaching
    templates = Templates(
        teaching.student_baseline_template,
        teaching.student_diagnostic_template,
        teaching.teacher_template,
        teaching.student_with_teaching_template,
        config.rollout.direct_template,
    )
    limits = Limits(
        config.max_new_tokens,
        teaching.max_probe_tokens,
        config.answer_tokens,
        config.max_prompt_length,
    )
    kind = config.rollout.protocol
    return Protocol(kind, templates, limits, num_generations, teaching.missing_teaching)
