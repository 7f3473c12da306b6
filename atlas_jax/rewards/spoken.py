"""English number words, those of num2words, in digits: "two hundred and one", "three quarters"."""

from __future__ import annotations

import functools
import re
from fractions import Fraction

_MAX_WORDS = 24  # of one number
_POWERS = {"thousand": 10**3, "million": 10**6, "billion": 10**9}


def in_digits(text: str) -> str:
    """Returns a text with its spelled numbers in digits.

    "two thirds" becomes 2/3 and "a hundred and five" 105. "six zero", not a number, becomes 6 0.
    """
    return _run().sub(_digits, text)


def denominator(noun: str) -> int | None:
    """Returns the denominator of a fraction's noun; None for quarters, which may be coins."""
    return _denominators().get(noun.lower())


def part(text: str) -> Fraction:
    """Returns the fraction of "half", "third", "quarter" or "1/3"."""
    if not text[0].isdigit():
        return Fraction(1, _size(text))
    top, bottom = (int(x) for x in text.split("/"))
    return Fraction(top, bottom) if bottom else Fraction(0)


@functools.cache
def currencies() -> frozenset[str]:
    """Returns the codes of currencies that are written before an amount: "CAD 500"."""
    from num2words.lang_EN import Num2Word_EN

    return frozenset(Num2Word_EN.CURRENCY_FORMS)


@functools.cache
def _words() -> dict[str, int]:
    """Returns the numbers below 1000, and 1100 to 9900 in hundreds, by words without "and"."""
    from num2words import num2words  # slow to import

    below = {_bare(num2words(n)): n for n in range(1000)}
    hundreds = {f"{_bare(num2words(n))} hundred": 100 * n for n in range(11, 100) if n % 10}
    return below | hundreds | {"hundred": 100, "": 0}


@functools.cache
def _denominators() -> dict[str, int]:
    from num2words import num2words

    counts = [*range(3, 21), 25, 30, 40, 50, 60, 80, 100, 1000, 10**6]
    names = {num2words(n, to="ordinal").removeprefix("one "): n for n in counts}
    return {"half": 2, "halves": 2} | names | {f"{name}s": n for name, n in names.items()}


@functools.cache
def _run() -> re.Pattern[str]:
    """Returns a pattern of consecutive number words, with the noun of a fraction after them."""
    powers = "|".join(("hundred", *_POWERS))
    single = {word for name in _words() for word in name.split()} | _POWERS.keys()
    word = f"(?:{'|'.join(sorted(single))})"
    behind_power = "|".join(f"(?<={power})" for power in ("hundred", *_POWERS))
    joint = rf"(?:[ -]|(?:{behind_power})(?:, and|,| and) )"
    noun = rf"(?:{'|'.join(sorted({*_denominators(), 'quarter', 'quarters'}))})"
    return re.compile(
        rf"\b(?!(?<=\d )(?:{powers})\b)"  # "3 million" is in digits already
        rf"((?:an? (?=(?:{powers})\b))?{word}\b(?:{joint}{word}\b){{0,{_MAX_WORDS}}})"
        rf"(?: and (?:an?|one) (?P<extra>{noun})\b|[ -](?P<part>{noun})\b)?",
        re.IGNORECASE,
    )


def _digits(match: re.Match[str]) -> str:
    *before, size = _counts(_bare(match[1]).split())
    last = str(size)
    if match["part"]:
        last = f"{size}/{_size(match['part'])}"
    elif match["extra"]:
        last = f"{size} 1/{_size(match['extra'])}"
    return " ".join([*map(str, before), last])


def _counts(words: list[str]) -> list[int]:
    """Returns the numbers of a sequence of words: groups below 1000 with falling powers of 1000."""
    numbers = []
    total = 0
    group = ""
    smallest = 10**12
    for word in words:
        longer = f"{group} {word}".strip()
        if longer in _words():
            group = longer
        elif word in _POWERS and _POWERS[word] < smallest and (group or not total):
            total += (_words()[group] or 1) * _POWERS[word]
            group = ""
            smallest = _POWERS[word]
        else:
            numbers.append(total + _words()[group])
            is_power = word in _POWERS
            total, group = (_POWERS[word], "") if is_power else (0, word)
            smallest = _POWERS[word] if is_power else 10**12
    return [*numbers, total + _words()[group]]


def _size(noun: str) -> int:
    return 4 if noun.lower().startswith("quarter") else _denominators()[noun.lower()]


def _bare(words: str) -> str:
    """Returns number words without "and" and "a", separated by single spaces."""
    return " ".join(w for w in re.findall(r"[a-z]+", words.lower()) if w not in ("and", "a", "an"))
