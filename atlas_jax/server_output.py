"""Copy of vLLM's output to this program's, with the reason of a failed start in one line."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import sys
import threading
from typing import IO


class ServerOutput(threading.Thread):
    """Thread that copies vLLM's output.

    Lines from the first error on are held back until the server is healthy. If it never is, they
    are not printed, because the last error states the reason in one line. ATLAS_TRACEBACK=1 prints
    everything.
    """

    _TROUBLE = re.compile(rb"\bERROR\b|^Traceback|^usage:")
    _ERROR = re.compile(
        r"(?:\(\w+ pid=\d+\) )?(?:ERROR [^]]*\] )?\s*"
        r"((?:[\w.]+(?:Error|Exception|Interrupt)|\S+: error): .+|Value error, .+)"
    )
    _EMPTY = ("Engine core initialization failed", "validation error for")
    """Texts of lines that report an error without its reason."""

    def __init__(self, pipe: IO[bytes]) -> None:
        """Starts the thread."""
        super().__init__(daemon=True)
        self._pipe = pipe
        self._held: collections.deque[bytes] = collections.deque(maxlen=10_000)
        self._holds = not os.environ.get("ATLAS_TRACEBACK")
        self._lock = threading.Lock()
        self.error = ""
        """The last error in vLLM's output."""
        self.start()

    def run(self) -> None:
        """Copies until vLLM has closed its output."""
        for line in self._pipe:
            match = self._ERROR.match(line.decode(errors="replace").rstrip())
            if match and not any(text in match[1] for text in self._EMPTY):
                self.error = match[1].removeprefix("Value error, ").partition(" [type=")[0]
            with self._lock:
                if self._holds and (self._held or self._TROUBLE.search(line)):
                    self._held.append(line)
                else:
                    self._write(line)

    def release(self) -> None:
        """Prints the lines held back, and holds back no more."""
        with self._lock:
            self._holds = False
            while self._held:
                self._write(self._held.popleft())

    def _write(self, line: bytes) -> None:
        # If nobody reads our output any more, lines are dropped. vLLM must go on, and would block
        # on a full pipe.
        with contextlib.suppress(OSError):
            os.write(sys.stdout.fileno(), line)
