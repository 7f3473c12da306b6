r"""Visible form of texts, and the plain form in which they are searched.

Judges see the `visible` form, and students' texts are searched in it. The `plain` form undoes
spellings that hide a word or a number from a search but not from a reader:

    visible("6\u200b0")  ->  "60"
    plain("Jud\u0121\u0435: $6{}0$ &#56;\u2463")  ->  "Judge: 60 84"
"""

from __future__ import annotations

import functools
import html
import re
import unicodedata

from confusable_homoglyphs import confusables

_UNSEEN = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f"  # control characters but tab and line breaks
    "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\uffa0"  # joiners and fillers
    "\ufe00-\ufe0f\U000e0000-\U000e0fff"  # variation selectors and tags
    "]"
)
_TAGS = re.compile("[\U000e0020-\U000e007e]+")  # invisible copies of ASCII
_LINES = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹⁻]+")
_SIGNS = str.maketrans(
    {
        "−": "-", "‐": "-", "‑": "-", "–": "-", "—": "-", "⁄": "/", "∕": "/", "÷": "/", "×": "*",
        "·": "*", "⋅": "*", "∙": "*", "✕": "*", "✖": "*", "➕": "+", "➖": "-", "➗": "/", "≈": "=",
        "≡": "=", "’": "'", "‘": "'", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "：": ":",
        "＝": "=",
    }
)  # fmt: skip
_LATEX: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\\[dtc]?frac ?\{([^{}\n]{1,40})\} ?\{([^{}\n]{1,40})\}"), r" \1/\2 "),
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\[,;:! ]"), ""),
    (re.compile(r"\\(?:[()\[\]]|q?quad(?![A-Za-z]))"), " "),
    (re.compile(r"\\(?:text|math|operatorname|boxed|fbox|mbox|left|right)[a-z]{0,6} ?"), ""),
    (re.compile(r"[${}`~]|\*\*|__|\\(?=[$%&#_{}])"), ""),
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
)


def visible(text: str) -> str:
    """Returns a text without invisible characters, with line feeds as line ends."""
    text = _LINES.sub("\n", text)
    if text.isascii():
        return _UNSEEN.sub("", text)
    return "".join(c for c in _UNSEEN.sub("", text) if unicodedata.category(c) != "Cf")


def latin(text: str) -> str:
    """Returns a text with look-alikes replaced by Latin letters and digits, without accents."""
    if text.isascii():
        return text
    text = _SUPERSCRIPT.sub(lambda match: "^" + match[0], text)
    text = unicodedata.normalize("NFKD", text)
    text = "".join(_digit(c) for c in text if unicodedata.category(c) not in ("Mn", "Me"))
    return unicodedata.normalize("NFC", text.translate(_lookalikes()))


def plain(text: str) -> str:
    """Returns a text for searching: in Latin characters, without markup, with tags decoded."""
    text = _TAGS.sub(lambda match: " " + "".join(chr(ord(c) & 0x7F) for c in match[0]), text)
    text = html.unescape(visible(text)).translate(_SIGNS)
    text = latin(text).translate(_SIGNS)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def _digit(character: str) -> str:
    """Returns the Latin digit for a digit in any script; another character is unchanged."""
    value = None if character.isascii() else unicodedata.digit(character, None)
    return character if value is None else str(value)


@functools.cache
def _lookalikes() -> dict[int, str]:
    """Returns the Latin letter or digit for each look-alike.

    Reference: the confusables of Unicode Technical Standard 39.
    """
    replacements = {}
    for character, others in confusables.confusables_data.items():
        if len(character) == 1 and not character.isascii():
            same = [o["c"] for o in others if len(o["c"]) == 1 and o["c"].isascii()]
            if named := next((c for c in same if c.isalnum()), None):
                replacements[ord(character)] = named
    return replacements
