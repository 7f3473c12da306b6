"""Numbers in words: in English, and for a given number in other languages."""

from __future__ import annotations

import functools
import re

from num2words import num2words

from atlas_jax.rewards import spoken

_QUARTERS = {"quarters": 4}
_LANGUAGES = ("es", "fr", "de", "it", "pt", "nl", "sv", "pl", "ru", "tr", "id", "ja", "ko")
_SHARE = re.compile(r"\b(\d{1,9})[ -]((?:halve|[a-z]{2,10}th|third|quarter)s)\b", re.IGNORECASE)
_MIN_LETTERS = 5  # of a word in another alphabet's language; shorter ones are English words too
_MAX_FOREIGN = 10**6


def to_digits(text: str) -> str:
    """Returns a text with its English number words as digits: "Sixty-one" -> "61".

    Fractions are converted too: "five eighths" -> "5/8".
    """
    return _SHARE.sub(_as_fraction, spoken.in_digits(text))


def _as_fraction(match: re.Match[str]) -> str:
    bottom = _QUARTERS.get(match[2].lower()) or spoken.denominator(match[2])
    return f"{match[1]}/{bottom}" if bottom else match[0]


@functools.cache
def ordinal(number: int) -> str:
    """Returns "first" for 1, "twenty-second" for 22."""
    return str(num2words(number, to="ordinal"))


@functools.lru_cache(maxsize=4096)
def in_other_languages(number: int) -> frozenset[str]:
    """Returns a number's words in other languages, in lower case, without English words.

    Short words are left out, because they have other meanings in several languages.
    """
    if not 0 <= number < _MAX_FOREIGN:
        return frozenset()
    words = {str(num2words(number, lang=language)).lower() for language in _LANGUAGES}
    return frozenset(w for w in words if len(w) >= (_MIN_LETTERS if w[0] < "\u2e80" else 2))
