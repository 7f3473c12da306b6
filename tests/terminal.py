"""A terminal with a shell in it, in which a test types."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Iterator, Mapping

CTRL_C = "\x03"
_PROMPT = "shell-of-a-test> "
_SECS = 600  # that a test waits at most


class Terminal:
    """An interactive bash whose controlling terminal is ours.

    What is typed passes the terminal's line discipline: Ctrl-C is SIGINT to the whole foreground
    group, a pipeline is a group of its own, and the end of the terminal is SIGHUP.
    """

    def __init__(
        self, folder: pathlib.Path, environment: Mapping[str, str], columns: int, kind: str
    ) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self._text = b""
        self._prompts = 0
        self._closed = threading.Event()
        self.shell = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "-i"],
            stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder,
            env=dict(environment) | {"PS1": _PROMPT, "TERM": kind},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.wait_for(_PROMPT)

    def _read(self) -> None:
        while not self._closed.is_set():
            if select.select([self._ours], [], [], 0.05)[0]:
                try:
                    self._text += os.read(self._ours, 65536)
                except OSError:  # the shell has ended
                    break
        os.close(self._ours)

    @property
    def text(self) -> str:
        """What the terminal shows."""
        return self._text.decode(errors="replace").replace("\r\n", "\n")

    @property
    def raw(self) -> str:
        """What the terminal gets, with the codes that move its cursor."""
        return self._text.decode(errors="replace")

    def type(self, keys: str) -> None:
        """Types."""
        self._prompts = self.text.count(_PROMPT)
        os.write(self._ours, keys.encode())

    def code(self, secs: float = _SECS) -> int:
        """Waits for the end of the last command, and returns the exit code of its first program."""
        limit = time.monotonic() + secs
        while self.text.count(_PROMPT) <= self._prompts:
            assert time.monotonic() < limit, self.text[-4000:]
            time.sleep(0.05)
        self.type("echo code=${PIPESTATUS[0]}\n")
        return int(self.wait_for(r"[\r\n]code=(\d+)").group(1))

    def wait_for(self, pattern: str, secs: float = _SECS) -> re.Match[str]:
        """Waits until the terminal shows what matches, and returns the match."""
        limit = time.monotonic() + secs
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < limit, self.text[-4000:]
            time.sleep(0.05)
        return found

    def close(self) -> None:
        """Ends the terminal, as closing its window does."""
        self._closed.set()
        self._reader.join()


_CODE = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])")


def screen(raw: str) -> list[str]:
    """Returns the lines that people see in the end, of a text with codes that move the cursor."""
    lines = [""]
    row = column = place = 0
    while place < len(raw):
        if code := _CODE.match(raw, place):
            place = code.end()
            if code[2] == "A":
                row = max(row - int(code[1] or 1), 0)
            elif code[2] == "K":
                lines[row] = "" if code[1] == "2" else lines[row][:column]
            continue
        character = raw[place]
        place += 1
        if character == "\r":
            column = 0
        elif character == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + character + line[column + 1 :]
            column += 1
    return lines


@contextlib.contextmanager
def opened(
    folder: pathlib.Path, environment: Mapping[str, str], columns: int = 80, kind: str = "dumb"
) -> Iterator[Terminal]:
    """Yields a terminal, and ends what is left in it; a dumb one has no codes in its text."""
    terminal = Terminal(folder, environment, columns, kind)
    try:
        yield terminal
    finally:
        terminal.close()
        try:
            terminal.shell.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(terminal.shell.pid, signal.SIGKILL)
