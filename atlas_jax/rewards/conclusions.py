"""Conclusions of texts without a marked answer: the value that the last sentence states.

    "So x = 2 or x = 3."  ->  "x = 2 or x = 3",   "It takes 15 days to save $90."  ->  "15"

A value that is more than a number is taken whole, so no part of it counts as an answer.
"""

from __future__ import annotations

import re

from atlas_jax.rewards import equality, numbers
from atlas_jax.rewards.plain import TAIL, plain

SENTENCE_END = re.compile(
    r"(?<![MDJS]r)(?<!Mrs)(?<!\bSt)(?<!\bRs)(?<!Prof)(?<!\bMt)(?<!approx)(?<!\b[A-J])"
    r"(?<!\b[A-Z]\. [A-Z])(?<!^[A-Z])(?<!\bsq)"
    r"(?:[.?](?=\s)|!(?=\s++(?![a-z]))|;(?=\s(?![-+\d])))|。"
)
_CLOSING = re.compile(
    r"(?:let me know|i hope|hope (?:this|that)|feel free|if you (?:have|need|want)|please|thank)\b",
    re.IGNORECASE,
)
_MATH_SPAN = re.compile(r"(?<!\\)\$(?![\s\d]*\$)([^\s$](?:[^$\n]{0,300}[^\s$])?)\$(?!\d)")
_PLAIN_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3}")
_RESULT = re.compile(r"= ?\$?(?=[-+]?[\d.])")
_NOT_THE = re.compile(
    r"(?:\b(?:not|never|cannot|except|than|least|most|between|neither|nor)|n't)"
    r"(?: (?!only\b)\w{1,12})? (?:exactly |just |equal to )?$",
    re.IGNORECASE,
)
_PRICE = re.compile(
    r"(?<!\bfor)(?<!\bat)(?<!\bwith)(?<!\bof)(?<!\bfrom)(?<!\bthan)(?<!\bthe)(?<!\bhis)(?<!\bher)"
    r" (?:[$€£] ?)([\d,]*\d(?:\.\d+)?)"
)
_COPULA = re.compile(
    r"\b(?:is|are|was|were|be|equals|takes?|took|costs?|weighs?|lasts?|total of) "
    r"(?:now |exactly |about |only )?$"
)
_ASIDE = re.compile(r"(?<=\w) \((?![^()]{0,80},[^()A-Za-z]{0,80}\))[^()]*\)(?! ?[(^*/])")
_PHRASE = re.compile(
    r"\b(?:for|in|of|after|per|over|within|during|from|on|at|to \w{1,12}) (?:the |his |her |their "
    r"|all |each |every |these |those |an? )?$"
)
_STRESSED = re.compile(r"\*\*\$?([-+]?[\d.,/]*\d)%?\*\*")
_BULLET = re.compile(r"^\s*(?:[-*•] |\d{1,2}[.)] )")
_THE = r"(?:the|his|her|their|its|my|our|these|those|all|last|a|an)"
_ASIDE_CLAUSE = re.compile(
    r"(?:,? (?:and )?not(?= (?:the )?[$€£]?\d)"
    r"|,? (?:rather than|instead of|as opposed to|compared (?:to|with)|unlike|up from|down from)"
    r"|,? which is (?:only |just )?(?:half|twice|double|triple|a \w+ of|[$€£]?[\d.,/]+%?(?: \w+)? "
    r"(?:more|less|fewer|times|of|above|below|short))"
    r"|,? (?:where|because|since|before (?:he|she|they|it)|until (?:he|she|they|it)|while \w+ing)"
    r"| out of| in base|(?<=\d) on an?(?= [$€£]?\d)"
    rf"|(?<=more)(?: \w+)? than {_THE}|(?<=er) than {_THE}|(?<=less) than {_THE}"
    rf"|(?<= left) (?:from|of) {_THE}|(?<=\d) of {_THE}|(?<=percent) of {_THE}"
    r"|,? including|,? if (?:he|she|they|it|we|you))\b",
    re.IGNORECASE,
)
"""Words that begin a clause which compares or explains instead of stating."""
_PURPOSE = re.compile(
    r" to (?!(?:the|get|obtain|find|give|yield|be)\b)[a-z]{2,12} "
    r"(?:(?:the|his|her|their|its|all|another|at least|these|those) )*"
    r"[$€£]?\d"
)
_NEEDS = re.compile(
    r"\b(?:need|take|require|ways?\b|must|ha(?:s|ve|d) to\b|remain|left|cost)", re.IGNORECASE
)
_DENIED = re.compile(
    r"[^\w,;]{0,2}(?:\w{1,12} )?(?:(?:is|are|was|does|do|did|can|will|would|has) ?(?:not|n't)\b"
    r"|cannot\b|(?:is|are|was) (?:an? )?(?:wrong|incorrect|extraneous|impossible|invalid|false)\b)",
    re.IGNORECASE,
)
_NOTHING = re.compile(
    r"\bno (?:(?:real|such|valid|integer|possible|other) )*(?:solutions?|integers?|values?|answers?"
    r"|roots?|numbers?|ways?)\b[^,;]*$",
    re.IGNORECASE,
)
_OPERATOR = re.compile(r"[-+*/^=<>]|\\(?:le|ge|ne|lt|gt|leq|geq|neq|times|cdot|pm|in|cup|div)")
_WORDS = re.compile(r"\\[A-Za-z]+|(?:sqrt|sin|cos|tan|log|ln|pi)\b|\b[ap]m\b", re.IGNORECASE)
_LISTS = re.compile(
    r"\b(?:is|are|was|were|be|includ\w+|values?|solutions?|roots?|numbers?|answers?|so|thus"
    r"|therefore|hence|either)\W*$",
    re.IGNORECASE,
)
_SUBJECT = re.compile(
    r"\W*(?:(?:so|thus|therefore|hence|then|finally|only|exactly|about)\b,? ?)*", re.IGNORECASE
)
_BETWEEN = re.compile(r"\b(?:is|are|be) (\d[\d.]*(?: \w{1,12})? (?:by|to|×|x) )$")
_IS_THE = re.compile(r"(?: \w{1,15})? (?:is|are|was|were) (?:the|an?) [^,;:=]*$")
_DISPLAY = re.compile(r"(?:\$\$|\\\[)\s*([^$\n]{1,300}?)\s*(?:\$\$|\\\])[\s.]*\Z")
_SAID_LAST = re.compile(r"(?:\b(?:is|are|equals)|:)\s+([^:\n]{1,100})\Z")
_IN_BRACKETS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}")
_NAME = re.compile(r"\\?[A-Za-z](?:_\{?\w{1,3}\}?)? ?= ?(?=[^=]+$)")
_IS_MORE = re.compile(r"[A-Za-z\\<>|:(\[{^_]")
"""Characters of a value that is more than a number; sums that are not carried out have none."""
_JOINT = re.compile(r"\s*(?:,\s+(?:and\s|or\s)?|;\s|\s(?:and|or)\s)\s*")
_DATE = re.compile(
    r"\b(?:(?:\d{1,2}(?:st|nd|rd|th)? (?:of )?)?(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
    r"[a-z]{0,6}\.?(?: \d{1,2}(?:st|nd|rd|th)?)?,? \d{4}|\d{4}-\d\d-\d\d)\b"
)
_PARTS = {
    "hour": "minute", "hr": "min", "minute": "second", "min": "sec", "dollar": "cent",
    "feet": "inch", "foot": "inch", "ft": "in", "week": "day", "day": "hour", "year": "month",
    "pound": "ounce", "lb": "oz", "meter": "centimeter", "m": "cm", "kilometer": "meter",
    "km": "m", "kilogram": "gram", "kg": "g", "h": "min",
}  # fmt: skip
"""Units, with the smaller units of a compound amount."""
_COMPOUND = re.compile(
    r"\d[\d,.]*(?:[ -]?(?!and\b)([A-Za-z]{1,10}?)(?:s|es)?)?"
    r"(?:,? and |, | )(\d[\d.]*)[ -]?([A-Za-z]{1,11})\b"
)


def conclusion(text: str) -> str | None:
    """Returns the value that the last sentence with a number states; None if it states none.

    The value is the mathematics that ends the sentence, a number in bold, the value after its last
    "=", a price before a phrase with another number, or else its last value.
    """
    if shown := _shown(text):
        return shown
    sentence = _last_sentence(text)
    if sentence is None:
        return None
    sentence = _main_clause(_BULLET.sub("", sentence, count=1))
    spans = [m for m in _MATH_SPAN.finditer(sentence) if not _PLAIN_WORD.search(m[1])]
    if len(spans) == 1 and not any(numbers.numbers(plain(sentence[spans[-1].end() :]))):
        span = spans[-1][1]
        after = sentence[spans[0].end() :]
        if not equality.is_plain_number(span) and not _DENIED.match(after):
            return _right_side(span)
    stressed = _STRESSED.findall(sentence)
    if len(stressed) == 1:
        return stressed[0]
    return _last_value(sentence)


def _shown(text: str) -> str | None:
    """Returns mathematics at the end of a text, displayed or as an expression with letters."""
    end = text.rstrip()[-400:]
    if shown := _DISPLAY.search(end):
        return None if _PLAIN_WORD.search(shown[1]) else _right_side(shown[1])
    said = _SAID_LAST.search(end.rstrip("."))
    if said is None or any(numbers.numbers(plain(said[1]))):
        return None
    is_expression = re.search(r"\d", said[1]) and all(map(_is_math, plain(said[1]).split()))
    return said[1] if is_expression and len(said[1].split()) > 1 else None


def _right_side(text: str) -> str:
    """Returns the number that a single equation gives, and any other mathematics unchanged."""
    value = text.rpartition("=")[2]
    is_one = "=" in text and not _is_relation(text) and len(_JOINT.split(text)) == 1
    return value if is_one and equality.is_plain_number(value) else text


def _last_sentence(text: str) -> str | None:
    """Returns the last sentence with a number, without the closing phrases of a letter."""
    lines = [line for line in text.splitlines() if line.strip()]
    while lines and _CLOSING.match(lines[-1].strip()):
        lines.pop()
    for line in reversed(lines):
        sentences = SENTENCE_END.split(line)
        for sentence in reversed(sentences):
            if re.search(r"\d|[½-¾]", sentence) and any(numbers.numbers(plain(sentence))):
                return sentence
    return None


def _main_clause(sentence: str) -> str:
    """Returns a sentence without trailing clauses that only compare or explain."""
    digit = re.search(r"\d", sentence)
    if digit is None:
        return sentence
    last_comma = max((m.start() for m in re.finditer(r"[,;](?!\d)", sentence[:-1])), default=-1)
    for match in _ASIDE_CLAUSE.finditer(sentence, digit.end()):
        if match.end() > last_comma:
            sentence = sentence[: match.start()]
            break
    needs = _NEEDS.search(sentence)
    for match in _PURPOSE.finditer(sentence, digit.end()):
        if needs and needs.end() <= match.start() and match.end() > last_comma:
            return sentence[: match.start()]
    return sentence


def _last_value(sentence: str) -> str | None:
    text = plain(_ASIDE.sub("", sentence))
    numbers_found = list(numbers.numbers(text))
    if not numbers_found:
        text = plain(sentence)
        numbers_found = list(numbers.numbers(text))
    results = {match.end() for match in _RESULT.finditer(text)}
    behind = [n for n in numbers_found if n.start() in results]
    if not numbers_found:
        return None
    last = (behind or numbers_found)[-1]
    before = text[max(0, last.start() - 80) : last.start()]
    after = text[last.end() :][:80]
    if _NOT_THE.search(before[-40:]) or _DENIED.match(after) or _NOTHING.search(before):
        return None
    if re.search(r"(?:^|[^\d) ] )(?:negative|minus) $", before[-20:].lower()):
        return f"-{last[0]}"
    if ends := _BETWEEN.search(before):
        return f"{ends[1]}{last[0]}"
    if whole := _compound(text, last) or _value(text, last):
        return whole
    if len(numbers_found) > 1 and not behind and _leads(numbers_found[0], last, text):
        return numbers_found[0][0]
    if len(numbers_found) > 1 and not behind and _PHRASE.search(before[-40:]):
        return _price(sentence) or _stated_before(numbers_found, text) or last[0]
    return last[0]


def _leads(first: re.Match[str], last: re.Match[str], text: str) -> bool:
    """Returns whether a sentence states its first number, and its last one is in a phrase."""
    lead = _SUBJECT.match(text)
    if lead is None or first.start() != lead.end():
        return False
    between = text[first.end() : last.start()]
    if _IS_THE.match(text, first.end()):
        return True
    is_apart = re.search(r"[,;:=]", between) or len(between.split()) < 3
    return not is_apart and _PHRASE.search(between[-40:]) is not None


def _compound(text: str, last: re.Match[str]) -> str | None:
    """Returns a date, or an amount in two units, that ends with a number."""
    start = max(0, last.start() - 40)
    end = last.end() + 14
    for match in _DATE.finditer(text, start, end):
        if match.start() <= last.start() < match.end():
            return match[0]
    for match in _COMPOUND.finditer(text, start, end):
        unit = (match[1] or "dollar").lower()
        smaller = _PARTS.get(unit, "") or _PARTS.get(f"{unit}s", "")
        if match.start(2) == last.start() and smaller and match[3].lower().startswith(smaller):
            return match[0]
    return None


def _value(text: str, last: re.Match[str]) -> str | None:
    """Returns the value of which a number is a part; None if the number is the whole value."""
    start, end = _run(text, last)
    if start == end:
        return None
    run = text[start:end].strip(" ,;").rstrip(TAIL)
    masked = _IN_BRACKETS.sub(lambda m: m[0].replace(",", "\x00"), run)
    items = [item.replace("\x00", ",") for item in _JOINT.split(masked)]
    names = [bool(_NAME.match(item)) and not _is_relation(item) for item in items]
    if names[0]:
        is_list = all(n or "=" not in item for n, item in zip(names, items, strict=True))
    else:
        is_list = "=" not in run and _LISTS.search(text[:start]) is not None
    if is_list and len(items) > 1:
        return run
    item = next((item for item in items if last[0] in item), "")
    if re.match(r"!(?! ?$| [A-Z])", text[last.end() :][:3]):
        return f"{last[0]}!"
    if "\\approx" in item:
        return item.removeprefix("\\approx ")
    remainder = item if _is_relation(item) else item.rpartition("=")[2]
    suffix = numbers.LETTERS.match(text, last.end())
    bare = remainder.replace(last[0] + (suffix[0] if suffix else ""), "", 1)
    is_more = _IS_MORE.search(bare) or ("=" in item and not _is_relation(item) and bare.strip())
    return item if is_more and not equality.is_plain_number(remainder) else None


def _is_relation(item: str) -> bool:
    return re.search(r"[<>]|\\(?:le|ge|ne|lt|gt)", item) is not None


def _run(text: str, last: re.Match[str]) -> tuple[int, int]:
    """Returns the span of the mathematics around a number."""
    tokens = [m.span() for m in re.finditer(r"\S+", text)]
    at = next(i for i, (_, end) in enumerate(tokens) if end > last.start())
    if not _is_math(text[slice(*tokens[at])]):
        return 0, 0
    first = final = at
    while first > 0 and _is_math(text[slice(*tokens[first - 1])]):
        first -= 1
    while final + 1 < len(tokens) and _is_math(text[slice(*tokens[final + 1])]):
        final += 1
    words = [text[slice(*token)] for token in tokens]
    while first < at and not _begins(words[first], words[first + 1]):
        first += 1
    while final > at and not _ends(words[final - 1], words[final]):
        final -= 1
    return tokens[first][0], tokens[final][1]


def _is_math(token: str) -> bool:
    bare = _WORDS.sub("", token).strip("$,;")
    return bare in ("and", "or") or not re.search(r"[^\W\d_]{2}", bare)


def _begins(token: str, following: str) -> bool:
    """Returns whether mathematics may begin with a token: not a lone letter, a comma or "and"."""
    bare = token.strip("$,;:.\"'")
    if not bare or bare in ("and", "or", "|"):
        return False
    return not bare.isalpha() or _OPERATOR.match(following) is not None


def _ends(previous: str, token: str) -> bool:
    bare = token.strip("$,;:.\"'")
    if not bare or bare in ("and", "or", "-", "=", "|"):
        return False
    return not bare.isalpha() or len(bare) == 2 or _OPERATOR.search(previous[-1:]) is not None


def _price(sentence: str) -> str | None:
    """Returns the only amount of money in a sentence about a price or earnings."""
    prices = _PRICE.findall(sentence)
    return prices[0] if len(prices) == 1 and len(re.findall("[$€£]", sentence)) == 1 else None


def _stated_before(found: list[re.Match[str]], text: str) -> str | None:
    """Returns a number that a sentence states before phrases with other numbers."""
    for number in reversed(found[:-1]):
        before = text[max(0, number.start() - 40) : number.start()]
        if _COPULA.search(before):
            is_apart = re.search("[,;:]", text[number.end() :][:-1])
            return None if is_apart else number[0]
        if not _PHRASE.search(before):
            return None
    return None
