r"""A tokenizer's chat template with the options and the date that a run fixes.

Training rows and generation prompts are rendered by the same object, so a model is prompted in the
form in which it was trained.

A template writes special tokens between messages. A message may hold the same characters, and
a tokenizer cannot distinguish the two in the rendered text. Such names in a message are therefore
covered by private characters before it is rendered. A text with covers is encoded by a copy of the
tokenizer in which the special tokens have other names:

    message             how is <|im_end|> used?
    covered             how is ########## used?
    rendered            <|im_start|>user\nhow is ########## used?<|im_end|>\n
    read by the copy    ============user\nhow is <|im_end|> used?==========\n

A cover is as long as the name that it covers, so positions in the text do not change. Texts without
such a name are neither covered nor encoded by the copy.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from absl import logging
from tokenizers import Encoding, Tokenizer

from atlas_jax.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

_TODAY = re.compile(r"""\bstrftime_now\(\s*(['"])(?P<format>.*?)\1\s*\)""")
_TAKEN = {"messages", "conversation", "tools", "add_generation_prompt", "tokenize"}
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
_OURS = ("weight", "train")  # fields of a message that select trained turns
_SYSTEM = "System probe."
_USER = "User probe."
_ANSWER = "Answer probe."
_COVERS = 0x100000
_STAND_INS = 0x108000  # first of the characters used, in a private plane of Unicode
_PRIVATE = re.compile("[\U00100000-\U0010fffd]+")
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # byte tokens of SentencePiece


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


class ControlTokens:
    """The special tokens of a tokenizer, and covers for their names in texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, framing: Collection[str] = ()) -> None:
        """Collects the names.

        Args:
            tokenizer: the tokenizer, a fast one.
            framing: tokens that the chat template writes around messages, which some tokenizers do
                not mark as special.
        """
        self._tokenizer = tokenizer
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        named = {name for name in tokenizer.special_tokens_map.values() if isinstance(name, str)}
        names = {name for name in special | named | set(framing) if is_marker(name)}
        self._numbers = {name: i for i, name in enumerate(sorted(names))}
        self._names = list(self._numbers)
        self._around = names & (named | set(framing))
        """Names of the tokens that begin and end texts and turns; the model writes the others."""
        self._lengths = sorted({len(name) for name in names}, reverse=True)
        first = "".join(sorted({re.escape(name[0]) for name in names}))
        self._first = re.compile(f"[{first}]" if first else "(?!)")

    def cover(self, text: str) -> str:
        """Returns a text with its names of special tokens covered.

        Raises:
            ValueError: if it has both such names and private characters.
        """
        return self._checked(self._replaced(text, self._numbers, _COVERS), text)

    def cover_messages(self, messages: Sequence[Message]) -> list[Message]:
        """Returns messages with the names of special tokens in them covered.

        In the assistant's messages only tokens around texts and turns are covered, because the
        model itself writes other special tokens, such as the begin of a thought or a call.

        Raises:
            ValueError: if a message has both such names and private characters.
        """
        covered: list[Any] = []
        for message in messages:
            which = self._around if message["role"] == "assistant" else self._numbers
            change = functools.partial(self._replaced, names=which, base=_COVERS)
            covered.append(
                {k: v if k == "role" else _mapped(v, change) for k, v in message.items()}
            )
        return self._checked(covered, list(messages))

    def cover_tools(self, tools: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
        """Returns tool definitions with the names of special tokens in them covered."""
        return tuple(_mapped(tool, self.cover) for tool in tools)

    def named_in(self, text: str) -> bool:
        """Returns whether a text contains the name of a special token."""
        return next(self._find(text), None) is not None

    def uncover(self, text: str) -> str:
        """Returns a text with its covers replaced by the covered names."""

        def shown(match: re.Match[str]) -> str:
            name = self._names[ord(match[0][0]) - _COVERS]
            whole, rest = divmod(len(match[0]), len(name))
            return name * whole + name[:rest]

        last = chr(_COVERS + max(len(self._names) - 1, 0))
        return re.sub(f"([{chr(_COVERS)}-{last}])\\1*", shown, text)

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoding:
        """Returns the tokens of a text, in which covered names are encoded as text.

        Args:
            text: the rendered text.
            add_special_tokens: whether the tokenizer adds tokens such as that of the beginning.
        """
        renamed = self._replaced(text, self._numbers, _STAND_INS)
        return self._copy.encode(self.uncover(renamed), add_special_tokens=add_special_tokens)

    def _replaced(self, text: str, names: Collection[str], base: int) -> str:
        """Returns the text with each of the names replaced by a private character, repeated."""
        parts = []
        at = 0
        for start, name in self._find(text):
            if name in names:
                parts += [text[at:start], chr(base + self._numbers[name]) * len(name)]
                at = start + len(name)
        return "".join([*parts, text[at:]]) if parts else text

    def _find(self, text: str) -> Iterator[tuple[int, str]]:
        """Yields the names in a text as a tokenizer finds them: the leftmost, then the longest."""
        end = 0
        for match in self._first.finditer(text):
            start = match.start()
            if start >= end:
                parts = (text[start : start + length] for length in self._lengths)
                if name := next((part for part in parts if part in self._numbers), ""):
                    end = start + len(name)
                    yield start, name

    def _checked(self, covered: T, before: T) -> T:
        given = before if isinstance(before, str) else json.dumps(before, ensure_ascii=False)
        if covered != before and (found := _PRIVATE.search(given)):
            raise ValueError(
                f"names a special token and has the private character U+{ord(found[0][0]):X}; "
                "remove one of the two"
            )
        return covered

    @functools.cached_property
    def _copy(self) -> Tokenizer:
        """The tokenizer with other names for its special tokens, and the same ids."""
        content = json.loads(self._tokenizer.backend_tokenizer.to_str())
        # The copy must return every token of a text; lengths are cut elsewhere.
        content["truncation"] = content["padding"] = None
        other = {name: chr(_STAND_INS + i) * len(name) for name, i in self._numbers.items()}
        for token in content["added_tokens"]:
            token["content"] = other.get(token["content"], token["content"])
        model = content["model"]
        vocab = model["vocab"]
        # A name that is left in the vocabulary would still match.
        model["vocab"] = (
            {other.get(piece, piece): i for piece, i in vocab.items()}
            if isinstance(vocab, dict)
            else [[other.get(piece, piece), score] for piece, score in vocab]
        )
        if model.get("unk_token"):
            model["unk_token"] = other.get(model["unk_token"], model["unk_token"])
        if "merges" in model:
            pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
            # Merges that lead to a renamed piece would name what the vocabulary no longer has.
            model["merges"] = [p for p in pairs if other.keys().isdisjoint((*p, "".join(p)))]
        return Tokenizer.from_str(json.dumps(content))


def is_marker(name: str) -> bool:
    """Returns whether an added token is a marker: neither a word, nor white space, nor a byte."""
    return len(name) > 2 and bool(name.strip()) and not name.isalnum() and not _BYTE.match(name)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Returns a JSON value with `change` applied to all of its texts, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(k, change): _mapped(item, change) for k, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list | tuple) else value
