"""Numbers that a text does not write and leaves to a calculation that anybody can do at once.

    "55 + 5"  "one more than 59"  "six tens"  "the number before 61"   all give 60

A calculation with the numbers of the question is how one gets there, and not counted: 120 / 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
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
"""Numbers that a calculation may take from common knowledge, such as the days of a week."""


class _Phrase(NamedTuple):
    """A way to say a calculation; its groups are the operands."""

    pattern: re.Pattern[str]
    values: tuple[int, int, int, int]  # of `(a x + b y + c) / d`


def _phrase(pattern: str, values: tuple[int, int, int, int]) -> _Phrase:
    pattern = pattern.replace("N", rf"{_START}({NUMBER}){_END}")
    return _Phrase(re.compile(pattern, re.IGNORECASE), values)


_PHRASES = (
    _phrase(r"N(?: [a-z]+)? (?:more|greater|larger|higher) than N", (1, 1, 0, 1)),
    _phrase(r"N(?: [a-z]+)? (?:less|fewer|smaller|lower) than N", (-1, 1, 0, 1)),
    _phrase(r"\badd N (?:and|to) N", (1, 1, 0, 1)),
    _phrase(r"\bsubtract N from N", (-1, 1, 0, 1)),
    _phrase(r"\bsum of N and N", (1, 1, 0, 1)),
    _phrase(r"\b(?:between|halfway between) N and N", (1, 1, 0, 2)),
    _phrase(r"\b(?:after|following|follows|above|past) N", (1, 0, 1, 1)),
    _phrase(r"\b(?:before|preceding|precedes|below) N", (1, 0, -1, 1)),
    _phrase(r"\b(?:twice|double|two times) N", (2, 0, 0, 1)),
    _phrase(r"\b(?:half of|half) N", (1, 0, 0, 2)),
    _phrase(r"N tens?(?! [a-z]*digit)(?! and \d)", (10, 0, 0, 1)),
    _phrase(r"N tens? and N(?: ones?| units?)", (10, 1, 0, 1)),
    _phrase(r"N (?:score|scores)\b", (20, 0, 0, 1)),
)
_PRODUCTS = (
    (re.compile(rf"\bmultiply ({NUMBER}) (?:by|and|with) ({NUMBER}){_END}", re.IGNORECASE), "*"),
    (re.compile(rf"\bproduct of ({NUMBER}) and ({NUMBER}){_END}", re.IGNORECASE), "*"),
    (re.compile(rf"\bdivide ({NUMBER}) by ({NUMBER}){_END}", re.IGNORECASE), "/"),
)


def hints_at(value: Fraction, text: str, question: Iterable[Fraction]) -> bool:
    """Returns whether a text gives a number as a calculation of numbers that are not at hand.

    At hand are the numbers of the question, those that the text computes from them, and, beside
    one of the question's, numbers of common knowledge.

    Args:
        value: the number that is looked for.
        text: plain, with number words as digits.
        question: the numbers of the question.
    """
    known = set(question)
    for operands, result in _calculations(text):
        own = [x for x in operands if x in known]
        if own and all(x in known or x in _CONSTANTS for x in operands):
            known.add(result)
        elif result == value:
            return True
    return False


def _calculations(text: str) -> Iterator[tuple[list[Fraction], Fraction]]:
    """Yields the operands and the result of each calculation, first those in symbols."""
    for match in _CHAIN.finditer(text):
        pieces = [(sign.strip().lower(), number) for sign, number in _PIECE.findall(match[0])]
        terms = [Fraction(number) for _, number in pieces if number]
        signs = [_SIGNS[sign] for sign, _ in pieces if sign]
        result = _evaluated(terms, signs) if len(signs) == len(terms) - 1 else None
        if result is not None:
            yield terms, result
    for pattern, sign in _PRODUCTS:
        for match in pattern.finditer(text):
            terms = [Fraction(match[1]), Fraction(match[2])]
            result = _evaluated(terms, [sign])
            if result is not None:
                yield terms, result
    for phrase in _PHRASES:
        a, b, c, d = phrase.values
        for match in phrase.pattern.finditer(text):
            terms = [Fraction(number) for number in match.groups()]
            first, last = terms[0], terms[-1]
            yield terms, (a * first + b * last + c) / d


def _evaluated(terms: list[Fraction], signs: list[str]) -> Fraction | None:
    """Returns the value of a chain, products before sums; None where it divides by 0."""
    total, product = Fraction(0), terms[0]
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
