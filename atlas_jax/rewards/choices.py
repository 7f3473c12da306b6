"""Multiple choice options, and yes or no."""

from __future__ import annotations

import re
from typing import NamedTuple

from atlas_jax.rewards.plain import clean, plain

_MAX_OPTION = 200  # longest text, in characters, that may be a bare option

_OPTION = re.compile(
    r"(?:(?:the )?(?:option|choice|answer) )?"
    r"(?:[(\[]?([a-j])([).]+)(?: ?(?<=[) ])(.*))?|[(\[]?([a-j])[)\]]?)",
    re.IGNORECASE,
)
_OTHER_OPTION = re.compile(r"[a-j]|(?:.*\W)?\(?[a-j][).].*", re.IGNORECASE)
_LETTER_FIRST = re.compile(
    r"(?:(?:the )?(?i:option|choice|answer) )?\(?([A-Ja-j])\)?"
    r"(?=$|[.,;]?$|(?:[:;]|,? -| is| as| or| and|,) |[).]"
    r"|,? (?i:because|since|due|which|not)\b)(.*)"
)
_ALTERNATIVE = re.compile(r"\W*(?:(?:or|and|nor)\b|\(?[A-J]\)?(?:[,).;:]|$| (?:or|and)\b))")
_REASON = re.compile(
    r"[.,;:)]* ?(?:because|since|as|due|which|not|rather|instead|is (?!not\b|wrong\b|incorrect\b))",
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    r"(?<!not )(?<!n't )\b(?i:(?:correct|right|best|final) (?:option|choice|answer)"
    r"|I(?:'d| would| will)? choose"
    r"|select|pick|go with|must be|should be|option|choice)"
    r"(?: (?i:is|be|option|choice))?[:*\s]{1,4}"
    r"(?:\(([A-Ja-j])\)|([B-J])\b(?!['’(]|-\w)|(A)(?=\W*$|[.,;:]))"
    r"(?! is (?:not|wrong|incorrect|false|too)\b)"
    r"|(?:^|[\s*(])([A-J])[)*]{0,3} is (?:the )?(?:correct|right|best)\b"
    r"|\b(?i:so|thus|hence|therefore)[,:]? (?:it is |it's |it must be )?"
    r"[(*]{0,3}([B-J])[)*]{0,3}\W{0,3}\Z"
)
_VERDICT = re.compile(
    r"(?:so|thus|therefore|hence|then|ultimately|in conclusion)?[, ]*"
    r"(?:(?:it|that|this|the (?:statement|claim)) is )?\b(yes|no|true|false)\b"
    r"(?!-)(?=$|[.,;:!)*]| ?[-(]| because| since| as )",
    re.IGNORECASE,
)
_VERDICTS = {"yes": True, "true": True, "no": False, "false": False}


class Choice(NamedTuple):
    """One option of multiple choice, such as "(B) Paris"."""

    letter: str  # lower case
    text: str  # "" if only the letter is given
    is_initial: bool  # written as "B. Paris", like the initial of a name

    def agrees(self, other: Choice) -> bool:
        """Returns whether two options are equal: by letter, or by the whole text for names."""
        if self.letter != other.letter:
            return False
        texts = [" ".join(re.findall(r"\w+", o.text.lower())) for o in (self, other)]
        if not all(texts) or not (self.is_initial and other.is_initial):
            return True
        short, long = sorted(texts, key=len)
        return f" {short} " in f" {long} "


def option(answer: str) -> Choice | None:
    """Returns an answer as an option; None if it is not one, or is several."""
    if len(answer) > _MAX_OPTION * 10:
        return None
    match = _OPTION.fullmatch(plain(clean(answer)))
    text = ((match and match[3]) or "").strip()
    if match is None or _OTHER_OPTION.fullmatch(text):
        return None
    is_initial = match[2] == "." and match[0][0] != "("
    return Choice((match[1] or match[4]).lower(), text, is_initial)


def bare_option(text: str) -> str | None:
    """Returns a text if it is only one option, else None."""
    text = text.strip()
    return clean(text) if len(text) <= _MAX_OPTION and option(text) else None


def led_by(answer: str) -> str:
    """Returns the letter of the option at the start of an answer: "C, since 12 is even"."""
    match = _LETTER_FIRST.match(plain(clean(answer[:_MAX_OPTION])))
    if match is None:
        return ""
    letter, remainder = match.groups()
    if _REASON.match(remainder) or not remainder.strip(" .,;:)"):
        return letter.lower()
    if _ALTERNATIVE.match(remainder) or _OTHER_OPTION.fullmatch(remainder.strip(" .,;:)-")):
        return ""
    is_list = re.match(r" (?:or|and|is|as)\b", remainder) or (
        remainder[0] == "," and re.search(r"\b[A-J]\b", remainder)
    )
    is_word = letter.isupper() or re.match(r"[).:]|\W*[^\W\d_]{3}", remainder)
    return letter.lower() if is_word and not is_list else ""


def chosen(text: str) -> str | None:
    """Returns the letter of a text's last choice: "so it must be (B)"."""
    last = None
    for last in _CHOSEN.finditer(text):  # noqa: B007
        pass
    return next(filter(None, last.groups()), None) if last else None


def verdict(truth: str) -> bool | None:
    """Returns the meaning of a text that is only yes or true, no or false; None otherwise."""
    return _VERDICTS.get(plain(clean(truth)).lower().rstrip("."))


def said_verdict(statement: str) -> bool | None:
    """Returns the meaning of a yes, no, true or false at the start of a statement, or None."""
    match = _VERDICT.match(plain(clean(statement[:_MAX_OPTION])))
    return _VERDICTS[match[1].lower()] if match else None
