"""Detection of lessons that give a number away: in digits or words, encoded, or as a sum.

The texts are plain (see `texts.plain`). A mention of the number counts, unless lessons need such
numbers for other reasons. Those count only if the lesson calls them the answer (see `frames`).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from atlas_jax.rewards import arithmetic, frames, number_words
from atlas_jax.rewards.texts import latin

_SMALL = 12
"""Largest number whose words occur in any text: "one way", "two steps"."""
_NUMBER = re.compile(
    r"(?<![\w^√_])(?<!\d[./])(?:(?<![\w).])(?P<sign>-))?"
    r"(?:(?P<whole>\d{1,15}) (?=\d{1,15}/\d))?"
    r"(?P<top>\d{1,30}(?:\.\d{1,30})?|(?<!\.)\.\d{1,30})(?!\d)"
    r"(?: ?/ ?(?P<bottom>\d{1,30})(?![\d.]))?"
    r"(?: (?P<scale>dozen|hundred|thousand|million|billion)s?\b)?"
    r"(?P<suffix>[^\W\d_]{0,20})(?![√^]|\.\d)",
    re.IGNORECASE,
)
_SCALES = {
    "dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
}  # fmt: skip
_ORDINAL = {"st", "nd", "rd", "th"}
_UNITS = {"m", "g", "h", "l", "s", "v", "w", "j"}
_LISTED = re.compile(r"(?:(?<=[\s(;:,.])|^)\(?(\d{1,2})[.):](?=\s)")
_COUNTED = re.compile(
    r"\b(?:steps?|parts?|stages?|hints?|questions?|items?|points?|lines?|rules?|problem|phase|"
    r"chapter) #?(?:\d{1,2}(?:,| and|-) ?)?$",
    re.IGNORECASE,
)
_OPERAND = re.compile(
    r"\b(?:by|nearest|times|power|root|base|modulo|multiples? of|groups? of|pairs? of|out of|first|"
    r"next|last|top|bottom|all|these|those|every|each|digits?|ends in|in|into) (?:of )?$",
    re.IGNORECASE,
)
_ROUND = {Fraction(100), Fraction(1000)}
_FACTS: tuple[tuple[int, str, str], ...] = (
    (60, r"min", r"\bhour"), (60, r"sec", r"\bminute"), (24, r"hour", r"\bday"),
    (7, r"day", r"\bweek"), (52, r"week", r"\byear"), (12, r"month", r"\byear"),
    (365, r"day", r"\byear"), (366, r"day", r"\byear"), (30, r"day", r"\bmonth"),
    (31, r"day", r"\bmonth"), (4, r"week", r"\bmonth"), (4, r"quarter", r"\b"),
    (12, r"inch", r"\bf[oe]{2}t"), (3, r"f[oe]{2}t", r"\byard"), (16, r"ounce", r"\bpound"),
    (100, r"(?:cents?|pence|centim|cm|years?)\b", r"\b"), (10, r"(?:years?|millim|mm)", r"\b"),
    (1000, r"(?:gram|g\b|met|m\b|millil|ml\b|kilo)", r"\b"), (180, r"(?:degree|°)", r"\b"),
    (360, r"(?:degree|°)", r"\b"), (90, r"(?:degree|°)", r"\bright"),
    (2, r"(?:halves|equal)", r"\b"),
)  # fmt: skip
"""Patterns of facts about units: a number, the text after it, and words in its surroundings."""
_FACT_CHARS = 60
_DIGIT_NAMED = re.compile(r"\bdigits?\b[^.\d]{0,20}?(\d)\b|\b(\d)\b[^.\d]{0,12}\bdigit\b", re.I)
_DIGITS_LISTED = re.compile(
    r"\bdigits\b[^.\d\n]{0,20}(\d(?:(?:,? and |, ?| )\d){1,12})(?![\d.,]?\d)", re.IGNORECASE
)
_FOLLOWED = re.compile(
    r"\b\d(?:,? (?:followed by|and then|then) (?:a |an )?\d){1,8}\b(?! zero)", re.IGNORECASE
)
_BEGINS = re.compile(
    r"\b(?:(?:begin|start)(?:s|ning|ing)? with|first digit is)(?: an?)? (\d{1,9})\b", re.IGNORECASE
)
_REVERSED = re.compile(r"\b(?:revers|backward|mirror|flip|swap|turn\w* around)", re.IGNORECASE)
_BINARY = re.compile(r"\bbinary\b|\bbase (?:2|two)\b", re.IGNORECASE)
_HEX = re.compile(r"\bhex|\bbase 16\b", re.IGNORECASE)
_ROMAN = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),
    (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip


class Asked(NamedTuple):
    """Numbers and words of the question, which a lesson may use."""

    numbers: frozenset[Fraction]
    words: frozenset[str]  # in lower case
    is_known: bool  # whether the question is known


class _Mention(NamedTuple):
    value: Fraction
    start: int
    end: int
    suffix: str  # letters that are attached, in lower case


def asked(question: str) -> Asked:
    """Returns the numbers and words of a question, number words included."""
    spoken = number_words.to_digits(question)
    numbers = {m.value for text in (question, spoken) for m in _mentions(text)}
    words = frozenset(re.findall(r"[^\W\d_]+", question.lower()))
    return Asked(frozenset(numbers), words, bool(question.strip()))


def gives_away(value: Fraction, lesson: str, question: Asked) -> bool:
    """Returns whether a lesson states a number, spells or encodes it, or gives it as a sum."""
    spoken = number_words.to_digits(lesson)
    numbered = _list_numbers(lesson)
    plain = lesson if abs(value) <= _SMALL else spoken
    if any(
        _counts(mention, plain, question, numbered)
        for mention in _mentions(plain)
        if mention.value == value
    ):
        return True
    if plain is not spoken and any(
        _is_framed(mention, spoken, question)
        for mention in _mentions(spoken)
        if mention.value == value
    ):
        return True
    is_own = question.is_known and value not in question.numbers
    if is_own and arithmetic.hints_at(value, spoken, question.numbers):
        return True
    whole = value.denominator == 1 and value >= 0
    return whole and (
        _spelled(str(value), spoken, question)
        or _encoded(int(value), lesson, question)
        or _begins(value, spoken, question)
    )


def _mentions(text: str) -> Iterator[_Mention]:
    """Yields the numbers of a text; fractions only in lowest terms, since "6/2" is not yet 3."""
    for match in _NUMBER.finditer(text):
        suffix = match["suffix"].lower()
        bottom = int(match["bottom"] or 1)
        if suffix in _ORDINAL or not bottom:
            continue
        value = Fraction(match["top"]) / bottom
        if match["bottom"] and value.denominator != bottom:
            continue
        value = (value + int(match["whole"] or 0)) * _SCALES.get((match["scale"] or "").lower(), 1)
        sign = -1 if match["sign"] else 1
        yield _Mention(
            value=sign * value, start=match.start(), end=match.end() - len(suffix), suffix=suffix
        )


def _counts(mention: _Mention, text: str, question: Asked, numbered: set[int]) -> bool:
    """Returns whether a mention of the answer gives it away."""
    start = mention.start
    end = mention.end
    if start in numbered:
        return False
    before = text[max(0, start - _FACT_CHARS) : start]
    if _is_fact(mention, text) or _COUNTED.search(before):
        return frames.says_so(text, start, end)
    small = mention.value <= _SMALL or mention.value in _ROUND
    if (
        mention.value in question.numbers
        or mention.value in (0, 1)
        or (len(mention.suffix) == 1 and mention.suffix not in _UNITS and small)
        or (small and _OPERAND.search(before))
    ):
        return _is_framed(mention, text, question)
    return True


def _is_framed(mention: _Mention, text: str, question: Asked) -> bool:
    start = mention.start
    end = mention.end
    if frames.says_so(text, start, end) or frames.stands_alone(text, start, end):
        return True
    if mention.value in (0, 1) and frames.is_condition(text, start):
        return False
    return frames.concludes(text, start, end, question.words)


def _is_fact(mention: _Mention, text: str) -> bool:
    """Returns whether a number is a fact about units, such as 60 minutes an hour."""
    start = mention.start
    end = mention.end
    behind = text[end : end + 12].lstrip(" -")
    around = text[max(0, start - _FACT_CHARS) : end + _FACT_CHARS]
    if mention.value == 100 and (behind[:1] == "%" or re.search(r"\bper ?cent|%", around, re.I)):
        return True
    if mention.value in (12, 6) and re.search(r"\bdozen", around, re.IGNORECASE):
        return True
    return any(
        mention.value == number
        and re.match(unit, behind, re.IGNORECASE)
        and re.search(of, around, re.IGNORECASE)
        for number, unit, of in _FACTS
    )


def _list_numbers(text: str) -> set[int]:
    """Returns the positions of list numbers: numbers that are one more than an earlier one."""
    entries = [(match.start(1), int(match[1])) for match in _LISTED.finditer(text)]
    values = {value for _, value in entries}
    seen: set[int] = set()
    positions = set()
    for start, value in entries:
        if value - 1 in seen or (value == 1 and 2 in values):
            positions.add(start)
            seen.add(value)
    return positions


def _spelled(digits: str, text: str, question: Asked) -> bool:
    """Returns whether a text gives a number digit by digit, reversed, or with O for 0."""
    if len(digits) < 2:
        return False
    if any(
        re.sub("[oO]", "0", token) == digits and token != digits
        for token in re.findall(r"(?<!\w)[\doO]{2,30}(?!\w)", text)
    ):
        return True
    if digits[::-1] != digits and _REVERSED.search(text):
        return bool(re.search(rf"(?<!\d){digits[::-1]}(?!\d)", text))
    named = "".join(a or b for a, b in _DIGIT_NAMED.findall(text))
    chains = [*_FOLLOWED.finditer(text), *_DIGITS_LISTED.finditer(text)]
    joined = ("".join(re.findall(r"\d", chain[0])) for chain in chains)
    if digits in (named, *joined):
        return True
    is_range = int(digits[1]) == int(digits[0]) + 1 and len(digits) == 2
    joint = r"[\s_|.]{1,3}" if is_range else r"[\s_|.-]{1,3}"
    apart = rf"(?<![\d.])(?<!\d[\s_|-]){joint.join(digits)}(?![\s_|.-]{{0,3}}\d)"
    at_hand = all(Fraction(digit) in question.numbers for digit in digits)
    return not at_hand and bool(re.search(apart, text))


def _encoded(value: int, lesson: str, question: Asked) -> bool:
    """Returns whether a text has a number in another notation or language."""
    code = base64.b64encode(str(value).encode()).decode().rstrip("=")
    forms = [rf"(?<!\w)(?i:0x0*{value:x}|0b0*{value:b}|0o0*{value:o})(?!\w)"]
    forms += [rf"(?<![\w+/]){code}=*(?![\w+/])"]
    if _BINARY.search(lesson) and value > 1:
        forms.append(rf"(?<!\d){value:b}(?!\d)")
    if _HEX.search(lesson) and value > 9:
        forms.append(rf"(?<!\w)(?i:{value:x}h?)(?!\w)")
    if any(re.search(form, lesson) for form in forms):
        return True
    if any(_has_words(word, lesson) for word in number_words.in_other_languages(value)):
        return True
    roman = _roman(value)
    if not roman or roman.lower() in question.words:
        return False
    spots = re.finditer(rf"(?<![\w.'-]){roman}(?![\w'-])", lesson)
    return any(len(roman) > 1 or frames.says_so(lesson, *spot.span()) for spot in spots)


def _has_words(words: str, lesson: str) -> bool:
    """Returns whether a text has these words of another language, not as part of longer words."""
    words = latin(words)
    edge = r"\w" if words[0] < "\u2e80" else "[一二三四五六七八九十百千万零]"
    if words[0] not in lesson and words[0].upper() not in lesson:
        return False
    return bool(re.search(rf"(?<!{edge}){re.escape(words)}(?!{edge})", lesson, re.IGNORECASE))


def _roman(value: int) -> str:
    """Returns a number in Roman numerals; "" if it has none."""
    if not 0 < value < 4000:
        return ""
    digits = ""
    for size, name in _ROMAN:
        count, value = divmod(value, size)
        digits += name * count
    return digits


def _begins(value: Fraction, text: str, question: Asked) -> bool:
    """Returns whether a text names one of the question's numbers by its first digits."""
    if value not in question.numbers:
        return False
    alike = [number for number in question.numbers if len(str(number)) == len(str(value)) > 1]
    starts = (match[1] for match in _BEGINS.finditer(text))
    return any([n for n in alike if str(n).startswith(start)] == [value] for start in starts)
