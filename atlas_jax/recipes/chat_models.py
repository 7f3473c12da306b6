"""Models that answer messages: prompts under their own chat template, and generation."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

from atlas_jax.config import GRPOConfig
from atlas_jax.data.chat_template import ChatTemplate
from atlas_jax.data.questions import check_templates
from atlas_jax.rollout.engine import ChatModel
from atlas_jax.rollout.teaching import Limits, TeachingProtocol, Templates
from atlas_jax.startup.model import Model
from atlas_jax.types import Message, Params


def local(
    model: Model, system_prompt: str, max_rows: int, stop_ids: tuple[int, ...] | None = None
) -> Callable[[Params, int], ChatModel]:
    """Returns a function of parameters and their version: the model that generates with them.

    Args:
        model: what generates.
        system_prompt: put before every message; empty puts none.
        max_rows: rows that are decoded at one time.
        stop_ids: tokens that end a text; None takes the model's own, see `stop_tokens`.
    """
    from atlas_jax.rollout.local import LocalEngine  # a run whose servers generate needs none

    if stop_ids is None:
        stop_ids = stop_tokens(model)
    engine = LocalEngine(
        decoder=model.decoder,
        tokenizer=model.files.tokenizer,
        stop_ids=stop_ids,
        max_rows=max_rows,
    )
    encode = encoder(model.template, system_prompt)
    context = model.decoder.config.max_positions

    def bind(params: Params, version: int) -> ChatModel:
        generate = functools.partial(engine.generate, params, version)
        return ChatModel(
            encode=encode,
            generate=generate,
            context=context,
            vocab_size=model.decoder.config.vocab_size,
        )

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
    lock = threading.Lock()  # tokenizers are not thread-safe

    def encode(text: str) -> tuple[int, ...]:
        messages = [Message(role="user", content=text)]
        if system_prompt:
            messages.insert(0, Message(role="system", content=system_prompt))
        with lock:
            return template.prompt_ids(messages)

    return encode


def check_student(config: GRPOConfig, student: ChatModel) -> ChatModel:
    """Returns the student, checked.

    Raises:
        ValueError: if it has too few positions for a lesson and an answer.
    """
    longest = config.max_new_tokens + config.answer_tokens
    if longest > student.context:
        raise ValueError(
            f"student {config.student_model} has {student.context} positions, fewer than a lesson "
            f"of max_new_tokens={config.max_new_tokens} and an answer ({longest} together); lower "
            "max_new_tokens or teaching.max_answer_tokens"
        )
    return student


def make_protocol(config: GRPOConfig, num_generations: int) -> TeachingProtocol:
    """Returns the teaching protocol of a run.

    Raises:
        ValueError: for a template with an unknown field or without a needed one.
    """
    check_templates(config)
    teaching = config.teaching
    templates = Templates(
        baseline=teaching.student_baseline_template,
        diagnostic=teaching.student_diagnostic_template,
        teacher=teaching.teacher_template,
        with_teaching=teaching.student_with_teaching_template,
        direct=config.rollout.direct_template,
    )
    limits = Limits(
        policy=config.max_new_tokens,
        probe=teaching.max_probe_tokens,
        answer=config.answer_tokens,
        prompt=config.max_prompt_length,
    )
    return TeachingProtocol(
        kind=config.rollout.protocol,
        templates=templates,
        limits=limits,
        num_generations=num_generations,
        missing_teaching=teaching.missing_teaching,
    )
