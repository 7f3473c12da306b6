"""Masking of secrets in texts that people read: configs, logs, errors and records of failures.

A secret is recognised by its context: the password of a URL, a parameter or a keyword whose name
indicates a secret, an authorization header, or a token of a known form. Masking too much is
accepted, masking too little is not.
"""

from __future__ import annotations

import logging as python_logging
import re
import urllib.parse
from collections.abc import Iterator

from absl import logging

HIDDEN = "***"
"""Replacement for a secret."""

_SECRET = (
    r"(?:passw(?:or)?d|passphrase|pwd|secret|token|credentials?"
    r"|(?:api|access|private|scram_client|scram_server)[-_]?key)"
)
_NAME = re.compile(rf".*{_SECRET}", re.IGNORECASE | re.DOTALL)
_PARAMETER_NAME = re.compile(rf"key|sig|signature|auth|authorization|.*{_SECRET}", re.IGNORECASE)
_PARAMETER = re.compile(r"[?&;](?P<name>[^=&;?\s]+)=(?P<secret>[^&\s]*)")
# A superset of libpq's values: quotes, and backslashes that escape a character.
_VALUE = r"""(?:'(?:\\.|[^'\\])*'?|"(?:\\.|[^"\\])*"?|\\.|[^\s'"\\])*"""
_MOST = "{0,1000}"  # characters of a part of a URL; bounded, so that matching takes linear time
_PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        # The password may hold characters that should have been encoded, so it ends at the last
        # "@"; in a list of URLs it ends before the next one.
        rf"\w://[^\s/:]{_MOST}:(?P<secret>(?:(?!,[\w+.-]{_MOST}://)\S){_MOST})(?=@)",
        rf"postgres(?:ql)?(?:\+\w+)?://[^:\n]{_MOST}:(?P<secret>[^\n]{_MOST})(?=@)",
        rf"https?://(?P<secret>[^\s/?#]{_MOST})(?=@)",  # a user without a password may be a token
        rf"(?<![\w.%+?&;-])[\w.%+-]*?{_SECRET}\s*=\s*(?P<secret>{_VALUE})",
        rf"""['"][\w.-]*?{_SECRET}['"]\s*:\s*(?P<secret>{_VALUE})""",
        r"""authorization['"]?\s*[:=]\s*['"]?(?P<secret>(?:bearer|basic)?\s*[^\s'",}]+)""",
        r"\bbearer\s+(?P<secret>[^\s'\",}]{8,})",
        r"(?<![\w-])(?P<secret>(?:sk-|xai-|AIza|hf_|ghp_)(?=[a-z_-]*\d)[\w-]{16,})",
    )
)


def is_secret_name(name: str) -> bool:
    """Returns whether an option, a keyword or a variable of this name holds a secret."""
    return bool(_NAME.fullmatch(name))


def hide(text: str) -> str:
    """Returns the text with every secret replaced by `***`."""
    parts: list[str] = []
    end = 0
    for first, last in _merged(sorted(_spans(text))):
        parts += [text[end:first], HIDDEN]
        end = last
    return "".join(parts) + text[end:]


def mask_logs() -> None:
    """Installs the masking of all log lines; a second call changes nothing."""
    logging.get_absl_logger().addFilter(_FILTER)
    logging.get_absl_handler().addFilter(_FILTER)


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Yields the spans of secrets, which may overlap."""
    for pattern in _PATTERNS:
        for match in pattern.finditer(text):
            if match["secret"]:
                yield match.span("secret")
    for match in _PARAMETER.finditer(text):
        name, value = (urllib.parse.unquote_plus(match[part]) for part in ("name", "secret"))
        # A parameter may hold keywords of its own, such as libpq's `options`.
        if _PARAMETER_NAME.fullmatch(name) or (value != match["secret"] and hide(value) != value):
            yield match.span("secret")


def _merged(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yields the union of sorted spans; replacing overlapping ones singly would leave fragments."""
    current: tuple[int, int] | None = None
    for first, last in spans:
        if current is None or first > current[1]:
            if current is not None:
                yield current
            current = first, last
        else:
            current = current[0], max(current[1], last)
    if current is not None:
        yield current


class _Filter(python_logging.Filter):
    def filter(self, record: python_logging.LogRecord) -> bool:
        record.msg = hide(record.getMessage())
        record.args = None
        return True


_FILTER = _Filter()
