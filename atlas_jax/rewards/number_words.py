"""Numbers that are written in words, in English and, for a known number, in other languages."""

from __future__ import annotations

import functools
import re

from num2words import num2words

_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_LANGUAGES = ("es", "fr", "de", "it", "pt", "nl", "sv", "pl", "ru", "tr", "id", "ja", "ko")
_SHARE = re.compile(r"\b(\d{1,9})[ -]((?:halve|[a-z]{2,10}th|third|quarter)s)\b", re.IGNORECASE)
_MIN_LETTERS = 5  # of a word in another alphabet's language; shorter ones are English words too
_MAX_FOREIGN = 10**6


def to_digits(text: str) -> str:
    """Returns a text with its English number words as digits: "Sixty-one" -> "61".

    Fractions too: "five eighths" -> "5/8".
    """
    text = _runs().sub(lambda match: _value(match[0]), text)
    return _SHARE.sub(_as_fraction, text)


def _as_fraction(match: re.Match[str]) -> str:
    bottom = _shares().get(match[2].lower())
    return f"{match[1]}/{bottom}" if bottom else match[0]


@functools.cache
def ordinal(number: int) -> str:
    """Returns "first" for 1, "twenty-second" for 22."""
    return str(num2words(number, to="ordinal"))


@functools.lru_cache(maxsize=4096)
def in_other_languages(number: int) -> frozenset[str]:
    """Returns how other languages write a number, in lower case; without what is an English word.

    Words of a few letters are left out, which several languages have with other meanings.
    """
    if not 0 <= number < _MAX_FOREIGN:
        return frozenset()
    words = {str(num2words(number, lang=language)).lower() for language in _LANGUAGES}
    return frozenset(w for w in words if len(w) >= (_MIN_LETTERS if w[0] < "\u2e80" else 2))


@functools.cache
def _shares() -> dict[str, int]:
    """Returns the denominators by their plurals, "eighths" for 8."""
    return {f"{ordinal(n)}s": n for n in (*range(3, 21), 100)} | {"halves": 2, "quarters": 4}


@functools.cache
def _table() -> dict[str, int]:
    """Returns the numbers below 1000 by their words, without hyphens and "and"."""
    return {_bare(num2words(number)): number for number in range(1000)}


@functools.cache
def _runs() -> re.Pattern[str]:
    names = {word for phrase in _table() for word in phrase.split()} | set(_SCALES)
    one = "(?:" + "|".join(sorted(names, key=len, reverse=True)) + ")"
    scale = "|".join(f"(?<={scale})" for scale in ("hundred", *_SCALES))
    joint = rf"(?:[ -]|(?:{scale})(?:, and|,| and) )"
    again = rf"(?!(?<=\d )(?:hundred|{'|'.join(_SCALES)}))"  # "3 million" is a number already
    return re.compile(
        rf"\b{again}(?:a (?=hundred|thousand|million))?{one}(?:{joint}{one}){{0,20}}\b", re.I
    )


def _bare(phrase: str) -> str:
    return " ".join(re.sub(r"[-,]|\band\b", " ", phrase.lower()).split())


def _value(run: str) -> str:
    """Returns a run of number words as digits; several numbers where it is no single one."""
    total, part, out = 0, "", []
    words = _bare(run).split()
    if words[0] in ("a", "hundred"):
        words = ["one", *words[words[0] == "a" :]]
    for word in words:
        if word in _SCALES and (part or total):
            total += _table().get(part, 1) * _SCALES[word]
            part = ""
        elif word in _SCALES:
            total = _SCALES[word]
        elif (longer := f"{part} {word}".strip()) in _table():
            part = longer
        else:
            out.append(str(total + _table().get(part, 0)))
            total, part = 0, word
    return " ".join([*out, str(total + _table().get(part, 0))])
