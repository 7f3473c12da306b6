"""Standard output and error whose reader may go away.

Ctrl-C in `launch.sh … | tee log` ends `tee` together with its signal to the run, and closing a
terminal takes it from under the run. The next line that is written must not end the run, which is
about to save its state.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def survive() -> None:
    """Lets this process go on where nobody reads its standard output or error any more."""
    sys.stdout = _Surviving(sys.stdout)
    sys.stderr = _Surviving(sys.stderr)


class _Surviving:
    """A text stream that leads to the null device once its reader is gone."""

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
        """Writes what is buffered."""
        try:
            self._stream.flush()
        except OSError:
            self._leave()

    def _leave(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
