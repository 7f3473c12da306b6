"""Phrases with which a text declares a mention to be the answer.

Lessons need some numbers and words for other reasons too (the question has them, they number a
step). Those give the answer away only in such phrases: "the answer is 4", "write 4.", "so it comes
to 4", a line with only "4". Only text near a mention is read, so the time is linear in the number
of mentions.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_BEFORE = 70  # characters that are read
_AFTER = 50

_FILL = (
    r"(?:\s{0,3}(?:[:=(\[\"'>*]|\b(?:exactly|just|simply|only|about|around|approximately|precisely|"
    r"then|equal to|the number|number|the value|the word|the letter|letter|option|choice|"
    r"an?|the|that|it|is|be)\b)){0,6}\s{0,3}\(?$"
)
_NAMED = re.compile(
    r"\b(?:answers?|ans|results?|solutions?|outcome|conclusion|total|antwort|respuesta|r[ée]ponse|"
    r"risposta|resposta)\b"
    r"(?:(?:[ \t][\w']{1,12}){0,5}?[ \t](?:is|was|are|be|equals?|ist|es|est|(?:comes?|works?) "
    r"(?:out )?(?:to|as|at))\b|['\"]?\s{0,3}(?:[:=]|->|→)|[ \t](?=yes|no|true|false))" + _FILL
    + r"|(?:答案|结果|答え)(?:是|为|:|は)?\s{0,3}$",
    re.IGNORECASE,
)  # fmt: skip
_TOLD = re.compile(
    r"\b(?:write|put|say|enter|type|state|reply|respond|submit|output|conclude|answer|guess|"
    r"mark|choose|pick|select|circle|go (?:with|for)|take|tick|spell|schreib\w*|escrib\w*)"
    r"(?: (?:down|in|with|that|it as|only|just)){0,3}" + _FILL,
    re.IGNORECASE,
)
_FOUND = re.compile(
    r"(?:(?<![<>=])=|\b(?:equals?|makes?|gives?|yields?|leaves?|leaving|giving|"
    r"(?:comes?|amounts?|adds?|works?|goes) (?:up |out )?(?:to|as|at)|gets?|becomes?|"
    r"ends? (?:up )?(?:with|at|on)|left with|must be|should be|has to be|will be|remains?|"
    r"(?<!if )(?<!when )(?<!whether )(?<!that )(?:it is|it's|that is|that's)|"
    r"(?:so|thus|therefore|hence|finally)(?: (?:is|there are|you have|we have|you get))?)"
    r"(?: you| us| him| her| with| is| the [a-z]{2,15})?),?" + _FILL,
    re.IGNORECASE,
)
_CLOSED = re.compile(
    r"(?:\s{0,2}[%°])?(?:\s{0,2}[.!;,)\]\"'](?!\d)|\s{0,3}$|\s{0,3}\n"
    r"|\s{1,2}and (?:stop|nothing|you|that)\b)"
)
_SAID_OF_IT = re.compile(
    r"[)\]\"'*]{0,2}(?: [a-z]{1,12}){0,2} (?:is|are|=) (?:the (?:final |right |correct |only )?"
    r"(?:answer|result|solution|one|option|choice)\b|your answer|right\b|correct\b|it\b"
    r"|what (?:you|we) (?:want|write|need|get)\b)",
    re.IGNORECASE,
)
_OPEN = re.compile(r"\s{0,2}(?:or|/|nor|, ?or) ", re.IGNORECASE)
_CONDITION = re.compile(r"\b(?:set|if|when|where|until|whether|than|not)\b[^.\n]*$", re.IGNORECASE)


def says_so(text: str, start: int, end: int) -> bool:
    """Returns whether a text explicitly calls the mention at `start:end` the answer."""
    before = text[max(0, start - _BEFORE) : start]
    after = text[end : end + _AFTER]
    if _OPEN.match(after):
        return False
    if _NAMED.search(before) or _SAID_OF_IT.match(after):
        return True
    return bool(_TOLD.search(before) and _CLOSED.match(after))


def concludes(text: str, start: int, end: int, units: Collection[str]) -> bool:
    """Returns whether a sentence concludes with the mention at `start:end`: "so that gives 9.".

    Args:
        text: the text, plain, in one case.
        start: the start of the mention.
        end: the end of the mention.
        units: words that may follow the mention, those of the question.
    """
    before = text[max(0, start - _BEFORE) : start]
    after = text[end : end + _AFTER]
    if not _FOUND.search(before):
        return False
    unit = re.match(r" ([^\W\d_]{2,})", after)
    return bool(_CLOSED.match(after)) or bool(unit and unit[1].lower() in units)


def is_condition(text: str, start: int) -> bool:
    """Returns whether the sentence before `start` sets a condition instead of giving a result."""
    return bool(_CONDITION.search(text[max(0, start - _BEFORE) : start]))


def stands_alone(text: str, start: int, end: int) -> bool:
    """Returns whether a line has only the mention at `start:end`, and at most a unit."""
    line = text[text.rfind("\n", 0, start) + 1 : start]
    after = re.match(r"(?: [^\W\d_]{1,15})?[^\w\n]{0,5}(?:\n|$)", text[end : end + _AFTER])
    return bool(after) and not re.search(r"\w", line[-_BEFORE:])
