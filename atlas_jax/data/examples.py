"""Conversations and plain texts from rows of the accepted formats.

Rows of other tools are converted to these formats first, see `shapes`.

| format | fields of a row | becomes |
|---|---|---|
| `messages` | `messages`: list of `{"role", "content"}` | the conversation as it is |
| `prompt_completion` | `prompt`, `completion`: two texts | plain text, without a chat template |
| `prompt_completion` | `prompt`, `completion`: two lists of messages | a conversation of both |
| `teaching` | `problem_text`, `student_approach`, | a question and a lesson, worded by |
|            | `teacher_diagnosis`, `teacher_teaching` | the templates of the config |

With `format="auto"` a row has the first of these formats of which it has all fields. A field that
is null counts as absent, because columnar files write null for missing fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

from atlas_jax.data.sources import Row, Rows, check_rejected
from atlas_jax.options.data import ColumnsConfig, DataConfig, LessonsConfig
from atlas_jax.types import Message

FIELDS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "teaching": ("problem_text", "student_approach", "teacher_diagnosis", "teacher_teaching"),
}
FIELDS["session"] = FIELDS["teaching"]  # the fields of a session's lessons
"""Fields that a row must have, by format."""

_ROLES = ("system", "user", "assistant", "tool")
_TEMPLATE_FIELDS = {
    "teacher_template": ("question", "approach"),
    "lesson_template": ("approach", "diagnosis", "teaching"),
}
NO_LESSONS = LessonsConfig()
_OUR_COLUMNS = ColumnsConfig()
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class Conversation(NamedTuple):
    """Messages for the tokenizer's chat template."""

    name: str
    messages: list[Message]
    num_context: int = 0
    """Number of context messages at the start, whose assistant turns are not trained."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Definitions of the tools that the assistant may call, in the form of chat templates."""


class PlainText(NamedTuple):
    """A prompt and its completion, for models without a chat template."""

    name: str
    prompt: str
    completion: str


Sample: TypeAlias = Conversation | PlainText


class OtherFormatError(ValueError):
    """A row of another format than the config asks for.

    Attributes:
        other: the format of the row.
    """

    def __init__(self, text: str, other: str) -> None:
        super().__init__(text)
        self.other = other


class Samples(NamedTuple):
    """The usable rows of a dataset, and `name: reason` of the others."""

    samples: list[Sample]
    rejected: list[str]


def parse_rows(rows: Rows, config: DataConfig, lessons: LessonsConfig = NO_LESSONS) -> Samples:
    """Returns every row as a conversation or plain text.

    Raises:
        ValueError: if a template has an unknown field, or more than `config.max_rejected_frac` of
            the rows have none of the accepted formats.
    """
    check_templates(lessons)
    samples: list[Sample] = []
    rejected = []
    others: list[str] = []
    for row in rows.rows:
        try:
            samples.append(to_sample(row, config, lessons))
        except ValueError as error:
            rejected.append(f"{row.name}: {error}")
            if isinstance(error, OtherFormatError):
                others.append(error.other)
    if others and len(others) == len(rows.rows):
        raise ValueError(
            f"data.format={config.format}, but all rows have the format "
            f"{' or '.join(dict.fromkeys(others))}; use --config.data.format=auto"
        )
    check_rejected(rejected, len(rows.rows), config.max_rejected_frac)
    return Samples(samples, rejected)


def to_sample(row: Row, config: DataConfig, lessons: LessonsConfig = NO_LESSONS) -> Sample:
    """Returns one row as a conversation or plain text.

    Raises:
        ValueError: if the row cannot be used; the message does not name the row.
    """
    fields = row.fields
    if config.columns != _OUR_COLUMNS or not _is_ours(fields):
        fields = _converted(fields, config.columns)
    kind = row_format(fields, config.format)
    if kind == "messages":
        sample: Sample = Conversation(row.name, _messages(fields["messages"], "messages"))
    elif kind in ("teaching", "session"):
        sample = Conversation(row.name, _teaching(fields, lessons))
    else:
        sample = _prompt_completion(row.name, fields["prompt"], fields["completion"])
    if isinstance(sample, PlainText):
        return sample
    if not trained_turns(sample):
        raise ValueError(
            "has no assistant message to train on, after one of the user and not of weight 0; add "
            "one, or remove the row"
        )
    if kind not in ("teaching", "session"):
        sample = sample._replace(tools=_tools(fields.get("tools")))
    return _with_system_prompt(sample, lessons.system_prompt)


def _is_ours(fields: Mapping[str, Any]) -> bool:
    """Tells a row that is nothing but two texts, or messages of plain text with our roles."""
    if fields.keys() == {"prompt", "completion"}:
        # A text that begins like this may be the JSON of messages.
        return all(isinstance(v, str) and not v.lstrip().startswith("[") for v in fields.values())
    messages = fields.get("messages")
    return (
        fields.keys() == {"messages"}
        and isinstance(messages, list)
        and all(
            isinstance(message, dict)
            and message.keys() == {"role", "content"}
            and message["role"] in _ROLES
            and isinstance(message["content"], str)
            for message in messages
        )
    )


def _converted(fields: Mapping[str, Any], columns: ColumnsConfig) -> dict[str, Any]:
    """Returns the fields of a row in our form, with our names."""
    from atlas_jax.data import shapes  # of other tools, and of rows with more than texts

    renamed = shapes.renamed(fields, vars(columns))
    if all(name in renamed for name in FIELDS["teaching"]):
        return renamed
    return shapes.training_row(renamed)


def trained_turns(sample: Conversation) -> list[int]:
    """Returns the indices of the trained messages: the assistant's answers, without exclusions.

    A row excludes one with `"weight": 0` or `"train": false`. Messages of the assistant before the
    first of the user are context.
    """
    roles = [message["role"] for message in sample.messages]
    asked = roles.index("user") if "user" in roles else len(roles)
    turns = range(max(sample.num_context, asked), len(roles))
    return [i for i in turns if roles[i] == "assistant" and _is_trained(sample.messages[i])]


def _is_trained(message: Mapping[str, Any]) -> bool:
    return message.get("weight", 1) != 0 and bool(message.get("train", True))


def row_format(fields: Mapping[str, Any], wanted: str) -> str:
    """Returns the format of a row with these fields.

    Args:
        fields: the row's fields.
        wanted: the required format, or `auto`.

    Raises:
        ValueError: if it has none; the message names the missing fields, the row's fields and the
            accepted formats.
    """
    choices = list(FIELDS) if wanted == "auto" else [wanted]
    for choice in choices:
        if all(field in fields for field in FIELDS[choice]):
            return choice
    closest = max(choices, key=lambda choice: sum(field in fields for field in FIELDS[choice]))
    missing = [field for field in FIELDS[closest] if field not in fields]
    accepted = " or ".join(dict.fromkeys(f"({', '.join(FIELDS[name])})" for name in choices))
    more = ", and the shapes of other tools that docs/data.md lists; data.columns tells other names"
    reason = (
        f"lacks {', '.join(missing)}; it has {', '.join(fields) or 'no fields'}; "
        f"data.format={wanted} accepts rows with {accepted}{more if wanted == 'auto' else ''}"
    )
    for other, needed in FIELDS.items():
        if all(field in fields for field in needed):
            raise OtherFormatError(f"{reason}; use data.format=auto or {other}", other)
    raise ValueError(reason)


def check_templates(lessons: LessonsConfig) -> None:
    """Checks the placeholders of the teaching templates.

    Raises:
        ValueError: if no field fills a placeholder.
    """
    for option, fields in _TEMPLATE_FIELDS.items():
        check_template(f"teaching.{option}", getattr(lessons, option), fields)


def check_template(
    option: str, template: str, fields: Sequence[str], needed: Sequence[str] = ()
) -> None:
    """Checks the placeholders of a template.

    Args:
        option: the template's option, for errors.
        template: the text with placeholders; an empty one is not checked here.
        fields: names that a placeholder may have.
        needed: those of them that it must have.

    Raises:
        ValueError: if a placeholder is unknown, or a needed one is missing.
    """
    placeholders = _PLACEHOLDER.findall(template)
    shown = ", ".join(f"{{{name}}}" for name in fields)
    for name in placeholders:
        if name not in fields:
            raise ValueError(f"{option} has the unknown field {{{name}}}; it may use {shown}")
    for name in needed:
        if name not in placeholders:
            raise ValueError(
                f"{option}={template!r} lacks {{{name}}}; the model would never see the {name}"
            )


def fill(template: str, values: Mapping[str, str]) -> str:
    """Returns `template` with `{name}` replaced by `values[name]`; braces in values are kept."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _prompt_completion(name: str, prompt: Any, completion: Any) -> Sample:
    if isinstance(prompt, list) and isinstance(completion, list):
        context = _messages(prompt, "prompt")
        return Conversation(name, context + _messages(completion, "completion"), len(context))
    if isinstance(prompt, str) and isinstance(completion, str):
        return PlainText(name, _text(prompt, "prompt"), _text(completion, "completion"))
    raise ValueError(
        f"has a prompt of type {type(prompt).__name__} and a completion of type "
        f"{type(completion).__name__}; both must be texts, or both lists of messages"
    )


def _teaching(fields: Mapping[str, Any], lessons: LessonsConfig) -> list[Message]:
    for option in _TEMPLATE_FIELDS:
        if not getattr(lessons, option):
            raise ValueError(
                f"is a teaching row but teaching.{option} is empty; set it in the config"
            )
    values = [_text(fields[field], field) for field in FIELDS["teaching"]]
    known = dict(zip(("question", "approach", "diagnosis", "teaching"), values, strict=True))
    return [
        Message(role="user", content=fill(lessons.teacher_template, known)),
        Message(role="assistant", content=fill(lessons.lesson_template, known)),
    ]


def _with_system_prompt(sample: Conversation, system_prompt: str) -> Conversation:
    if not system_prompt or sample.messages[0]["role"] == "system":
        return sample
    system = Message(role="system", content=system_prompt)
    num_context = sample.num_context + 1
    return sample._replace(messages=[system, *sample.messages], num_context=num_context)


def _messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"has {field} that are no list of messages; write [{{role, content}}, …]")
    return [_message(item, f"{field}[{i}]") for i, item in enumerate(value)]


def _message(value: Any, place: str) -> Message:
    """Returns a checked message; the chat template may read keys besides role and content."""
    if not isinstance(value, dict):
        raise ValueError(f"has a {type(value).__name__} as {place}; write {{role, content}}")
    given = {key: item for key, item in value.items() if item is not None}
    if given.get("tool_calls"):
        given.setdefault("content", "")  # a message that only calls a tool has no content
    missing = [key for key in ("role", "content") if key not in given]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)} in {place}, which has {', '.join(given)}")
    if given["role"] not in _ROLES:
        raise ValueError(
            f"has the role {given['role']!r} in {place}; it must be one of {', '.join(_ROLES)}"
        )
    _text(given["content"], f"{place}.content")
    if given.get("weight", 1) not in (0, 1):
        raise ValueError(f"has {place}.weight={given['weight']!r}; it must be 0 or 1")
    if not isinstance(given.get("train", True), bool):
        raise ValueError(f"has {place}.train={given['train']!r}; it must be true or false")
    if given.get("tool_calls"):
        given["tool_calls"] = _calls(given["tool_calls"], f"{place}.tool_calls")
    return cast(Message, given)


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Returns tool calls with their arguments as objects.

    OpenAI writes them as JSON text. Columnar files write null for an argument that only other calls
    have.
    """
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise ValueError(f"has {place} that are no list of objects")
    calls = []
    for call in value:
        whole = {name: item for name, item in call.items() if item is not None}
        function = whole.get("function", whole)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"has a call without the name of a function in {place}")
        changed = dict(function)
        if "arguments" in function:
            changed["arguments"] = _arguments(function["arguments"])
        calls.append({**whole, "function": changed} if "function" in whole else changed)
    return calls


def _arguments(value: Any) -> Any:
    if not isinstance(value, str):
        return _without_nulls({} if value is None else value)
    from atlas_jax.data import shapes  # it has been imported for a row with calls

    try:
        found = shapes.from_json(value or "{}", "arguments")
    except ValueError:
        return value
    return found if isinstance(found, dict) else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(item) for k, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Returns the tools of a row, which may be JSON text."""
    if isinstance(value, str):
        from atlas_jax.data import shapes

        value = shapes.from_json(value, "tools") if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("has tools that are no list of objects")
    return tuple(_without_nulls(tool) for tool in value)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"has a {type(value).__name__} as {place}; it must be a text")
    check_encodable(value, place)
    return value


def check_encodable(text: str, place: str) -> None:
    """Raises a ValueError if a text has half a surrogate pair, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"has half a surrogate pair in {place} ({error}); repair it") from None
