"""Numbers that words say, by the words of num2words: "two hundred and one", "three quarters"."""

from __future__ import annotations

import functools
import re
from fractions import Fraction

_MAX_WORDS = 24  # of one number
_POWERS = {"thousand": 10**3, "million": 10**6, "billion": 10**9}


def in_digits(text: str) -> str:
    """Returns a text with the numbers that its words say in digits: "two thirds" becomes 2/3."""
    return _run().sub(_digits, text)


def denominator(noun: str) -> int | None:
    """Returns what a noun of fractions divides by; None for quarters, which are coins too."""
    return _denominators().get(noun.lower())


def part(text: str) -> Fraction:
    """Returns the fraction that is written as "half", "third", "quarter" or "1/3"."""
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
    """The numbers below 1000 by their words, without hyphens and "and"."""
    from num2words import num2words  # takes a moment to load

    return {_bare(num2words(n)): n for n in range(1000)}


@functools.cache
def _denominators() -> dict[str, int]:
    from num2words import num2words

    counts = [*range(3, 21), 25, 30, 40, 50, 60, 80, 100, 1000, 10**6]
    names = {num2words(n, to="ordinal").removeprefix("one "): n for n in counts}
    return {"half": 2, "halves": 2} | names | {f"{name}s": n for name, n in names.items()}


@functools.cache
def _run() -> re.Pattern[str]:
    """Matches number words in a row, and the part of a whole behind them."""
    single = {word for name in _words() for word in name.split()} | _POWERS.keys()
    word = f"(?:{'|'.join(sorted(single))})"
    noun = rf"(?:{'|'.join(sorted({*_denominators(), 'quarter', 'quarters'}))})"
    return re.compile(
        rf"\b({word}\b(?:(?:[ -]|, | and ){word}\b){{0,{_MAX_WORDS}}})"
        rf"(?: and (?:an?|one) (?P<extra>{noun})\b|[ -](?P<part>{noun})\b)?",
        re.IGNORECASE,
    )


def _digits(match: re.Match[str]) -> str:
    size = _count(_bare(match[1]).split())
    if size is None:
        return match[0]
    if match["part"]:
        return f"{size}/{_size(match['part'])}"
    return f"{size} 1/{_size(match['extra'])}" if match["extra"] else str(size)


def _count(words: list[str]) -> int | None:
    """Returns the number that words say: groups below 1000, each with its power of 1000."""
    total, group, least = 0, list[str](), 10**12
    for word in words:
        if word not in _POWERS:
            group.append(word)
            continue
        below = _words().get(" ".join(group))
        if below is None or _POWERS[word] >= least:
            return None
        total, group, least = total + below * _POWERS[word], [], _POWERS[word]
    rest = _words().get(" ".join(group)) if group else 0
    return None if rest is None else total + rest


def _size(noun: str) -> int:
    return 4 if noun.lower().startswith("quarter") else _denominators()[noun.lower()]


def _bare(words: str) -> str:
    return " ".join(w for w in re.findall(r"[a-z]+", words.lower()) if w != "and")
