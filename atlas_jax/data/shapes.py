"""Conversion of other tools' rows, which are recognised by their fields, to our fields.

| shape | fields | becomes |
|---|---|---|
| ShareGPT | `conversations`: list of `{"from", "value"}` or `{"role", "content"}` | `messages` |
| OpenAI | `messages` with parts, `function_call`, `developer`; `functions` | `messages`, `tools` |
| Alpaca | `instruction`, `output`, perhaps `input`, `system`, `history` | `messages` |
| Dolly | `instruction`, `response`, perhaps `context` | `messages` |
| a question and a text | `prompt`, `query`, `question` or `problem`; `response`, … | `messages` |
| text alone | `text` | `prompt`, empty, and `completion` |

If a row has `system` or `system_prompt`, its `messages` begin with that.

For GRPO a `prompt` may be a list of messages (TRL, verl), and the ground truth may be in
`reward_model` (verl).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bot": "assistant", "developer": "system", "function": "tool", "observation": "tool",
    "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
"""Our names for the roles of other tools."""

_PAIRS = (
    ("instruction", "output"), ("instruction", "response"), ("prompt", "response"),
    ("query", "response"), ("question", "response"), ("problem", "solution"),
    ("question", "answer"), ("question", "completion"), ("input", "output"),
)  # fmt: skip
"""Pairs of fields for question and answer, in the order in which they are tried."""

CONTEXT = ("input", "context")  # appended to the instruction
_SYSTEM = ("system", "system_prompt")
_MAX_DEPTH = 64
"""Largest depth of nested lists and objects, which are read recursively."""


def present(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a row without those that are null, or NaN as pandas writes it."""
    return {
        name: value
        for name, value in fields.items()
        if value is not None and not (isinstance(value, float) and math.isnan(value))
    }


def renamed(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields of a row, with columns renamed to our names.

    Args:
        fields: the fields of the row.
        columns: the row's names by our names; "" for equal names.

    Raises:
        ValueError: if a named column is missing, or a field is nested too deep.
    """
    result = present(fields)
    _check_depth(result)
    for ours, theirs in columns.items():
        if theirs:
            if theirs not in result:
                has = ", ".join(result) or "no fields"
                raise ValueError(f"lacks {theirs}, which data.columns.{ours} names; it has {has}")
            result[ours] = result.pop(theirs)
    return result


def training_row(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a row for SFT with `messages`, or `prompt` and `completion`.

    Args:
        fields: the fields of the row.

    Raises:
        ValueError: if the row cannot be used.
    """
    fields = _with_tools(fields)
    for name in ("messages", "conversations"):
        if name in fields:
            result = messages(fields[name], name)
            return _rest(fields, name) | {"messages": _with_system(fields, result)}
    if {"chosen", "rejected"} <= fields.keys():
        raise ValueError(
            "is a preference row (chosen, rejected), which neither SFT nor GRPO trains on; make "
            "messages or prompt and completion of the chosen text"
        )
    if {"prompt", "completion"} <= fields.keys():
        return _prompt_and_completion(fields)
    for asked, answered in _PAIRS:
        if {asked, answered} <= fields.keys():
            result = _pair(fields, asked, answered)
            return _rest(fields, asked, answered) | {"messages": _with_system(fields, result)}
    if isinstance(fields.get("text"), str):
        return {"prompt": "", "completion": fields["text"]}
    return fields


def question_row(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a row for GRPO with the question as text.

    The input of an instruction is appended to it, as for SFT.

    Args:
        fields: the fields of the row.

    Raises:
        ValueError: if the prompt is a conversation of several turns.
    """
    result = dict(fields)
    if isinstance(result.get("instruction"), str):
        texts = (result[name] for name in ("instruction", *CONTEXT) if name in result)
        result["instruction"] = "\n\n".join(t for t in texts if isinstance(t, str) and t)
    if is_chat(result.get("prompt")):
        asked = messages(result["prompt"], "prompt")
        fine = all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in asked)
        roles = [str(m.get("role")) if isinstance(m, dict) else "none" for m in asked]
        if fine and [role for role in roles if role != "system"] == ["user"]:
            result["prompt"] = "\n\n".join(m["content"] for m in asked)
        elif not isinstance(result.get("question"), str):
            raise ValueError(
                f"has a prompt with the roles {', '.join(roles)}; a question is one message of the "
                "user, perhaps after one of the system"
            )
    reward_model = result.pop("reward_model", None)
    if isinstance(reward_model, dict) and reward_model.get("ground_truth") is not None:
        result.setdefault("ground_truth", reward_model["ground_truth"])
    return result


def messages(value: Any, field: str) -> Any:
    """Returns a conversation with our roles, texts as contents, and tool calls.

    A value that is not a list, and an item that is not a message, are returned unchanged.

    Raises:
        ValueError: if JSON text cannot be read, or a part is not a text.
    """
    if isinstance(value, str):
        value = from_json(value, field)
    if not isinstance(value, list):
        return value
    return [
        _message(item, f"{field}[{i}]") if isinstance(item, dict) else item
        for i, item in enumerate(value)
    ]


def from_json(text: str, field: str) -> Any:
    """Returns the value of a field that is JSON text.

    Raises:
        ValueError: if it is not JSON, or is nested too deep.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"has {field} with too many brackets in each other") from None
    except ValueError as error:
        raise ValueError(f"has {field} as a text that is not JSON: {error}") from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    """Raises a ValueError if lists and objects are nested deeper than `_MAX_DEPTH`."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [x for x in itertools.chain.from_iterable(parts) if isinstance(x, dict | list)]
        if not level:
            return
    raise ValueError(f"has more than {_MAX_DEPTH} lists and objects in each other; flatten it")


def _message(item: dict[str, Any], place: str) -> dict[str, Any]:
    message = present(item)
    if "from" in message and "value" in message and "role" not in message:
        message["role"] = message.pop("from")
        message["content"] = message.pop("value")
    if isinstance(message.get("role"), str):
        role = message["role"].lower()
        message["role"] = _ROLES.get(role, role)
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_part(part, place) for part in message["content"])
    if isinstance(call := message.pop("function_call", None), dict):
        message["tool_calls"] = [{"type": "function", "function": call}]
    if message.get("role") == "function_call" and isinstance(message.get("content"), str):
        calls = from_json(message.pop("content"), f"{place}.value")  # ShareGPT's
        message |= {
            "role": "assistant",
            "tool_calls": calls if isinstance(calls, list) else [calls],
        }
    return message


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type", "unknown") if isinstance(part, dict) else type(part).__name__
    raise ValueError(f"has a part of type {kind} in {place}.content; only texts are trained")


def is_chat(value: Any) -> bool:
    """Returns whether a prompt or a completion is a list of messages, possibly as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
        return all(isinstance(part, dict) and {"role", "content"} <= part.keys() for part in value)
    return isinstance(value, list)


def _prompt_and_completion(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns a row with prompt and completion as two texts or two lists of messages.

    Raises:
        ValueError: if the row has fields that plain texts have no place for.
    """
    prompt = fields["prompt"]
    completion = fields["completion"]
    if isinstance(fields.get("label"), bool):
        raise ValueError(
            "is a preference row (prompt, completion and a label of true or false), which neither "
            "SFT nor GRPO trains on; keep the rows whose label is true, without it"
        )
    if is_chat(prompt) or is_chat(completion):
        if isinstance(prompt, str) and not is_chat(prompt):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(completion, str) and not is_chat(completion):
            completion = [{"role": "assistant", "content": completion}]
        prompt = _with_system(fields, messages(prompt, "prompt"))
        return fields | {"prompt": prompt, "completion": messages(completion, "completion")}
    if lost := [name for name in (*_SYSTEM, "tools") if fields.get(name)]:
        raise ValueError(
            f"has {lost[0]} beside a plain prompt and completion, which are trained as they stand; "
            "put it into the prompt, or make messages of all"
        )
    return fields


def _pair(fields: Mapping[str, Any], asked: str, answered: str) -> list[dict[str, Any]]:
    """Returns the earlier turns if any, then the question and the answer, as messages."""
    more = [name for name in CONTEXT if name != asked and name in fields]
    texts = [fields[name] for name in (asked, *more)]
    if not all(isinstance(text, str) for text in (*texts, fields[answered])):
        raise ValueError(f"has {asked} or {answered} that is no text")
    history = fields.get("history") or []
    history = from_json(history, "history") if isinstance(history, str) else history
    if not isinstance(history, list) or not all(map(_is_pair, history)):
        raise ValueError("has a history that is no list of pairs of texts, [[asked, answered], …]")
    turns = [text for pair in history for text in pair]
    roles = itertools.cycle(("user", "assistant"))
    found = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    question = "\n\n".join(text for text in texts if text)
    return [
        *found,
        {"role": "user", "content": question},
        {"role": "assistant", "content": fields[answered]},
    ]


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)
    )


def _with_system(fields: Mapping[str, Any], conversation: Any) -> Any:
    """Returns a conversation with the system text of a separate field as its first message."""
    text = next((fields[name] for name in _SYSTEM if fields.get(name)), None)
    if not text or not isinstance(conversation, list):
        return conversation
    (system,) = messages([{"role": "system", "content": text}], "system")
    if (
        not conversation
        or not isinstance(conversation[0], dict)
        or conversation[0].get("role") != "system"
    ):
        return [system, *conversation]
    if conversation[0].get("content") != system["content"]:
        raise ValueError("has a system text of its own and another one as first message; keep one")
    return conversation


def _with_tools(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns a row whose `functions`, OpenAI's former definitions of tools, are `tools`."""
    result = fields.get("functions")
    if "tools" in fields or not result:
        return fields
    result = from_json(result, "functions") if isinstance(result, str) else result
    if not isinstance(result, list) or not all(isinstance(f, dict) and "name" in f for f in result):
        return fields
    return fields | {"tools": [{"type": "function", "function": function} for function in result]}


def _rest(fields: Mapping[str, Any], *used: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in used}
