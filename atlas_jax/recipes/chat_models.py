"""Models that answer messages: prompts under their own chat template, and generation."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from atlas_jax.data.chat_template import ChatTemplate
from atlas_jax.data.questions import check_templates
from atlas_jax.options.fields import is_reference
from atlas_jax.options.grpo import GRPOConfig
from atlas_jax.options.rollout import RolloutConfig
from atlas_jax.rollout.engine import ChatModel, EncodeTurn
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.teaching import Draws, Limits, TeachingProtocol, Templates
from atlas_jax.startup.model import Model
from atlas_jax.types import Message, Params

if TYPE_CHECKING:
    from atlas_jax.rollout.episodes import EpisodeOptions

_MARKER = "Answer probe."
"""Text that stands for the last answer, to find what a template writes after it."""


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
    # A run whose servers generate needs no programs that do.
    from atlas_jax.rollout.local import LocalEngine, goes_on

    if stop_ids is None:
        stop_ids = stop_tokens(model)
    engine = LocalEngine(
        decoder=model.decoder,
        tokenizer=model.files.tokenizer,
        stop_ids=stop_ids,
        max_rows=max_rows,
    )
    encode_turn = turn_encoder(model.template, system_prompt)
    encode = asking(encode_turn)
    context = model.decoder.config.max_positions

    def bind(params: Params, version: int) -> ChatModel:
        generate = functools.partial(engine.generate, params, version)
        return ChatModel(
            encode=encode,
            generate=generate,
            context=context,
            vocab_size=model.decoder.config.vocab_size,
            encode_turn=encode_turn,
            goes_on=goes_on,
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


def asking(encode_turn: EncodeTurn) -> Callable[[str], tuple[int, ...]]:
    """Returns a user's message -> the prompt of a conversation that it begins."""
    return lambda text: encode_turn([Message(role="user", content=text)])


def turn_encoder(template: ChatTemplate, system_prompt: str) -> EncodeTurn:
    """Returns a conversation -> the prompt of the model's next turn, see `turn_ids`.

    The system prompt precedes a conversation that has none of its own. The function may be called
    from several threads.
    """
    lock = threading.Lock()  # tokenizers are not thread-safe

    def encode(messages: Sequence[Message], ended_by: int | None = None) -> tuple[int, ...]:
        messages = list(messages)
        if system_prompt and messages[0]["role"] != "system":
            messages.insert(0, Message(role="system", content=system_prompt))
        with lock:
            return turn_ids(template, messages, ended_by)

    return encode


def prompt_ids(template: ChatTemplate, messages: Sequence[Message]) -> tuple[int, ...]:
    """Returns the tokens of a conversation with the generation prompt.

    A message is text, even if it names special tokens. Without a chat template the messages are
    joined, with an empty line between them.

    Raises:
        Exception: one of `chat_template.errors`, from the template.
    """
    messages = template.fitted(messages) if template.tokenizer.chat_template else messages
    covered = template.control_tokens.cover_messages(messages)
    if template.tokenizer.chat_template:
        text = template(covered, add_generation_prompt=True)
        adds = False
    else:
        text = "\n\n".join(m["content"] for m in covered)
        adds = True
    if covered != messages:
        return tuple(template.control_tokens.encode(text, adds).ids)
    return tuple(template.tokenizer(text, add_special_tokens=adds).input_ids)


def turn_ids(
    template: ChatTemplate, messages: Sequence[Message], ended_by: int | None = None
) -> tuple[int, ...]:
    """Returns the tokens of a conversation after its last answer, with the generation prompt.

    They are the text that the template writes after that answer, tokenized on its own: the end
    of the turn, and the messages that follow. The answer's own tokens are not among them,
    because those that were sampled need not be those of its text. Without an answer, they are
    the whole prompt.

    Args:
        template: the chat template.
        messages: the conversation from its beginning.
        ended_by: the stop token that was sampled at the end of the answer; where the template
            ends a turn with it, it is not repeated.

    Raises:
        Exception: one of `chat_template.errors`, from the template.
        ValueError: if the template leaves out the answer, or a message after it.
    """
    if all(m["role"] != "assistant" for m in messages):
        return prompt_ids(template, messages)
    messages = template.fitted(messages) if template.tokenizer.chat_template else list(messages)
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    covered = template.control_tokens.cover_messages(messages)
    marker = _MARKER
    while any(marker in str(m["content"]) for m in covered):
        marker += "!"
    answer = Message(role="assistant", content=marker)
    shown = [*covered[:last], answer, *covered[last + 1 :]]
    if template.tokenizer.chat_template:
        text = template(shown, add_generation_prompt=True)
    else:
        text = "\n\n".join(m["content"] for m in shown)
    _, found, text = text.rpartition(marker)
    for message in covered[last + 1 :]:
        if not found or message["content"].strip() not in text:
            raise ValueError(
                f"the chat template of {template.tokenizer.name_or_path} leaves out what follows "
                f"an answer as a message of the role {message['role']}; use the role user"
            )
    if ended_by is not None:
        name = str(template.tokenizer.convert_ids_to_tokens(ended_by))
        text = text.lstrip().removeprefix(name) if text.lstrip().startswith(name) else text
    if covered != messages:
        return tuple(template.control_tokens.encode(text).ids)
    return tuple(template.tokenizer(text, add_special_tokens=False).input_ids)


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
        templates=templates,
        limits=limits,
        num_generations=num_generations,
        missing_teaching=teaching.missing_teaching,
        num_guided=config.rollout.num_guided,
        num_baseline=config.rollout.num_baseline,
        episode=_episode_options(config.rollout),
    )


def make_draws(config: GRPOConfig) -> Draws:
    """Returns how a run's teacher and student draw their tokens."""
    teacher = Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
    )
    temperature = config.rollout.student_temperature
    if temperature < 0:
        return Draws(teacher, config.seed)
    # The same as in evaluations, which then share what is kept and compiled.
    student = teacher._replace(temperature=temperature) if temperature else Sampling(0.0)
    return Draws(teacher, config.seed, student)


def _episode_options(rollout: RolloutConfig) -> EpisodeOptions | None:
    """Returns the episodes of a protocol of the user's own; None for a built-in protocol.

    Raises:
        ValueError: if `rollout.protocol` names no async function.
    """
    if not is_reference(rollout.protocol):
        return None
    from atlas_jax import sockets
    from atlas_jax.rollout.episodes import EpisodeOptions  # the built-in protocols hold none

    ask = sockets.resolve(rollout.protocol, "rollout.protocol")
    if not inspect.iscoroutinefunction(ask):
        raise ValueError(
            f"rollout.protocol={rollout.protocol} is no async function; write async def "
            "ask(policy, question)"
        )
    return EpisodeOptions(
        ask=ask, timeout_secs=rollout.episode_timeout_secs, max_turns=rollout.max_turns
    )
