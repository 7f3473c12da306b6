"""Numbers that a text gives as an easy calculation instead of writing them.

    "55 + 5"  "one more than 59"  "six tens"  "the number before 61"   all give 60

A calculation with the numbers of the question, such as 120 / 2, is a solution step and not counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

_MAX_DIGITS = 15
NUMBER = rf"\d{{1,{_MAX_DIGITS}}}(?:\.\d{{1,{_MAX_DIGITS}}})?"
_START = r"(?<![\w.^])"
_END = r"(?![\w^]|\.\d)"
_UNIT = r"(?: (?!plus|minus|times|over|more|less|and|of|to|by)[a-z]{2,15})?"  # "55 miles + 5 miles"
_SIGNS = {"plus": "+", "minus": "-", "times": "*", "x": "*", "over": "/"} | {s: s for s in "+-*/"}
_SIGN = r"(?: ?[-+*/] ?| (?:plus|minus|times|over|x) )"
_CHAIN = re.compile(
    rf"{_START}{NUMBER}{_UNIT}(?:{_SIGN}{NUMBER}{_UNIT}){{1,8}}{_END}", re.IGNORECASE
)
_PIECE = re.compile(rf"({_SIGN})|({NUMBER})", re.IGNORECASE)
_CONSTANTS = frozenset(map(Fraction, (2, 3, 4, 7, 10, 12, 24, 30, 52, 60, 100, 365, 1000)))
"""Numbers of common knowledge that a calculation may use, such as the days of a week."""


class _Phrase(NamedTuple):
    """A phrase for a calculation; the groups of its pattern are the operands."""

    pattern: re.Pattern[str]
    value: Callable[..., Fraction]


def _phrase(pattern: str, value: Callable[..., Fraction]) -> _Phrase:
    pattern = pattern.replace("N", rf"{_START}({NUMBER}){_END}")
    return _Phrase(re.compile(pattern, re.IGNORECASE), value)


def _root(a: Fraction) -> Fraction:
    """Returns the square root of a square number, and 0 for any other number."""
    root = Fraction(math.isqrt(a.numerator), math.isqrt(a.denominator))
    return root if root * root == a else Fraction(0)


_AND = r",? (?:and|then|and then) "
_PHRASES = (
    _phrase(r"N(?: [a-z]+)? (?:more|greater|larger|higher) than N", lambda a, b: a + b),
    _phrase(r"N(?: [a-z]+)? (?:less|fewer|smaller|lower) than N", lambda a, b: b - a),
    _phrase(r"\badd N (?:and|to) N", lambda a, b: a + b),
    _phrase(r"\bsum of N and N", lambda a, b: a + b),
    _phrase(rf"N{_AND}(?:add|count|go)(?: on| up)? N", lambda a, b: a + b),
    _phrase(r"\b(?:increase|raise) N by N", lambda a, b: a + b),
    _phrase(r"\bsubtract N from N", lambda a, b: b - a),
    _phrase(rf"N{_AND}(?:subtract|take away|take off|remove) N", lambda a, b: a - b),
    _phrase(r"\b(?:decrease|reduce|lower) N by N", lambda a, b: a - b),
    _phrase(r"\bmultiply N (?:by|and|with) N", lambda a, b: a * b),
    _phrase(r"\bproduct of N and N", lambda a, b: a * b),
    _phrase(r"\bdivide N by N", lambda a, b: a / b if b else Fraction(0)),
    _phrase(r"\b(?:between|halfway between) N and N", lambda a, b: (a + b) / 2),
    _phrase(r"\b(?:after|following|follows|above|past) N", lambda a: a + 1),
    _phrase(r"\b(?:before|preceding|precedes|below) N", lambda a: a - 1),
    _phrase(r"\b(?:twice|double|2 times) N", lambda a: 2 * a),
    _phrase(r"\b(?:half of|half) N", lambda a: a / 2),
    _phrase(r"N squared|\bsquare of N", lambda a, b: (a or b) ** 2),
    _phrase(r"(?:\bsquare root of |√ ?)N", _root),
    _phrase(r"N tens?(?! [a-z]*digit)(?! and \d)", lambda a: 10 * a),
    _phrase(r"N tens? and N(?: ones?| units?)", lambda a, b: 10 * a + b),
    _phrase(r"N score\b", lambda a: 20 * a),
    _phrase(r"N (?:followed by|with) N zero(?:e?s)?\b", lambda a, b: a * 10 ** min(int(b), 30)),
)


def hints_at(value: Fraction, text: str, question: Iterable[Fraction]) -> bool:
    """Returns whether a text gives a number as a calculation with numbers that it introduces.

    Numbers of the question, results that the text computes from them, and numbers of common
    knowledge combined with one of the question's do not count as introduced.

    Args:
        value: the number to search for.
        text: the text, plain, with number words as digits.
        question: the numbers of the question.
    """
    given = set(question)
    for operands, result in _calculations(text):
        own = [x for x in operands if x in given]
        if own and all(x in given or x in _CONSTANTS for x in operands):
            given.add(result)
        elif result == value:
            return True
    return False


def _calculations(text: str) -> Iterator[tuple[list[Fraction], Fraction]]:
    """Yields the operands and the result of each calculation, those in symbols first."""
    for match in _CHAIN.finditer(text):
        pieces = [(sign.strip().lower(), number) for sign, number in _PIECE.findall(match[0])]
        terms = [Fraction(number) for _, number in pieces if number]
        signs = [_SIGNS[sign] for sign, _ in pieces if sign]
        result = _evaluated(terms, signs) if len(signs) == len(terms) - 1 else None
        if result is not None:
            yield terms, result
    for phrase in _PHRASES:
        for match in phrase.pattern.finditer(text):
            groups = [Fraction(number) if number else None for number in match.groups()]
            yield [group for group in groups if group is not None], phrase.value(*groups)


def _evaluated(terms: list[Fraction], signs: list[str]) -> Fraction | None:
    """Returns the value of a chain, products before sums; None for a division by 0."""
    total = Fraction(0)
    product = terms[0]
    for sign, term in zip(signs, terms[1:], strict=True):
        if sign == "*":
            product *= term
        elif sign == "/" and not term:
            return None
        elif sign == "/":
            product /= term
        else:
            total += product
            product = term if sign == "+" else -term
    return total + product
