r"""Conversion of LaTeX, Unicode and marked-up text to plain characters.

    "**$\dfrac{6}{4}$** cups."  -- clean -->  "\dfrac{6}{4} cups"  -- plain -->  "6/4 cups"

`latex` is the step between: one way to write each character, with the commands left in place. Every
function takes time linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

EDGE = " \t\r\n*_`\"'“”‘’$:"
TAIL = EDGE + ".,;!?"

_MATH = re.compile(
    r"(?<!\\)\\[()\[\]]|\\(?:left|right|displaystyle|textstyle|[Bb]igg?[lr]?)(?![A-Za-z])"
)
_DOLLARS = re.compile(r"(?<!\\)\$((?:[^$\\]|\\.)++)\$")
_BOLD = re.compile(r"(?<![\w)\]}])\*\*|\*\*(?![\w(])")
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox|operatorname|boxed|fbox) ?\{([^{}]*)\}"
)
_FRAC = re.compile(r"\\[dtc]?frac ?(?:\{([^{}]*)\}|(\d)) ?(?:\{([^{}]*)\}|(\d))")
_TOP = re.compile(r"-?[\w.,\\]+")
_BOTTOM = re.compile(r"-?(?:[\d.,]+|\w|[^\W\d_]+|\\[A-Za-z]+\d?)")
_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "⁄": "/", "’": "'", "‘": "'", "“": '"', "”": '"',
        "π": "\\pi ", "√": "\\sqrt ", "∞": "\\infty ", "∪": "\\cup ", "·": "\\cdot ",
        "⋅": "\\cdot ",
        "±": "\\pm ", "≤": "\\le ", "≥": "\\ge ", "≈": "\\approx ",
        "≠": "\\ne ", "∈": "\\in ", "℃": "°C", "℉": "°F",
        "µ": "μ", "∅": "\\emptyset ",
    }
)  # fmt: skip
_VULGAR = re.compile("(\\d?)([¼-¾⅐-⅞])")
_RAISED = re.compile("[⁰¹²³⁴-⁹⁺⁻]+")
_LOWERED = re.compile("[₀-₉]+")
_MATRIX = re.compile(r"\\(begin|end)\{([pbvBV]?)(?:small)?(?:matrix|array)\}(?:\{[^{}]*\})?")
_FENCED_ARRAY = re.compile(
    r"[\[(] ?(\\begin\{array\}(?:(?!\\begin|\\end)[\s\S])*+\\end\{array\}) ?[\])]"
)
_FACTOR = re.compile(r"[\d)]$|(?<![A-Za-z])[A-Za-z]$")
_ROW = re.compile(r"\\\\(?:\s*\[[^\]\n]{0,20}\])?")

Rewrite = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]


def clean(text: str) -> str:
    """Returns a text without the marks around it, except that of a factorial."""
    text = _BOLD.sub("", _MATH.sub("", text))
    return without_tail(_WRAPPED.sub(r"\1", _DOLLARS.sub(r"\1", text)).lstrip(EDGE))


def without_tail(text: str) -> str:
    """Returns a text without the marks after it, except that of a factorial."""
    bare = text.rstrip(TAIL)
    is_factorial = text.startswith("!", len(bare)) and _FACTOR.search(bare[-2:])
    return f"{bare}!" if is_factorial else bare


def latex(text: str) -> str:
    """Returns a text in one line with one spelling for each character and LaTeX space."""
    if "\\begin" in text:
        text = _rows(text)
    text = _VULGAR.sub(_vulgar, text).translate(_CHARACTERS)
    text = _RAISED.sub(lambda m: "^{" + unicodedata.normalize("NFKC", m[0]) + "}", text)
    text = _LOWERED.sub(lambda m: "_{" + unicodedata.normalize("NFKC", m[0]) + "}", text)
    return " ".join(_rewritten(text.replace("−", "-"), _SPACES).split())


def plain(text: str) -> str:
    """Returns a text in one line with LaTeX as plain characters, if there are such characters."""
    return " ".join(_rewritten(latex(text), _PLAIN).split())


def _rewritten(text: str, rewrites: tuple[Rewrite, ...]) -> str:
    for pattern, replacement in rewrites:
        text = pattern.sub(replacement, text)
    return text


def _rows(text: str) -> str:
    """Returns a text with its matrices as "[a,b;c,d]", and determinants as "|[a,b;c,d]|"."""

    def bracket(match: re.Match[str]) -> str:
        bar = "|" if match[2] in ("v", "V") else ""
        return f"{bar}[" if match[1] == "begin" else f"]{bar}"

    if not _MATRIX.search(text):
        return text
    text = _FENCED_ARRAY.sub(r"\1", text)
    text = _MATRIX.sub(bracket, _ROW.sub(";", text).replace("&", ","))
    return re.sub(r";\s*\]", "]", text)


def _vulgar(match: re.Match[str]) -> str:
    fraction = unicodedata.normalize("NFKC", match[2])
    return f"{match[1]} {fraction}" if match[1] else fraction


def _plain_fraction(match: re.Match[str]) -> str:
    parts = [(match[1] or match[2] or "").strip(), (match[3] or match[4] or "").strip()]
    known = zip(parts, (_TOP, _BOTTOM), strict=True)
    top, bottom = (part if form.fullmatch(part) else f"({part})" for part, form in known)
    mixed = match.start() and match.string[match.start() - 1].isdigit()
    return f"{' ' if mixed else ''}{top}/{bottom}"


_SPACES: tuple[Rewrite, ...] = (
    (_MATH, ""),
    (_BOLD, ""),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\varnothing(?![A-Za-z])|\\\{ ?\\\}"), r"\\emptyset "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=\d)\\,(?=\d{3})"), ""),
    (re.compile(r"\\[,;: ]|~|\\q?quad(?![A-Za-z])"), " "),
    (re.compile(r"\^ ?\{?\\(?:circ|degree)\}?"), "°"),
    (re.compile(r"\\(?:l|r|d)?vert(?![A-Za-z])"), "|"),
    (re.compile(r"\b(?:US|CA|AU|NZ|HK|[ACRS])(?:\\?\$)(?=\d)"), ""),
    (re.compile(r"(?<!\w)([\w.]{1,20}) ?\\over ?([\w.]{1,20})(?!\w)"), r"\\frac{\1}{\2}"),
    (_WRAPPED, r" \1 "),
)
_PLAIN: tuple[Rewrite, ...] = (
    (_FRAC, _plain_fraction),
    (_WRAPPED, r" \1 "),
    (re.compile(r"(?<!\\)\{(\w)\}"), r"\1"),
    (_FRAC, _plain_fraction),
    (re.compile(r"\\([$%&#_{}])"), r"\1"),
    (re.compile(r"[$€£¥₹¢%]"), ""),
    (re.compile(r"(?<=\d)(?::00)? ?([AaPp])\.? ?[Mm]\b\.?"), lambda m: f" {m[1].lower()}m"),
)
