"""Extraction of the number from a sentence that states a single number."""

from __future__ import annotations

import re
from collections.abc import Iterator

from atlas_jax.rewards import spoken
from atlas_jax.rewards.numbers import (
    LETTERS,
    NUMBER,
    Quantity,
    is_attached_unit,
    is_unit,
    numbers,
    quantity,
    unit,
    value,
)

_MAX_STATEMENT = 1000  # longest sentence, in characters, whose number is extracted

_MORE_THAN = r"(?:more|less|fewer|greater|larger|smaller|higher|lower|other|rather) than"
_DENIED = re.compile(
    r"\b(?:no|not|never|none|neither|nor|cannot|except|without|unless|least|most|either|or|if"
    r"|wrong|incorrect|false|too|maybe|perhaps|might|between|root|square of|power|raised|twice"
    rf"|double|triple|half|plus|minus|divided|times (?:as|the|\d|x\b)|mod|log|sin|cos|tan"
    rf"|{_MORE_THAN}|factorial|choose|squared|cubed|pi|sqrt|negative)\b"
    r"|n't\b|[=<>^*/+|\\]|\d - | - \w\b"
)
_OF_AMOUNT = re.compile(
    r"\b(?:total|sum|amount|cost|price|average|mean|profit|distance|speed|number|area|volume|rate"
    r"|length|width|height|age|score|balance|value|answer|result) of(?: about)?$"
)
_PHRASE = re.compile(
    r"\b(?:in|for|after|before|of|from|per|over|within|during|with|on|at|by|every|each|than|but"
    r"|under|above|below|beyond|until|unlike|like|nearly|almost|the|this|that|these|those|his|her"
    r"|their|its|all|last|first|next|other|step|option|question|part|(?:up|close|next|due) to)$"
)
_LEAD_IN = re.compile(
    r"(?:(?:therefore|thus|hence|then|so|simply|just|exactly|only|about|approximately|roughly"
    r"|around|that|a total of|equal to|equals|is|=|:|≈|\\approx)[, ]+|rs\.? ?)+",
    re.IGNORECASE,
)
_LISTED = re.compile(r"(?:,|;|\band|\bor|&) ?[-+]?\d")
_BEHIND_NOUN = re.compile(
    r"\b(?:in|for|after|over|from|by|with|per|to|at|on|during|within|because|since|when|if|which"
    r"|altogether|total)\b"
)
_RELATIVE = re.compile(r" (?:of|more|times|\w+) (?:the )?(?:than|as|\d|[a-z]\b)")


def stated(statement: str) -> Iterator[Quantity]:
    """Yields the possible numbers of a statement.

    The number leads the statement ("72 clips in 2 months"), or it is the only one that is neither
    denied, nor compared, nor after a preposition ("she sold 72 pins in 2 months"). "Two dozen" is
    24, and also 2, for questions that count dozens.

    Args:
        statement: the statement in plain characters, such as a sentence after "the answer is".
    """
    text = spoken.in_digits(statement[:_MAX_STATEMENT])
    text = _LEAD_IN.sub("", text, count=1) if _LEAD_IN.match(text) else text
    code = re.match(r"([A-Z]{3}) ?(?=\d)", text)
    if code and code[1] in spoken.currencies():
        text = text[code.end() :]
    whole = quantity(text)
    if whole and whole.is_dozen:
        yield Quantity(whole.value / 12, whole.unit)
    if whole := whole or _leading(text) or _main(text):
        yield whole


def _leading(text: str) -> Quantity | None:
    """Returns the number at the start of a text, if the text after it is an explanation."""
    number = NUMBER.match(text)
    if number is None:
        return None
    tail = text[number.end() :]
    listed = _LISTED.search(tail)
    if listed and not _BEHIND_NOUN.search(tail[: listed.start()].lower()):
        return None
    return None if re.search(r"[=<>^*+\\|]", tail) else _counted(number, tail)


def _main(text: str) -> Quantity | None:
    """Returns the only number of a sentence that is not denied, compared or in a phrase."""
    lower = text.lower()
    if _DENIED.search(lower):
        return None
    quantities = []
    for number in numbers(text):
        before = lower[: number.start()].rstrip(" $")[-40:]
        if not _PHRASE.search(before) or _OF_AMOUNT.search(before):
            quantities.append(number)
    return _counted(quantities[0], text[quantities[0].end() :]) if len(quantities) == 1 else None


def _counted(number: re.Match[str], tail: str) -> Quantity | None:
    """Returns a number with its unit; None if the text after it makes it part of another value."""
    size = value(number)
    words = LETTERS.findall(tail[:80])
    if size is None or number["power"] or (words and spoken.denominator(words[0])):
        return None
    if re.match(r"[.,;:?)](?:\s|$)| ?\(|['\"]?$", tail):  # "72, not 96"
        return Quantity(size, "")
    if not words:
        return None
    if tail.startswith(words[0]):
        return Quantity(size, unit(words)) if is_attached_unit(words[0]) else None
    return Quantity(size, unit(words)) if _is_noun(words, tail) else None


def _is_noun(words: list[str], tail: str) -> bool:
    """Returns whether the words after a number name the counted things or end the statement."""
    first = words[0].lower()
    lower = re.split(r"[,;(]", tail.lower(), maxsplit=1)[0]
    if not re.match(rf"[ -]{re.escape(first)}", lower) or re.search(rf"\b{_MORE_THAN}\b", lower):
        return False
    if first in ("is", "was", "are"):
        return not re.search(r"\b(?:not|wrong|incorrect|too|never|false|no)\b|n't", lower)
    if first in ("in", "for", "after", "at", "on", "by", "per", "because", "since", "of"):
        return first != "of" or not re.match(r" of (?:the )?\d", lower)
    if _RELATIVE.match(lower):
        return first not in ("more", "times", "less", "fewer") and is_unit(words[0])
    return is_unit(words[0])
