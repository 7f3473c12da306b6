"""The look of a command's log in a terminal, and a status line below it.

In a terminal that can move its cursor the log is short: a time, the text, and a colour for
warnings. Elsewhere, as in a file or a pipe, it is that of absl, without colours. Imports no JAX,
and `rich` only for a status line.
"""

from __future__ import annotations

import contextlib
import logging as python_logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

_COLOURS = {"WARNING": "33", "ERROR": "31", "CRITICAL": "31", "FATAL": "31"}
_VERDICTS = {"ok": "32", "near": "33", "missed": "31"}
_VERDICT = re.compile(rf"^({'|'.join(_VERDICTS)})\b", re.MULTILINE)
_REFRESHES = 2
"""Times a second that a status line is drawn."""


def is_interactive() -> bool:
    """Returns whether standard error is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb")


def has_status_line() -> bool:
    """Returns whether a status line may be shown: all that is logged there can pass above it."""
    others = {*python_logging.getLogger().handlers} - {logging.get_absl_handler()}
    return is_interactive() and all(isinstance(h, python_logging.FileHandler) for h in others)


def has_colours() -> bool:
    """Returns whether colours are wanted, see https://no-color.org."""
    return is_interactive() and not os.environ.get("NO_COLOR")


def width() -> int:
    """Returns the columns of the terminal of standard error; 0 where there is none."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 0


@contextlib.contextmanager
def opened(mode: str = "auto") -> Iterator[None]:
    """Shows the log of the block as a mode says.

    Args:
        mode: `auto`, `lines` or `quiet`, see the option `terminal`.
    """
    root = python_logging.getLogger()
    handler = logging.get_absl_handler()
    added = not root.handlers  # a program that has set up no log, unlike the commands
    if added:
        root.addHandler(handler)
    writer = handler.python_handler
    before = writer.stream, writer.formatter
    shown = _ShownLines(quiet=mode == "quiet")
    handler.addFilter(shown)
    if is_interactive():
        writer.setStream(_CurrentError())
        writer.setFormatter(_ShortFormat(has_colours()))
    try:
        yield
    finally:
        if added:
            root.removeHandler(handler)
        handler.removeFilter(shown)
        writer.setStream(before[0])
        writer.setFormatter(before[1])


def details(text: str) -> None:
    """Logs a text that stands in files alone, since a status line shows it better."""
    logging.get_absl_logger().info("%s", text, extra={"in_terminal": "never"})


def result(text: str) -> None:
    """Logs the result of a command, which `quiet` shows too."""
    logging.get_absl_logger().info("%s", text, extra={"in_terminal": "always"})


class StatusLine:
    """A line at the bottom of the terminal, drawn again twice a second; log lines pass above it."""

    def __init__(self, content: Callable[[int], str]) -> None:
        """Shows nothing yet.

        Args:
            content: a number of columns -> a text that fits them; any thread calls it.
        """
        self._content = content
        self._live: Any = None

    def __enter__(self) -> StatusLine:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        console = Console(stderr=True)

        def draw() -> Text:
            # One column stays free: some terminals wrap a line that fills the last one.
            columns = max(console.width - 1, 1)
            return Text(self._content(columns), no_wrap=True, overflow="crop", end="")

        self._live = Live(
            console=console,
            get_renderable=draw,
            refresh_per_second=_REFRESHES,
            transient=True,
            # Standard output may be a file or a pipe of its own.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._live.start()
        console.show_cursor(True)  # a process that is killed could not bring it back
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()


class _CurrentError:
    """Standard error as it is at each line: a status line takes its place to pass lines above."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


class _ShownLines(python_logging.Filter):
    def __init__(self, quiet: bool) -> None:
        super().__init__()
        self._quiet = quiet

    def filter(self, record: python_logging.LogRecord) -> bool:
        wanted = getattr(record, "in_terminal", "")
        if self._quiet:
            return wanted == "always" or record.levelno >= python_logging.WARNING
        return wanted != "never"


class _ShortFormat(python_logging.Formatter):
    def __init__(self, has_colours: bool) -> None:
        super().__init__("%(message)s")
        self._has_colours = has_colours

    def format(self, record: python_logging.LogRecord) -> str:
        text = super().format(record)
        if getattr(record, "in_terminal", "") == "always":
            text = _VERDICT.sub(lambda m: self._coloured(m[1], _VERDICTS[m[1]]), text)
        colour = _COLOURS.get(record.levelname, "")
        level = f"{self._coloured(record.levelname.lower(), colour)}: " if colour else ""
        time = self._coloured(self.formatTime(record, "%H:%M:%S"), "2")
        return f"{time} {level}{text}"

    def _coloured(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._has_colours and colour else text
