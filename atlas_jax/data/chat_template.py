"""A tokenizer's chat template with the options and the date that a run fixes.

Training rows and generation prompts are rendered by the same object, so a model is prompted in the
form in which it was trained.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import logging

from atlas_jax.data.control_tokens import ControlTokens, is_marker
from atlas_jax.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TODAY = re.compile(r"""\bstrftime_now\(\s*(['"])(?P<format>.*?)\1\s*\)""")
_TAKEN = {"messages", "conversation", "tools", "add_generation_prompt", "tokenize"}
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
_OURS = ("weight", "train")  # fields of a message that select trained turns
_SYSTEM = "System probe."
_USER = "User probe."
_ANSWER = "Answer probe."


def errors() -> tuple[type[Exception], ...]:
    """Returns the types of errors that a template, a program of a third party, may raise."""
    from jinja2 import TemplateError

    return (
        TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
        ValueError,
    )  # fmt: skip


def read_options(text: str, name: str = "chat_template_kwargs") -> dict[str, Any]:
    """Returns the variables that a run gives to a template.

    Args:
        text: a JSON object, such as `{"enable_thinking": false}`, or "".
        name: the name of the option, for errors.

    Raises:
        ValueError: if it is not a JSON object, or has a variable that rows decide.
    """
    try:
        options = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"{name}={text!r} is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f'{name}={text!r} is no JSON object; write {{"enable_thinking": false}}')
    if taken := _TAKEN & options.keys():
        raise ValueError(f"{name} cannot give {', '.join(sorted(taken))}, which rows decide")
    return options


class ChatTemplate:
    """A renderer of conversations."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
    ) -> None:
        """Keeps the variables of every rendering.

        Args:
            tokenizer: the tokenizer with the template.
            options: further variables of the template.
            date: the date of templates that ask for today's; None is today.
        """
        self.tokenizer = tokenizer
        self.date = date or datetime.date.today()
        self._options = dict(options or {})

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Returns the text of a conversation.

        Arguments of tool calls are passed as objects, as most templates expect. If the template
        fails with objects, as DeepSeek's do, they are passed as JSON text.

        Raises:
            Exception: one of `errors`, from the template.
        """
        more: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
        if tools:
            more["tools"] = list(tools)
        plain = [{k: v for k, v in m.items() if k not in _OURS} for m in messages]
        try:
            return self._render(plain, more)
        except TypeError:
            if not any(m.get("tool_calls") for m in plain):
                raise
            return self._render([_with_text(m) for m in plain], more)

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Returns the tokens of a conversation with the generation prompt.

        A message is text, even if it names special tokens. Without a chat template the messages are
        joined, with an empty line between them.

        Raises:
            Exception: one of `errors`, from the template.
        """
        messages = self.fitted(messages) if self.tokenizer.chat_template else messages
        covered = self.control_tokens.cover_messages(messages)
        if self.tokenizer.chat_template:
            text = self(covered, add_generation_prompt=True)
            adds = False
        else:
            text = "\n\n".join(m["content"] for m in covered)
            adds = True
        if covered != messages:
            return tuple(self.control_tokens.encode(text, adds).ids)
        return tuple(self.tokenizer(text, add_special_tokens=adds).input_ids)

    def turn_ids(self, messages: Sequence[Message], ended_by: int | None = None) -> tuple[int, ...]:
        """Returns the tokens of a conversation after its last answer, with the generation prompt.

        They are the text that the template writes after that answer, tokenized on its own: the end
        of the turn, and the messages that follow. The answer's own tokens are not among them,
        because those that were sampled need not be those of its text. Without an answer, they are
        the whole prompt.

        Args:
            messages: the conversation from its beginning.
            ended_by: the stop token that was sampled at the end of the answer; where the template
                ends a turn with it, it is not repeated.

        Raises:
            Exception: one of `errors`, from the template.
            ValueError: if the template leaves out the answer, or a message after it.
        """
        if all(m["role"] != "assistant" for m in messages):
            return self.prompt_ids(messages)
        messages = self.fitted(messages) if self.tokenizer.chat_template else list(messages)
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        covered = self.control_tokens.cover_messages(messages)
        marker = _ANSWER
        while any(marker in str(m["content"]) for m in covered):
            marker += "!"
        answer = Message(role="assistant", content=marker)
        shown = [*covered[:last], answer, *covered[last + 1 :]]
        if self.tokenizer.chat_template:
            text = self(shown, add_generation_prompt=True)
        else:
            text = "\n\n".join(m["content"] for m in shown)
        _, found, text = text.rpartition(marker)
        for message in covered[last + 1 :]:
            if not found or message["content"].strip() not in text:
                raise ValueError(
                    f"the chat template of {self.tokenizer.name_or_path} leaves out what follows "
                    f"an answer as a message of the role {message['role']}; use the role user"
                )
        if ended_by is not None:
            name = str(self.tokenizer.convert_ids_to_tokens(ended_by))
            text = text.lstrip().removeprefix(name) if text.lstrip().startswith(name) else text
        if covered != messages:
            return tuple(self.control_tokens.encode(text).ids)
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    @functools.cached_property
    def control_tokens(self) -> ControlTokens:
        """The special tokens, and other tokens that the template writes around messages."""
        messages = [
            Message(role="user", content=_USER),
            Message(role="assistant", content=_ANSWER),
        ]
        try:
            text = self(messages) if self.tokenizer.chat_template else ""
        except errors():
            text = ""
        text = EMPTY_THOUGHT.sub("", text.replace(_USER, "").replace(_ANSWER, ""))
        added = map(str, self.tokenizer.added_tokens_decoder.values())
        return ControlTokens(
            self.tokenizer, [name for name in added if name in text and is_marker(name)]
        )

    def _render(self, messages: list[dict[str, Any]], more: dict[str, Any]) -> str:
        more = self._options | more
        # A tokenizer may have separate templates for conversations with and without tools.
        text = self._dated(self.tokenizer.get_chat_template(tools=more.get("tools")))
        return str(
            self.tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False, **more)
        )

    @functools.cache  # noqa: B019  (lives as long as a run)
    def _dated(self, text: str) -> str:
        """Returns a template with its calls for today's date replaced by the run's date."""
        return _TODAY.sub(lambda call: json.dumps(self.date.strftime(call["format"])), text)

    def identity(self) -> list[Any]:
        """Returns, as JSON values, everything that decides how a conversation is tokenized."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        calls = {"truncation", "padding"}  # each call of the tokenizer sets them
        return [
            {name: part for name, part in backend.items() if name not in calls},
            self.tokenizer.chat_template,
            {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()},
            bool(self.tokenizer.split_special_tokens),
            self._options,
            self.date.isoformat(),
        ]

    def fitted(self, messages: Sequence[Message]) -> list[Message]:
        """Returns the conversation with its system message in a form that the template renders.

        If the template has no place for one, its text precedes the user's first message.
        """
        messages = list(messages)
        roles = [m["role"] for m in messages[:2]]
        if roles != ["system", "user"] or self._takes_system:
            return messages
        system, user, *rest = messages
        whole = f"{system['content']}\n\n{user['content']}"
        return [{**user, "content": whole}, *rest]

    @functools.cached_property
    def _takes_system(self) -> bool:
        """True if a system message is rendered, and the same before and after an answer."""
        system = Message(role="system", content=_SYSTEM)
        user = Message(role="user", content=_USER)
        answer = Message(role="assistant", content=_ANSWER)
        try:
            asked = self([system, user], add_generation_prompt=True)
            answered = self([system, user, answer])
            texts = _SYSTEM in asked and _SYSTEM in answered
        except errors():
            texts = False
        if not texts:
            logging.warning(
                "the chat template of %s has no place for a system message; it is put before the "
                "first message of the user",
                self.tokenizer.name_or_path,
            )
        return texts


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message whose tool calls have their arguments as JSON text."""
    calls = []
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        changed = {**function, "arguments": arguments}
        calls.append({**call, "function": changed} if "function" in call else changed)
    return {**message, "tool_calls": calls} if calls else message
