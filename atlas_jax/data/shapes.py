"""Rows as other tools write them, told from their fields, in the fields of ours.

| shape | fields | becomes |
|---|---|---|
| ShareGPT | `conversations`: list of `{"from", "value"}` or `{"role", "content"}` | `messages` |
| OpenAI | `messages` with parts, `function_call`, `developer` | `messages` |
| Alpaca | `instruction`, `output`, perhaps `input`, `system`, `history` | `messages` |
| Dolly | `instruction`, `response`, perhaps `context` | `messages` |
| a question and a text | `prompt`, `query`, `question` or `problem`; `response`, … | `messages` |
| text alone | `text` | `prompt`, empty, and `completion` |

For GRPO a `prompt` may be a list of messages (TRL, verl), and the ground truth may stand in
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
"""Roles of other tools -> ours."""

_PAIRS = (
    ("instruction", "output"), ("instruction", "response"), ("prompt", "response"),
    ("query", "response"), ("question", "response"), ("problem", "solution"),
    ("question", "answer"), ("input", "output"),
)  # fmt: skip
"""What somebody asks and what is answered, in the order in which they are looked for."""

_CONTEXT = ("input", "context")  # stands behind the instruction


def present(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that a row has: what is null, or NaN as pandas writes it, is absent."""
    return {
        name: value
        for name, value in fields.items()
        if value is not None and not (isinstance(value, float) and math.isnan(value))
    }


def renamed(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields that a row has, some under our names.

    Args:
        fields: of the row.
        columns: our name -> the row's; empty for its own.

    Raises:
        ValueError: names a column that the row lacks.
    """
    found = present(fields)
    for ours, theirs in columns.items():
        if theirs:
            if theirs not in found:
                has = ", ".join(found) or "no fields"
                raise ValueError(f"lacks {theirs}, which data.columns.{ours} names; it has {has}")
            found[ours] = found.pop(theirs)
    return found


def training_row(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a row for SFT with `messages`, or `prompt` and `completion`.

    Args:
        fields: those that the row has.

    Raises:
        ValueError: says what is wrong with the row.
    """
    if "messages" in fields:
        return fields | {"messages": messages(fields["messages"], "messages")}
    if "conversations" in fields:
        found = messages(fields["conversations"], "conversations")
        return _rest(fields, "conversations") | {"messages": _with_system(fields, found)}
    if {"prompt", "completion"} <= fields.keys():
        return fields | _alike(fields["prompt"], fields["completion"])
    if {"chosen", "rejected"} <= fields.keys():
        raise ValueError(
            "is a preference row (chosen, rejected), which neither SFT nor GRPO trains on; make "
            "messages or prompt and completion of the chosen text"
        )
    for asked, answered in _PAIRS:
        if {asked, answered} <= fields.keys():
            found = _pair(fields, asked, answered)
            return _rest(fields, asked, answered) | {"messages": _with_system(fields, found)}
    if isinstance(fields.get("text"), str):
        return {"prompt": "", "completion": fields["text"]}
    return fields


def question_row(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a row for GRPO with the question as text.

    Raises:
        ValueError: if the prompt is a conversation of several turns.
    """
    found = dict(fields)
    if isinstance(found.get("prompt"), list):
        asked = messages(found["prompt"], "prompt")
        fine = all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in asked)
        roles = [str(m.get("role")) if isinstance(m, dict) else "none" for m in asked]
        if fine and [role for role in roles if role != "system"] == ["user"]:
            found["prompt"] = "\n\n".join(m["content"] for m in asked)
        elif not isinstance(found.get("question"), str):
            raise ValueError(
                f"has a prompt with the roles {', '.join(roles)}; a question is one message of the "
                "user, perhaps behind one of the system"
            )
    reward_model = found.pop("reward_model", None)
    if isinstance(reward_model, dict) and reward_model.get("ground_truth") is not None:
        found.setdefault("ground_truth", reward_model["ground_truth"])
    return found


def messages(value: Any, field: str) -> Any:
    """Returns a conversation with our roles, texts as contents, and tool calls.

    What is no list, and in a list what is no message, is returned as it is.

    Raises:
        ValueError: for JSON text that cannot be read, and for parts that are no text.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"has {field} as a text that is not JSON: {error}") from None
    if not isinstance(value, list):
        return value
    return [
        _message(item, f"{field}[{i}]") if isinstance(item, dict) else item
        for i, item in enumerate(value)
    ]


def _message(item: dict[str, Any], place: str) -> dict[str, Any]:
    found = present(item)
    if "from" in found and "value" in found and "role" not in found:
        found["role"], found["content"] = found.pop("from"), found.pop("value")
    if isinstance(found.get("role"), str):
        role = found["role"].lower()
        found["role"] = _ROLES.get(role, role)
    if isinstance(found.get("content"), list):
        found["content"] = "".join(_part(part, place) for part in found["content"])
    if isinstance(call := found.pop("function_call", None), dict):
        found["tool_calls"] = [{"type": "function", "function": call}]
    return found


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type", "unknown") if isinstance(part, dict) else type(part).__name__
    raise ValueError(f"has a part of type {kind} in {place}.content; only texts are trained")


def _alike(prompt: Any, completion: Any) -> dict[str, Any]:
    """Returns prompt and completion as two texts or two lists of messages."""
    if isinstance(prompt, list) or isinstance(completion, list):
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        prompt, completion = messages(prompt, "prompt"), messages(completion, "completion")
    return {"prompt": prompt, "completion": completion}


def _pair(fields: Mapping[str, Any], asked: str, answered: str) -> list[dict[str, Any]]:
    """Returns the turns before, if there are some, then what is asked and what is answered."""
    more = [name for name in _CONTEXT if name != asked and name in fields]
    texts = [fields[name] for name in (asked, *more)]
    if not all(isinstance(text, str) for text in (*texts, fields[answered])):
        raise ValueError(f"has {asked} or {answered} that is no text")
    turns = [text for pair in fields.get("history") or [] for text in pair]
    roles = itertools.cycle(("user", "assistant"))
    found = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    question = "\n\n".join(text for text in texts if text)
    return [
        *found,
        {"role": "user", "content": question},
        {"role": "assistant", "content": fields[answered]},
    ]


def _with_system(fields: Mapping[str, Any], found: Any) -> Any:
    system = fields.get("system")
    if not system or not isinstance(found, list):
        return found
    return [{"role": "system", "content": system}, *found]


def _rest(fields: Mapping[str, Any], *used: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in used}
