"""Standard output and error that survive the end of their reader.

Ctrl-C in `launch.sh … | tee log` ends `tee` while it signals the run, and closing a terminal
removes the run's output. The next line that is written must not end the run, which is about to
save its state.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def survive() -> None:
    """Makes this process survive the end of the readers of its standard output and error."""
    sys.stdout = _Surviving(sys.stdout)
    sys.stderr = _Surviving(sys.stderr)


class _Surviving:
    """A text stream that switches to the null device when its reader has ended."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text."""
        try:
            return self._stream.write(text)
        except OSError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        """Flushes the buffer."""
        try:
            self._stream.flush()
        except OSError:
            self._leave()

    def _leave(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
