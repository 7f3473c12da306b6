r"""Answers found in texts and compared with a known one.

`extract_answer` finds the span of the answer, `normalise` gives it the form that is compared:

    "… **Final Answer:** $\frac{6}{4}$ cups."  ->  "\frac{6}{4} cups"  ->  "3/2"

Every function takes time linear in the length of the text, whatever a model wrote.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

_MAX_NUMBER = 256  # characters of a number; a longer one is compared as text
_MAX_EXPONENT = 100  # of ten; a larger one is compared as text
_MAX_OPTION = 200  # characters of a text that is nothing but an option of multiple choice

_TAG = re.compile(r"<(/?)solution>", re.IGNORECASE)
_BRACE = re.compile(r"(\\(?:boxed|fbox) ?)?\{|\}|\\[{}]")
_HASHES = re.compile(r"(?<!#)####[ \t]*([^\n#]*)")
_MARKER = re.compile(
    r"(?<!\w)(?:the\s{1,4})?(?:final\s{1,4}|correct\s{1,4})?"
    r"answer(?:[\s*_]{1,8}is\b|[\s*_]{0,8}[:=])",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<![MDJS]r)(?<!Mrs)(?<!St)(?<!\b[A-J])[.!?;](?=\s)")
_CLAUSE_END = re.compile(r",?\s(?:because|since|so|which|as)\b|\s\(", re.IGNORECASE)
_LISTED = re.compile(r"[,;]\s|\b(?:and|or)\b", re.IGNORECASE)
_OPTION = re.compile(
    r"(?:(?:option|choice) )?(?:\(?([a-h])[).]+(?: (.*))?|\(?([a-h])\)?)", re.IGNORECASE
)
_OTHER_OPTION = re.compile(r"[a-h]|(?:.*\W)?\(?[a-h][).].*", re.IGNORECASE)

_EDGE = " \t\r\n*_`\"'“”‘’$:"
_TAIL = _EDGE + ".,;!?"
_MATH = re.compile(r"\\[()\[\]]|\\(?:left|right|displaystyle)(?![A-Za-z])")
_DOLLARS = re.compile(r"(?<!\\)\$((?:[^$\\]|\\.)++)\$")
_BOLD = re.compile(r"(?<!\w)\*\*|\*\*(?!\w)")
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname|boxed|fbox) ?\{([^{}]*)\}"
)
_FRAC = re.compile(r"\\[dtc]?frac ?(?:\{([^{}]*)\}|(\d)) ?(?:\{([^{}]*)\}|(\d))")
_CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "—": "-", "⁄": "/", "’": "'", "‘": "'", "“": '"', "”": '"'}
)

_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|(?<!\.)\.\d++)"
_NUMBER = re.compile(
    r"(?:(?<![\w)])(?P<sign>[-+])|(?<![\w^])(?<!\d\.))"
    r"(?:(?P<whole>\d++) (?=\d++ ?/ ?\d))?"
    rf"(?P<top>{_DECIMAL})"
    rf"(?: ?/ ?(?P<bottom>-?{_DECIMAL})"
    r"|(?:e| ?(?:\*|×|x|\\times|\\cdot) ?10 ?\^ ?\{?)(?P<exponent>[-+]?\d++)\}?)?"
    r"(?: (?P<multiple>dozen|hundred|thousand|million|billion|trillion)s?\b)?",
    re.IGNORECASE,
)
_MULTIPLES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12,
}  # fmt: skip
_LETTERS = re.compile(r"[^\W\d_]+")
_POWER = re.compile(r"\^\{?-?\d\}?|[²³]|°[cf]?")
_UNIT_TAIL = re.compile(r"(?!\.)(?:[^\W\d_]|[ /.'()-])*")
_WORDS_AND_NUMBER = re.compile(r"[\w\s.,':-]*")
_SHORT_UNITS = {
    "mm", "cm", "dm", "km", "kg", "mg", "lb", "lbs", "oz", "ft", "in", "yd", "mi", "hr", "hrs",
    "min", "mins", "sec", "ms", "ml", "dl", "kw", "mw", "hz", "am", "pm", "mph", "usd", "eur", "of",
}  # fmt: skip
_UNIT_LETTERS = set("mghlsvwj")
_OPERATORS = {
    "and", "or", "to", "not", "plus", "minus", "negative", "times", "over", "divided", "pi", "sqrt",
    "sin", "cos", "tan", "log", "exp", "mod", "factorial", "choose", "squared", "cubed", "half",
    "twice", "double",
}  # fmt: skip
_ASSIGNED = re.compile(r"\\?[a-z][\w ]{0,40}(?:\([a-z]\))? ?= ?(?=[^=]*$)")
_ARTICLE = re.compile(r"\b(?:the|an|a) (?=[^\W\d_]{2})")
_SPACED_MARK = re.compile(r" ?([^\w\s]) ?")
_TOKEN = re.compile(r"\w+|[^\w\s]")


def extract_answer(text: str) -> str | None:
    r"""Returns the span of the answer that a text gives; None if it gives none.

    The first of these that is there: the last complete `<solution>`, the last closed `\boxed` or
    `\fbox`, GSM8K's `####`, what follows the last "Final Answer:", "Answer:", "the answer is" or
    "answer =", the text itself where it is one option of multiple choice, the last number.
    """
    return marked_answer(text) or _bare_option(text) or _last_number(text)


def normalise(answer: str) -> str:
    """Returns the form of an answer that equals that of every other way to write it.

    Numbers become exact fractions in lowest terms, without currency, percent sign and unit, so
    that units are not compared. Everything else becomes lower-case text without articles, spaces
    around marks and LaTeX spacing.
    """
    return str(_read(answer))


def is_correct(text: str, ground_truth: str) -> bool:
    """Returns whether the answer that a text gives is the ground truth.

    Options of multiple choice are compared by their letters where both have one. The ground truth
    may be a whole solution that marks its answer.
    """
    answer = extract_answer(text)
    truth = marked_answer(ground_truth) or ground_truth
    given, wanted = _option(answer or ""), _option(truth)
    if given and wanted:
        return given.letter == wanted.letter
    target = _read(wanted.text if wanted and wanted.text else truth)
    readings = [] if answer is None else [answer, *_other_readings(answer)]
    return target != "" and any(_read(reading) == target for reading in readings)


def states_answer(lesson: str, ground_truth: str) -> bool:
    """Returns whether a lesson contains the ground truth as a number or phrase of its own.

    A fraction counts only in lowest terms, because "6/2" does not yet say 3. The letter of an
    option counts as "(B)" or behind "answer is" and the like.
    """
    plain, truth = _plain(lesson), marked_answer(ground_truth) or ground_truth
    option = _option(truth)
    if option and _states_letter(plain, option.letter.upper()):
        return True
    target = _read(option.text if option else truth)
    if isinstance(target, Fraction):
        return any(_stated(number) == target for number in _numbers(plain))
    return target != "" and _phrase(target) in _phrase(_canonical(plain))


def marked_answer(text: str) -> str | None:
    """Returns the answer that is marked as such."""
    tags = itertools.pairwise(_TAG.finditer(text))
    spans = [(a.end(), b.start()) for a, b in tags if not a[1] and b[1]]
    for start, end in reversed(spans):
        if _clean(text[start:end]):
            return _inside_solution(text[start:end])
    return _boxed(text) or _behind_hashes(text) or _behind_marker(text)


def _inside_solution(text: str) -> str:
    """Returns what the content of a solution tag answers; of several lines the last number."""
    content = _clean(text)
    answer = _boxed(text) or _behind_hashes(text) or _behind_marker(text)
    if answer is None and "\n" in content and "\\begin" not in content:
        answer = _last_number(content)
    return answer or content


def _boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed` that is closed and not empty."""
    open_braces: list[re.Match[str]] = []
    spans = []
    for brace in _BRACE.finditer(text):
        if brace[0].endswith("{") and len(brace[0]) != 2:
            open_braces.append(brace)
        elif brace[0] == "}" and open_braces and (opened := open_braces.pop())[1]:
            spans.append((opened.end(), brace.start()))
    contents = (_clean(text[start:end]) for start, end in sorted(spans, reverse=True))
    return next(filter(None, contents), None)


def _behind_hashes(text: str) -> str | None:
    """Returns the number behind the last `####`, or anything there that ends the text."""
    end = len(text.rstrip())
    for hashes in reversed(list(_HASHES.finditer(text))):
        answer = _behind_marker(hashes[1]) or _statement(hashes[1])
        if answer and (hashes.end() >= end or _is_number(answer)):
            return answer
    return None


def _behind_marker(text: str) -> str | None:
    """Returns what the first line with words states behind the last such marker."""
    for part in reversed(_MARKER.split(text)[1:]):
        lines = filter(str.strip, part.splitlines())
        if answer := next(filter(None, map(_statement, lines)), None):
            return answer
    return None


def _statement(line: str) -> str:
    """Returns the answer in a line: a leading number, what the last "=" gives, or a sentence."""
    text = _clean(line)
    if not text:
        return ""
    sentence = _clean(_SENTENCE_END.split(text, maxsplit=1)[0])
    clause = _clean(_CLAUSE_END.split(sentence, maxsplit=1)[0])
    number = next(filter(_is_number, (text, sentence, clause)), None)
    result = _right_side(text) if number is None else None
    return number or (result and _statement(result)) or sentence


def _right_side(text: str) -> str | None:
    """Returns what stands behind the last "=" of one chain of equations."""
    parts = text.split("=")
    return None if len(parts) < 2 or any(map(_LISTED.search, parts[1:-1])) else parts[-1]


def _bare_option(text: str) -> str | None:
    text = text.strip()
    return _clean(text) if len(text) <= _MAX_OPTION and _option(text) else None


def _last_number(text: str) -> str | None:
    numbers = [number[0] for number in _numbers(_plain(text))]
    return numbers[-1] if numbers else None


class _Option(NamedTuple):
    """One option of multiple choice, such as "(B) Paris"."""

    letter: str  # lower case
    text: str  # "" if only the letter is given


def _option(answer: str) -> _Option | None:
    """Returns the option that an answer is; None for anything else, and for several options."""
    match = _OPTION.fullmatch(_clean(answer))
    text = (match and match[2]) or ""
    if match is None or _OTHER_OPTION.fullmatch(text):
        return None
    return _Option((match[1] or match[3]).lower(), text)


def _states_letter(plain: str, letter: str) -> bool:
    return bool(
        re.search(
            rf"\({letter}\)|\b(?i:answer|option|choice|choose|pick|select)\b"
            rf"(?:[\s:=*_]{{1,4}}(?i:is|option|choice)\b){{0,2}}[\s:=*_\"']{{1,4}}{letter}(?!\w)",
            plain,
        )
    )


def _other_readings(answer: str) -> Iterator[str]:
    """Yields what an answer says too: the text of an option, a result, a sentence's one number."""
    option = _option(answer)
    text = (option and option.text) or answer
    yield text
    if result := _right_side(text):
        yield result
    plain = _plain(text)
    numbers, words = list(_numbers(plain)), _LETTERS.findall(plain.lower())
    is_sentence = any(len(word) > 2 for word in words) and _OPERATORS.isdisjoint(words)
    if len(numbers) == 1 and is_sentence and _WORDS_AND_NUMBER.fullmatch(plain):
        yield numbers[0][0]


def _clean(text: str) -> str:
    """Returns a text without the marks around it."""
    text = _BOLD.sub("", _MATH.sub("", text))
    return _WRAPPED.sub(r"\1", _DOLLARS.sub(r"\1", text)).rstrip(_TAIL).lstrip(_EDGE)


def _plain(text: str) -> str:
    """Returns a text in one line with its LaTeX written as plain characters where it can be."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def _plain_fraction(match: re.Match[str]) -> str:
    parts = [(match[1] or match[2] or "").strip(), (match[3] or match[4] or "").strip()]
    top, bottom = (p if re.fullmatch(r"-?[\w.,\\]+", p) else f"({p})" for p in parts)
    mixed = match.start() and match.string[match.start() - 1].isdigit()
    return f"{' ' if mixed else ''}{top}/{bottom}"


_REWRITES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (_MATH, ""),
    (_BOLD, ""),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=\d)\\,(?=\d{3})"), ""),
    (re.compile(r"\\[,;: ]|~|\\q?quad(?![A-Za-z])"), " "),
    (re.compile(r"\^ ?\{?\\circ\}?"), "°"),
    (_WRAPPED, r" \1 "),
    (_FRAC, _plain_fraction),
    (_WRAPPED, r" \1 "),
    (re.compile(r"(?<!\\)\{(\w)\}"), r"\1"),
    (_FRAC, _plain_fraction),
    (re.compile(r"\\([$%&#_{}])"), r"\1"),
    (re.compile(r"[$€£¥₹%]"), ""),
)


def _read(answer: str) -> Fraction | str:
    """Returns the exact number that an answer is, or else its canonical text."""
    text = _plain(_clean(answer)).lower().rstrip(_TAIL)
    text = _ASSIGNED.sub("", text, count=1) if _ASSIGNED.match(text) else text
    number = _quantity(text)
    return _canonical(text) if number is None else number


def _is_number(text: str) -> bool:
    return isinstance(_read(text), Fraction)


def _canonical(plain: str) -> str:
    text = _ARTICLE.sub("", plain.lower())
    return _SPACED_MARK.sub(r"\1", text).rstrip(_TAIL).lstrip(_EDGE)


def _phrase(text: str) -> str:
    """Returns the words and marks of a text between single spaces, so that whole ones are found."""
    return f" {' '.join(_TOKEN.findall(text))} "


def _quantity(plain: str) -> Fraction | None:
    """Returns the number that is all of a text but for its unit."""
    text = re.sub(r"^([-+]) ", r"\1", plain[: _MAX_NUMBER + 1])
    number = _NUMBER.match(text)
    if len(plain) > _MAX_NUMBER or number is None or not _is_unit_tail(text[number.end() :]):
        return None
    return _value(number)


def _numbers(plain: str) -> Iterator[re.Match[str]]:
    """Yields the numbers of a text; none that is part of a word or of an expression like 2x."""
    for number in _NUMBER.finditer(plain):
        suffix = _LETTERS.match(plain, number.end())
        if suffix is None or _is_unit(suffix[0].lower(), attached=True):
            yield number


def _value(number: re.Match[str]) -> Fraction | None:
    """Returns the exact value; None if it is too long to compute or divides by 0."""
    if (
        len(number[0]) > _MAX_NUMBER
        or abs(exponent := int(number["exponent"] or 0)) > _MAX_EXPONENT
    ):
        return None
    top, bottom = (Fraction((number[k] or "1").replace(",", "")) for k in ("top", "bottom"))
    if not bottom:
        return None
    size = int(number["whole"] or 0) + top / bottom
    size *= Fraction(10) ** exponent * _MULTIPLES.get((number["multiple"] or "").lower(), 1)
    return -size if number["sign"] == "-" else size


def _stated(number: re.Match[str]) -> Fraction | None:
    """Returns the value that a number states; None for a fraction that is not in lowest terms."""
    value = _value(number)
    if value is None or not number["bottom"]:
        return value
    return value if number["bottom"].lstrip("-") == str(value.denominator) else None


def _is_unit_tail(tail: str) -> bool:
    """Returns whether what follows a number is nothing, or a unit and the words behind it."""
    text = _POWER.sub("", tail)
    words = _LETTERS.findall(text)
    if not _UNIT_TAIL.fullmatch(text) or not {"and", "or"}.isdisjoint(words):
        return False
    return not words or _is_unit(words[0], attached=text[0] != " ")


def _is_unit(word: str, attached: bool) -> bool:
    if len(word) == 1:
        return word in _UNIT_LETTERS and not attached
    return word in _SHORT_UNITS or (len(word) >= (5 if attached else 3) and word not in _OPERATORS)
