"""Forms of a user's reward function: which arguments it takes, and what it may return.

| parameters | given | returns |
|---|---|---|
| `sample` | one `Sample` | a number or None |
| `samples` | a list of them | a list of numbers or None |
| `prompts` or `completions` | TRL's columns | a list of numbers or None |

TRL's columns are `prompts`, `completions`, `completion_ids` and every column of the rows. A
function gets those that it has parameters for, and with `**kwargs` all of them.
"""

from __future__ import annotations

import enum
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, SupportsFloat

from atlas_jax import sockets
from atlas_jax.types import Sample

UserFunction = Callable[..., Any]

_OWN_COLUMNS = ("prompt", "completion", "prompts", "completions", "completion_ids")
"""Columns of rows that TRL gives no function, or gives it under another meaning."""
_SHAPES = "sample, or samples, or prompts and completions with columns of the rows"


class Form(enum.Enum):
    """The arguments of a reward function."""

    SAMPLE = "sample"
    SAMPLES = "samples"
    COLUMNS = "columns"


class FunctionResult(NamedTuple):
    """The result of one call of a reward function."""

    values: list[float | None]  # one for each sample; () after a failure
    error: str = ""  # the reason of a failure


def find(reference: str) -> tuple[UserFunction, Form]:
    """Returns the function that a reference of `reward.names` means, and its form.

    Raises:
        ValueError: says in one line why it cannot be a reward.
    """
    function = sockets.resolve(reference, "reward.names")
    return function, form_of(function, f"reward.names={reference}")


def form_of(function: UserFunction, name: str) -> Form:
    """Returns the form of a function, told from the names of its parameters.

    Args:
        function: a function or an object that can be called, of a user.
        name: its name in errors.

    Raises:
        ValueError: if its parameters fit no form.
    """
    called = function if inspect.isroutine(function) else type(function).__call__
    if inspect.isclass(function) or any(
        check(called) for check in (inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    ):
        raise ValueError(f"{name} is no function that returns rewards; name a function")
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} does not tell its parameters; write a function of {_SHAPES}"
        ) from error
    named = {n for n, p in parameters.items() if p.kind not in (p.POSITIONAL_ONLY, p.VAR_KEYWORD)}
    forms = [
        form
        for form, words in (
            (Form.SAMPLE, {"sample"}),
            (Form.SAMPLES, {"samples"}),
            (Form.COLUMNS, {"prompts", "completions"}),
        )
        if words & named
    ]
    others = [n for n, p in parameters.items() if _is_needed(p) and n not in ("sample", "samples")]
    if len(forms) != 1 or (others and forms != [Form.COLUMNS]):
        raise ValueError(
            f"{name} takes ({', '.join(parameters)}); the parameters of a reward must be {_SHAPES}"
        )
    return forms[0]


def is_async(function: UserFunction) -> bool:
    """Returns whether a function, or an object that can be called, is async."""
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))


def arguments(function: UserFunction, form: Form, samples: Sequence[Sample]) -> dict[str, Any]:
    """Returns the keyword arguments of one call.

    Args:
        function: a user's function.
        form: that of the function.
        samples: those to score; one for `Form.SAMPLE`.

    Raises:
        ValueError: names a column that the function needs and no row has.
    """
    if form is Form.SAMPLE:
        return {"sample": samples[0]}
    if form is Form.SAMPLES:
        return {"samples": list(samples)}
    columns = _columns(samples)
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        wanted = columns
    else:
        wanted = {n: column for n, column in columns.items() if n in parameters}
    for name, parameter in parameters.items():
        if _is_needed(parameter) and name not in wanted:
            has = ", ".join(columns)
            raise ValueError(f"its parameter {name} is a column of no row; there are {has}")
    return wanted


def checked(form: Form, result: Any, num_samples: int) -> FunctionResult:
    """Returns what a function returned as an outcome.

    Args:
        form: that of the function.
        result: anything.
        num_samples: the number of samples that it was given.
    """
    given = result
    if form is Form.SAMPLE:
        given = [result]
    elif isinstance(result, str | bytes | Mapping) or not isinstance(result, Iterable):
        kind = type(result).__name__
        return _wrong(f"returned a {kind}; return a list of numbers or None, one for each sample")
    given = list(given)
    if len(given) != num_samples:
        return _wrong(
            f"returned {len(given)} values for {num_samples} samples; return one for each"
        )
    for value in given:
        if not (value is None or isinstance(value, SupportsFloat)):
            return _wrong(f"returned a {type(value).__name__}; return a number or None")
    values = [None if value is None else float(value) for value in given]
    for number in values:
        if number is not None and not math.isfinite(number):
            return _wrong(f"returned {number}; return a finite number or None")
    return FunctionResult(values)


CLOSED = "the run has ended"
"""The reason of a call that was made or not finished when its reward was closed."""


def overdue(timeout_secs: float) -> str:
    """Returns the reason of a call that took too long."""
    return f"took longer than reward.timeout_secs={timeout_secs:g}"


def call(function: UserFunction, form: Form, samples: Sequence[Sample]) -> FunctionResult:
    """Returns the outcome of a sync function; whatever it raises is one too."""
    result, error = sockets.attempt(_call, function, form, samples)
    return FunctionResult([], error) if error else result


def _call(function: UserFunction, form: Form, samples: Sequence[Sample]) -> FunctionResult:
    result = function(**arguments(function, form, samples))
    return checked(form, result, len(samples))


def _wrong(message: str) -> FunctionResult:
    return FunctionResult([], message)


def _is_needed(parameter: inspect.Parameter) -> bool:
    variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    return parameter.default is parameter.empty and not variable


def _columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Returns TRL's columns: the texts of the policy, and the rows as they were read.

    A prompt that is a list of messages stays one, and its completion is a list of one message.
    """
    rows = [sample.question.row for sample in samples]
    names = dict.fromkeys(name for row in rows for name in row if name not in _OWN_COLUMNS)
    chats = [isinstance(row.get("prompt"), list) for row in rows]
    texts = [sample.completion.text for sample in samples]
    return {
        "prompts": [
            row["prompt"] if is_chat else sample.question.text
            for sample, row, is_chat in zip(samples, rows, chats, strict=True)
        ],
        "completions": [
            [{"role": "assistant", "content": text}] if is_chat else text
            for text, is_chat in zip(texts, chats, strict=True)
        ],
        "completion_ids": [list(sample.completion.token_ids) for sample in samples],
        **{name: [row.get(name) for row in rows] for name in names},
    }
