"""Numbers in plain text: their exact values and their units."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from atlas_jax.rewards import spoken

_MAX_NUMBER = 256  # characters of a number; a longer one is compared as text
_MAX_EXPONENT = 100  # a larger one is compared as text

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces around numbers
_LETTER = rf"[^\W\d_{_CJK}]"
_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|(?<!\.)\.\d++)"
NUMBER = re.compile(
    rf"(?:(?<![^\W{_CJK}])(?<!\))(?P<sign>[-+])|(?<![^\W{_CJK}])(?<!\^)(?<!\d\.))"
    r"(?:(?P<whole>\d++) (?=\d++ ?/ ?\d))?"
    rf"(?P<top>{_DECIMAL})"
    rf"(?: ?/ ?(?P<bottom>-?{_DECIMAL})"
    r"|(?:e| ?(?:\*|×|x|\\times|\\cdot) ?10 ?(?:\^|\*\*) ?\{?)(?P<exponent>[-+]?\d++)\}?)?"
    r"(?: ?\^ ?\{?(?P<power>-?\d++)\}?)?"
    r"(?: (?P<multiple>dozen|hundred|thousand|million|billion|trillion)s?\b)?",
    re.IGNORECASE,
)
_MULTIPLES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12,
}  # fmt: skip
_GROUPS = re.compile(r"([-+]?\d{1,3})((?:([ '_])\d{3})(?:\3\d{3})*)(?![\d/]| ?/|\3\d)")
LETTERS = re.compile(rf"{_LETTER}+")
_POWER = re.compile(r"\^\{?-?\d\}?|°[CcFf]?")
_UNIT_TAIL = re.compile(r"(?![.!^]| - )(?:[^\W\d_]|[ /.'()-])*")
_SHORT_UNITS = {
    "mm", "cm", "dm", "km", "kg", "mg", "μm", "μg", "lb", "lbs", "oz", "ft", "in", "yd", "mi", "hr",
    "hrs", "min", "mins", "sec", "ms", "ml", "dl", "kw", "mw", "hz", "am", "pm", "mph", "of", "kj",
    "pa", "rs", "sq", "cu", "kpa", "mpa", "kwh", "kv", "mv", "ma", "kω", "mω", "nm", "gb", "mb",
    "kb", "tb", "rpm", "psi", "kcal", "gal", "usd", "eur", "gbp", "mol", "rad", "deg",
}  # fmt: skip
_UNIT_LETTERS = set("mghlsvwjNJWVKALCFΩ")
_OPERATORS = {
    "and", "or", "to", "not", "plus", "minus", "negative", "over", "divided", "pi", "sqrt", "sin",
    "cos", "tan", "log", "exp", "mod", "factorial", "choose", "squared", "cubed", "half", "twice",
    "double", "triple", "raised", "power", "root", "is", "was", "are", "less", "fewer", "than",
    "isn", "from", "below", "above", "under", "out",
}  # fmt: skip
_SIGN_WORD = re.compile(r"(?:minus|negative) (?=[\d.])", re.IGNORECASE)
_ONE = re.compile(r"^an? (?=(?:dozen|hundred|thousand|million|billion)\b)", re.IGNORECASE)
_CENTS = re.compile(
    r"(?: (?:dollars?|euros?|pounds?)(?: and|,)?| and) (\d{1,2}) (?:cents?|pence)", re.IGNORECASE
)
_DOTTED = re.compile(r"[-+]?\d{1,3}(?:(?:\.\d{3}){2,}(?:,\d+)?|(?:\.\d{3})+,\d\d?)(?![\d.,])")
_AND_PART = re.compile(r" and (?:an? |one )?(half|quarter|third|\d+ ?/ ?\d+)\b(?!\s*of\b)")


class Quantity(NamedTuple):
    """A number and its unit."""

    value: Fraction
    unit: str  # the first word or letter after the number; "" for none
    is_dozen: bool = False

    def agrees(self, other: Quantity) -> bool:
        """Returns whether the numbers are equal and the units are not known to differ.

        Only units of a single letter (m and h) and the halves of a day are compared.
        """
        units = {self.unit, other.unit}
        clash = len(units) == 2 and all(len(u) == 1 or u in ("am", "pm") for u in units)
        return self.value == other.value and not clash


def quantity(plain: str) -> Quantity | None:
    """Returns the number of a text that is only a number and its unit."""
    text = re.sub(r"^([-+]) ", r"\1", plain[: _MAX_NUMBER + 1])
    text = _ONE.sub("1 ", _SIGN_WORD.sub("-", text, count=1), count=1)
    if (groups := _GROUPS.match(text)) and text[groups.end() : groups.end() + 1] in ("", " ", "."):
        text = groups[1] + re.sub(r"\D", "", groups[2]) + text[groups.end() :]
    if dotted := _DOTTED.match(text):
        text = dotted[0].replace(".", "").replace(",", ".") + text[dotted.end() :]
    if text.lower() in ("half", "a half"):
        return Quantity(Fraction(1, 2), "")
    number = NUMBER.match(text)
    if len(plain) > _MAX_NUMBER or number is None or number["power"]:
        return None
    tail = text[number.end() :]
    part = Fraction(0)
    tail = re.sub(r"^(?:ths?|rds?|nds?)\b", "", tail) if number["bottom"] else tail
    if cents := _CENTS.fullmatch(tail.rstrip()):
        part = Fraction(int(cents[1]), 100)
        tail = " dollars"
    if behind := _AND_PART.match(tail):
        part = spoken.part(behind[1])
        tail = tail[behind.end() :]
    size = value(number)
    if size is None or not _is_unit_tail(tail):
        return None
    words = LETTERS.findall(tail)
    if words and (nth := spoken.denominator(words[0])):
        return Quantity(size / nth, "")
    size += -part if size < 0 else part
    return Quantity(size, unit(words), (number["multiple"] or "").lower() == "dozen")


def numbers(plain: str) -> Iterator[re.Match[str]]:
    """Yields the numbers of a text that are not part of a word or of an expression like 2x."""
    for number in NUMBER.finditer(plain):
        suffix = LETTERS.match(plain, number.end())
        if suffix is None or is_attached_unit(suffix[0]):
            yield number


def value(number: re.Match[str]) -> Fraction | None:
    """Returns the exact value of a number; None if it is too long or divides by 0."""
    if (
        len(number[0]) > _MAX_NUMBER
        or abs(exponent := int(number["exponent"] or 0)) > _MAX_EXPONENT
    ):
        return None
    top, bottom = (Fraction((number[k] or "1").replace(",", "")) for k in ("top", "bottom"))
    if not bottom:
        return None
    size = int(number["whole"] or 0) + top / bottom
    if number["power"]:
        if abs(power := int(number["power"])) > _MAX_EXPONENT or (power < 0 and not size):
            return None
        size **= power
    size *= Fraction(10) ** exponent * _MULTIPLES.get((number["multiple"] or "").lower(), 1)
    return -size if number["sign"] == "-" else size


def unit(words: list[str]) -> str:
    """Returns the unit at the start of the words after a number; "" for no words."""
    word = words[0] if words else ""
    return word if len(word) == 1 else word.lower()


def _is_unit_tail(tail: str) -> bool:
    """Returns whether the text after a number is empty, or begins with a unit."""
    if tail[:1] == "^" or tail.startswith(("²", "³")):
        return False
    text = _POWER.sub("", tail.replace("\\cdot ", "."))
    words = LETTERS.findall(text)
    if not _UNIT_TAIL.fullmatch(text) or not {"and", "or", "than"}.isdisjoint(words):
        return False
    if words and words[0] == "times":
        return len(words) == 1
    if not words or text[0] == " ":
        return not words or is_unit(words[0])
    return len(words[0]) > 1 and is_attached_unit(words[0])


def is_unit(word: str) -> bool:
    """Returns whether a word after a number and a space may be its unit."""
    lower = word.lower()
    if len(word) < 3:
        return word in _UNIT_LETTERS or lower in _SHORT_UNITS
    return lower not in _OPERATORS


def is_attached_unit(word: str) -> bool:
    """Returns whether letters directly after a number are its unit, not a factor as in 2x."""
    return word in _UNIT_LETTERS or word.lower() in _SHORT_UNITS or len(word) >= 5
