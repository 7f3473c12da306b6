r"""Equality of answers: as numbers, dates, sets, lists, intervals, expressions or texts.

    "[-2, 7]"  and  "x \in [-2,7]",   "2 and 3"  and  "3, 2",   "1+2x"  and  "2x + 1"

A list without brackets is a set; in brackets the order counts. Texts are compared without case,
articles and spaces around marks. Single letters and LaTeX commands keep their case.
"""

from __future__ import annotations

import calendar
import re
from fractions import Fraction
from typing import Any

from atlas_jax.rewards import choices, expressions, numbers, spoken
from atlas_jax.rewards.plain import EDGE, clean, latex, plain, without_tail

_MAX_COLLECTION = 2000  # characters; a longer one is compared as text
_MAX_NUMBER = 256  # characters of a number in words
_MAX_DEPTH = 6  # of nested brackets

_ASSIGNED = re.compile(
    r"(?!(?:[\w ]{0,40} )?(?:no|not|never)\b)"
    r"\\?[a-z][\w ]{0,40}(?:\^\{?-1\}?)?(?:\([a-z]\))? ?= ?(?=[^=]*$)(?![^=]*[<>])",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"\b(?:the|an|a) (?=[^\W\d_]{2})")
_SPACED_MARK = re.compile(r" ?([^\w\s]) ?")
_CASED = re.compile(r"\\[A-Za-z]+|(?<![^\W_])[B-Zb-z](?![^\W_])")
_WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{3}")
_ELEMENT = re.compile(r"\\?[A-Za-z]+ ?\\in ?(?=\S)")
_NAMED = re.compile(r"\s*(\\?[A-Za-z](?:_\{?\w{1,3}\}?)?) ?= ?(?![=<>])")
_RELATION = re.compile(r"\\(?:leq?|geq?|lt|gt)(?![A-Za-z])|<=|>=|(?<![=<>!:])=(?![=<>])|<|>")
_OPERATOR = {"\\le": "<=", "\\leq": "<=", "\\ge": ">=", "\\geq": ">=", "\\lt": "<", "\\gt": ">"}
_SEPARATOR = re.compile(r"\s*(?:,\s*(?:and|or)\b|[,;]|(?<=\s)(?:and|or)(?=\s))\s*", re.IGNORECASE)
_GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_UNITS_IN_ROW = re.compile(r"(?<=[^\W\d_])(?<! and)(?<! or) (?=\d+(?:\.\d+)? ?[^\W\d_])")
_MONTHS = {
    name.lower(): i
    for names in (calendar.month_name, calendar.month_abbr)
    for i, name in enumerate(names)
    if name
}
_DATE = re.compile(
    rf"(?:(\d{{1,2}})(?:st|nd|rd|th)? (?:of )?)?({'|'.join(_MONTHS)})\.? ?"
    r"(?:(\d{1,2})(?:st|nd|rd|th)?)?,? ?(\d{4})?"
)
_ISO_DATE = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})")
_CLOCK = re.compile(r"\b0(?=\d:\d\d)")
_UNIT_BEHIND = re.compile(r" ([A-Za-z]{2,}(?: (?:per )?[A-Za-z]+){0,3})(?:\^\{?\d\}?)?$")
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
_RATIO = re.compile(r"(?<=\d) to (?=\d)")
_CLOSERS = {"(": ")", "[": "]", "{": "}"}


def same(answer: str, truth: str) -> bool:
    """Returns whether two answers are equal."""
    given = read(answer)
    target = read(truth)
    if not target and not isinstance(target, Fraction):
        return False
    if isinstance(given, Fraction) and isinstance(target, Fraction):
        amounts = [numbers.quantity(_unassigned(a)) for a in (answer, truth)]
        return amounts[0] is not None and amounts[1] is not None and amounts[0].agrees(amounts[1])
    if given == target:
        return _cased(_unassigned(answer)) == _cased(_unassigned(truth))
    return key(answer) == key(truth) or key(_valued(answer)) == key(_valued(truth))


def read(answer: str) -> Fraction | str:
    """Returns the exact number of an answer, or else its canonical text."""
    text = _unassigned(answer)
    number = numbers.quantity(text)
    return canonical(text) if number is None else number.value


def canonical(plain_text: str) -> str:
    """Returns a plain text in lower case, without articles and spaces around marks."""
    text = _ARTICLE.sub("", _CLOCK.sub("", plain_text.lower()))
    return without_tail(_SPACED_MARK.sub(r"\1", text)).lstrip(EDGE)


def key(answer: str) -> tuple[Any, ...]:
    """Returns the comparison key of an answer: two answers are equal if their keys are."""
    text = latex(clean(answer))
    return ("text", *_text(text)) if len(text) > _MAX_COLLECTION else _key(text, 0)


def is_plain_number(answer: str) -> bool:
    """Returns whether an answer is a number without a root or any other symbol."""
    return isinstance(read(answer), Fraction)


def _unassigned(answer: str) -> str:
    """Returns an answer in plain characters, without the name to which it is assigned."""
    text = without_tail(plain(clean(answer)))
    return _ASSIGNED.sub("", text, count=1) if _ASSIGNED.match(text) else text


def _valued(answer: str) -> str:
    """Returns the value that is assigned to a name: "2x + 1" of "y = 2x + 1"."""
    text = latex(clean(answer))
    return _ASSIGNED.sub("", text, count=1) if _ASSIGNED.match(text) else text


def _cased(answer: str) -> tuple[str, ...]:
    """Returns the parts of an answer for which case counts: symbols in a text without words."""
    text = plain(clean(answer))
    is_letter = len(text) < 2 and text.lower() < "k"  # an option or an article
    return () if is_letter or _WORD.search(text) else tuple(_CASED.findall(text))


def _key(text: str, depth: int) -> tuple[Any, ...]:
    text = text.strip().rstrip(".").strip()
    number = numbers.quantity(plain(text))
    if number is not None:
        return "number", number.value
    if text[:1].isalpha() and (said := _said(text)) is not None:
        return "number", said
    if depth < _MAX_DEPTH and (found := _date(text) or _collection(text, depth)):
        return found
    form = expressions.form(_without_unit(text))
    if form is None:
        return "text", *_text(text)
    return "number" if isinstance(form, Fraction) else "expression", form


def _without_unit(text: str) -> str:
    r"""Returns a numeric expression without its unit: "36\pi" of "36\pi cubic inches"."""
    match = _UNIT_BEHIND.search(text[-80:])
    if match is None:
        return text
    head = text[: len(text) - len(match[0])]
    is_unit = numbers.is_unit(match[1].split()[0]) and match[1].split()[0] != "times"
    return head if is_unit and "\\" in head and not _VARIABLE.search(head) else text


def _said(text: str) -> Fraction | None:
    """Returns the number of a text that consists of number words only."""
    number = numbers.quantity(spoken.in_digits(text[:_MAX_NUMBER]))
    return number.value if number and not number.unit and len(text) < _MAX_NUMBER else None


def _text(text: str) -> tuple[Any, ...]:
    words = canonical(_RATIO.sub(":", plain(text)))
    return words, _cased(text)


def _date(text: str) -> tuple[Any, ...] | None:
    text = text.lower()
    if match := _ISO_DATE.fullmatch(text):
        return "date", *(int(part) for part in match.groups())
    match = _DATE.fullmatch(text) if len(text) < 40 else None
    if match is None or not (match[1] or match[3] or match[4]) or (match[1] and match[3]):
        return None
    return "date", int(match[4] or 0), _MONTHS[match[2]], int(match[1] or match[3] or 0)


def _collection(text: str, depth: int) -> tuple[Any, ...] | None:
    r"""Returns the key of a set, list, interval, union or relation; None for other texts."""
    if element := _ELEMENT.match(text):
        return _key(text[element.end() :], depth + 1)
    if text.count("\\pm") == 1:
        signs = (text.replace("\\pm", sign).replace("\\mp", other) for sign, other in ("+-", "-+"))
        return "set", tuple(sorted((_key(_bare_value(s), depth + 1) for s in signs), key=repr))
    parts = _split(text, "\\cup")
    if len(parts) > 1:
        return "union", tuple(sorted((_key(part, depth + 1) for part in parts), key=repr))
    if bracketed := _in_brackets(text, depth):
        return bracketed
    items = _items(text, is_bare=True)
    if len(items) > 1:
        return _set(items, depth)
    return _relation(text, depth)


def _in_brackets(text: str, depth: int) -> tuple[Any, ...] | None:
    if text.startswith("\\{") and text.endswith("\\}"):
        inner = text[2:-2]
        return _set(_items(inner), depth) if _is_whole(f"{{{inner}}}") else None
    if text[:1] not in tuple(_CLOSERS) or text[-1:] not in (")", "]", "}") or not _is_whole(text):
        return None
    start = text[0]
    inner = text[1:-1]
    end = text[-1]
    items = _items(inner)
    if start == "{":
        return _key(inner, depth + 1) if end == "}" else None
    rows = _split(inner, ";")
    if start == "[" and len(rows) > 1:
        keys = tuple(_row(_items(row), depth) for row in rows)
    elif len(items) > 1 or start == "[":
        keys = tuple(_key(item, depth + 1) for item in items)
    else:
        return _key(inner, depth + 1) if end == ")" else None
    return "list", start, end, keys


def _row(items: list[str], depth: int) -> tuple[Any, ...]:
    return "list", "[", "]", tuple(_key(item, depth + 1) for item in items)


def _set(items: list[str], depth: int) -> tuple[Any, ...] | None:
    if not all(item.strip() for item in items):
        return None
    names = [match and match[1] for match in map(_NAMED.match, items)]
    if names[0] and all(name in (None, names[0]) for name in names[1:]):
        items = [_bare_value(item) for item in items]
    amounts = [numbers.quantity(plain(item)) for item in items]
    units = {amount.unit.rstrip("s") for amount in amounts if amount}
    keys = [_item(item, depth, with_unit=len(units - {""}) > 1) for item in items]
    if all(choices.verdict(item) is not None for item in items):
        return "in order", tuple(keys)
    return "set", tuple(sorted(keys, key=repr))


def _item(item: str, depth: int, with_unit: bool) -> tuple[Any, ...]:
    """Returns the key of one item of a set."""
    named = _NAMED.match(item)
    number = numbers.quantity(plain(item))
    if named:
        return "named", named[1], _key(item[named.end() :], depth + 1)
    if number is not None and with_unit:
        return "number", number.value, number.unit.rstrip("s")
    return _key(item, depth + 1)


def _bare_value(item: str) -> str:
    return _NAMED.sub("", item, count=1) if _NAMED.match(item) else item


def _relation(text: str, depth: int) -> tuple[Any, ...] | None:
    """Returns the key of an equation, without its order, or an inequality, as an interval."""
    match = list(_RELATION.finditer(text))
    if not match or len(match) > 2:
        return None
    signs = [_OPERATOR.get(m[0], m[0]) for m in match]
    edges = [0, *(at for m in match for at in m.span()), len(text)]
    sides = [text[a:b].strip() for a, b in zip(edges[::2], edges[1::2], strict=True)]
    keys = [_key(side, depth + 1) for side in sides]
    if any(key[0] not in ("number", "expression") for key in keys):
        return None
    if signs == ["="]:
        return "equation", tuple(sorted(keys, key=repr))
    if "=" in signs:
        return None
    if signs[0][0] == ">":
        signs = [sign.replace(">", "<") for sign in reversed(signs)]
        keys = keys[::-1]
        sides = sides[::-1]
    if any(sign[0] == ">" for sign in signs):
        return None
    is_variable = [re.fullmatch(r"\\?[A-Za-z]+", side) is not None for side in sides]
    lowest = _key("-\\infty", depth + 1)
    highest = _key("\\infty", depth + 1)
    if len(keys) == 3 and is_variable == [False, True, False]:
        brackets = "[" if signs[0] == "<=" else "(", "]" if signs[1] == "<=" else ")"
        return "list", *brackets, (keys[0], keys[2])
    if len(keys) == 2 and is_variable == [True, False]:
        return "list", "(", "]" if signs[0] == "<=" else ")", (lowest, keys[1])
    if len(keys) == 2 and is_variable == [False, True]:
        return "list", "[" if signs[0] == "<=" else "(", ")", (keys[0], highest)
    return "relation", tuple(signs), tuple(keys)


def _is_whole(text: str) -> bool:
    """Returns whether the first bracket of a text is closed by its last character."""
    depth = 0
    for i, mark in enumerate(text):
        if mark in "([{":
            depth += 1
        elif mark in ")]}":
            depth -= 1
            if depth == 0 and i < len(text) - 1:
                return False
    return depth == 0


def _items(text: str, is_bare: bool = False) -> list[str]:
    """Returns the parts of a list; the comma of a number such as 1,234 does not separate."""
    if is_bare and ", " in text:
        text = _GROUPED.sub("\x00", text)
    if is_bare:
        text = _UNITS_IN_ROW.sub(", ", text) if re.match(r"\d", text) else text
    return [part.replace("\x00", ",") for part in _split(text, _SEPARATOR)]


def _split(text: str, separator: str | re.Pattern[str]) -> list[str]:
    """Returns the parts of a text between separators outside brackets."""
    pattern = re.compile(re.escape(separator)) if isinstance(separator, str) else separator
    depths = []
    depth = 0
    for mark in text:
        depth += (mark in "([{") - (mark in ")]}")
        depths.append(depth)
    parts = []
    start = 0
    for match in pattern.finditer(text):
        if depths[match.end() - 1] == 0 and depths[match.start()] == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]
