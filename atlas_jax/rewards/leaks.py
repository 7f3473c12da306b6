"""Detection of lessons that give the answer away.

Anything that a student could copy or decode at once counts: the answer in digits or words, spelled,
encoded, as a sum, or called the answer. Mentions that lessons need do not count by themselves:
numbers of list entries, facts about units, words and numbers of the question.
"""

from __future__ import annotations

import base64
import codecs
import functools
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from atlas_jax.rewards import conclusions, equality, frames, leaked_numbers, number_words
from atlas_jax.rewards.answers import is_correct, marked_answer, normalise
from atlas_jax.rewards.texts import plain, visible

LEAK = "the lesson states the answer"
"""The fault of a lesson, for records."""

_OPTION = re.compile(r"\(?([A-Ha-h])(?:[).:]+(?:\s+(\S.*))?|\))?", re.DOTALL)
_LISTED = re.compile(r"(?:(?<=\s)|^)\(?([A-H])[).:]\s+")
_MAX_OPTION = 200  # characters of an option's text
_BEFORE = 40  # characters before a letter that are read
_CHOOSES = re.compile(
    r"\b(?:answer|option|choose|choice|pick|select|mark)(?: is| option| choice|:){0,2}[ *\"']+$",
    re.IGNORECASE,
)
_GOES_ON = re.compile(r"\)? ?(?:and|or|with|to|,)\b")
_CLOSED = re.compile(r"[.,!;\n\"'*]|$")
_ORDINARY = {
    "yes", "no", "true", "false", "none", "all", "both", "neither", "either", "even", "odd", "more",
    "less", "equal", "same", "never", "always", "positive", "negative", "zero", "nothing", "up",
    "down", "left", "right", "increase", "decrease", "and", "or", "not", "correct", "incorrect",
    "increases", "decreases", "infinite", "undefined", "unknown", "other", "one", "first", "last",
}  # fmt: skip
"""Answers that are ordinary words of lessons."""
_ARTICLE = re.compile(r"\b(?:the|an|a) (?=[^\W\d_]{2})", re.IGNORECASE)
_TOKEN = re.compile(r"\w+|[^\w\s]")
_MAX_SENTENCES = 500  # number of different sentences whose conclusions are read
_MATHEMATICS = re.compile(r"\d|\\[A-Za-z]|[π√∞]")
_CLAUSE = re.compile(r"[.!?;\n]")
_EXCLUDED = re.compile(
    r"\b(?:not|isn't|aren't|neither|nor|never|cannot be|can't be|eliminate|rule out|exclude|wrong|"
    r"cross out|strike)\b",
    re.IGNORECASE,
)


class _ListedOption(NamedTuple):
    """One option of multiple choice."""

    letter: str  # upper case
    text: str  # "" if only the letter is known


# Cached: a lesson is checked by the reward and again by the metrics.
@functools.lru_cache(maxsize=2048)
def states_answer(lesson: str, ground_truth: str, question: str = "") -> bool:
    """Returns whether a lesson gives the ground truth away.

    Args:
        lesson: the lesson as the student reads it.
        ground_truth: the answer, or a solution that marks it.
        question: the question as it was asked; "" if unknown, and then no mention is exempt.
    """
    truth = (marked_answer(ground_truth) or ground_truth).strip()
    if not lesson.strip() or not normalise(truth):
        return False
    seen = visible(lesson)
    if marked_answer(seen) and is_correct(seen, ground_truth):
        return True
    text = plain(lesson)
    problem = plain(question)
    asked = leaked_numbers.asked(problem)
    listed = _listed(problem)
    option = _option_of(truth, listed)
    if option:
        return _states_option(text, option, listed)
    value = _number(truth)
    if value is not None:
        return leaked_numbers.gives_away(value, text, asked)
    return (
        _states_text(text, plain(truth), problem)
        or _encodes_text(text, truth)
        or _comes_to(seen, truth, visible(question))
    )


def _number(truth: str) -> Fraction | None:
    """Returns the number of an answer; None if the answer is not a number."""
    try:
        return Fraction(normalise(truth))
    except (ValueError, ZeroDivisionError):
        return None


def _states_text(text: str, truth: str, problem: str) -> bool:
    """Returns whether a text has the words of an answer in a place that gives it away."""
    words = _words(truth)
    if not words:
        return False
    spots = _spots(words, text)
    everyday = " ".join(words) in _ORDINARY or len("".join(words)) <= 2
    if not everyday and not _spots(words, problem):
        return bool(spots) or _spelled(words, text)
    return any(_is_framed(text, *spot) for spot in spots)


def _comes_to(text: str, truth: str, problem: str) -> bool:
    """Returns whether a sentence concludes with a mathematical answer, in any spelling.

    A conclusion that a sentence of the question also has does not count.
    """
    if not _MATHEMATICS.search(truth):
        return False

    def has(whole: str) -> bool:
        lines = whole.splitlines()
        parts = dict.fromkeys(p for line in lines for p in conclusions.SENTENCE_END.split(line))
        values = filter(None, map(conclusions.conclusion, list(parts)[:_MAX_SENTENCES]))
        return any(equality.same(value, truth) for value in values)

    return has(text) and not has(problem)


def _is_framed(text: str, start: int, end: int) -> bool:
    return (
        frames.says_so(text, start, end)
        or frames.stands_alone(text, start, end)
        or frames.concludes(text, start, end, ())
    )


def _words(text: str) -> list[str]:
    """Returns the words and marks of an answer in lower case, without articles."""
    return _TOKEN.findall(_ARTICLE.sub("", text.lower()).strip(" \t\n.,;:!?\"'*"))


def _spots(words: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Returns the spans of these consecutive words in a text."""
    joint = r"(?:\s{1,3}(?:the|an|a)\b)?\s{0,3}"
    first = r"(?<!\w)" if words[0][0].isalnum() else ""
    last = r"(?!\w)" if words[-1][-1].isalnum() else ""
    found = re.finditer(first + joint.join(map(re.escape, words)) + last, text, re.IGNORECASE)
    return [spot.span() for spot in found]


def _spelled(words: Sequence[str], text: str) -> bool:
    """Returns whether a text has words backwards, or one of them letter by letter, "P-A-R-I-S"."""
    backwards = " ".join(words)[::-1].split()
    if backwards != words and len("".join(words)) > 2 and _spots(backwards, text):
        return True
    forms = [*words, "".join(words)]
    apart = (r"[^\w\n]{1,3}".join(map(re.escape, form)) for form in forms if len(form) > 2)
    return any(re.search(rf"(?<!\w){form}(?!\w)", text, re.IGNORECASE) for form in apart)


def _encodes_text(text: str, truth: str) -> bool:
    """Returns whether a text has an answer in base64, in hexadecimal bytes, or rotated by 13."""
    for form in {truth, truth.lower(), truth.upper(), truth.capitalize()}:
        raw = form.encode(errors="replace")
        codes = base64.b64encode(raw).decode().rstrip("="), raw.hex(), codecs.encode(form, "rot13")
        if len(form) > 2 and any(re.search(rf"(?<!\w){re.escape(c)}(?!\w)", text) for c in codes):
            return True
    return False


def _listed(problem: str) -> list[_ListedOption]:
    """Returns the options that a question lists, in order from A."""
    marks: list[re.Match[str]] = []
    for match in _LISTED.finditer(problem):
        if ord(match[1]) - ord("A") == len(marks):
            marks.append(match)
    ends = [*(mark.start() for mark in marks), len(problem)][1:]
    texts = [problem[m.end() : end][:_MAX_OPTION] for m, end in zip(marks, ends, strict=False)]
    lines = [text.strip().partition("\n")[0].rstrip(" .;,(") for text in texts]
    return [_ListedOption(mark[1], line) for mark, line in zip(marks, lines, strict=True)]


def _option_of(truth: str, listed: Sequence[_ListedOption]) -> _ListedOption | None:
    """Returns the option of an answer, found by its letter or by its text."""
    match = _OPTION.fullmatch(plain(truth))
    if match:
        letter = match[1].upper()
        known = next((option.text for option in listed if option.letter == letter), "")
        return _ListedOption(letter, (match[2] or known).strip())
    same = [o for o in listed if o.text and _words(o.text) == _words(plain(truth))]
    return same[0] if len(same) == 1 else None


def _states_option(text: str, option: _ListedOption, listed: Sequence[_ListedOption]) -> bool:
    """Returns whether a text identifies the option."""
    if _tells_letter(text, option.letter) or _tells_place(text, option, listed):
        return True
    words = _words(option.text)
    if words and listed:
        spots = _spots(words, text)
        told = any(_is_framed(text, *spot) for spot in spots)
        return told or _spelled(words, text) or _excludes_others(text, option, listed)
    value = _number(option.text) if words else None
    if value is not None:
        return leaked_numbers.gives_away(value, text, leaked_numbers.asked(""))
    return bool(words) and bool(_spots(words, text))


def _tells_letter(text: str, letter: str) -> bool:
    """Returns whether a text names a letter as its choice; "a" before a word is an article."""
    for spot in re.finditer(rf"(?<![\w'])\(?{letter}(?![\w'])\)?", text, re.IGNORECASE):
        start, end = spot.span()
        if spot[0] == letter.lower() and not _CLOSED.match(text[end : end + 1]):
            continue
        if frames.stands_alone(text, start, end) or frames.says_so(text, start, end):
            return True
        before = text[max(0, start - _BEFORE) : start]
        after = text[end : end + _BEFORE]
        if _CHOOSES.search(before) and not _GOES_ON.match(after):
            return True
    return False


def _tells_place(text: str, option: _ListedOption, listed: Sequence[_ListedOption]) -> bool:
    """Returns whether a text names an option by its place in the list, as a choice."""
    place = ord(option.letter) - ord("A") + 1
    if place > len(listed):
        return False
    names = [number_words.ordinal(place)] + (["last", "final"] if place == len(listed) else [])
    kind = r"(?: (?:one|option|choice|answer|of (?:the )?(?:options|choices|four|list)))"
    counted = number_words.to_digits(text), rf"\b(?:option|choice|answer) {place}\b"
    return any(
        _is_framed(reading, *spot.span())
        for reading, pattern in ((text, rf"\b(?:{'|'.join(names)}){kind}?\b"), counted)
        for spot in re.finditer(pattern, reading, re.IGNORECASE)
    )


def _excludes_others(text: str, option: _ListedOption, listed: Sequence[_ListedOption]) -> bool:
    """Returns whether a text excludes every other option."""
    out = set()
    for clause in _CLAUSE.split(text):
        negated = _EXCLUDED.search(clause)
        if negated:
            out |= {o.letter for o in listed if _names(clause[negated.start() :], o)}
    return len(listed) > 2 and out == {o.letter for o in listed} - {option.letter}


def _names(clause: str, option: _ListedOption) -> bool:
    """Returns whether a clause has an option's text or its letter."""
    if option.text and _spots(_words(option.text), clause):
        return True
    return bool(re.search(rf"(?<![\w'])\(?{option.letter}(?![\w'])", clause))
