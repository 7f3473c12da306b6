r"""Symbolic comparison of expressions by math-verify, if the extra `.[math]` is installed.

It knows more algebra than `expressions`: x(x+1) is x^2+x, and \frac{\sqrt{8}}{2} is \sqrt{2}. It is
used if our own comparison finds a difference and both sides are expressions. It runs in a process
of its own, see `symbolic_server`. An answer on which it gives up counts as wrong; such answers are
counted.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading

from absl import logging

from atlas_jax.rewards import equality
from atlas_jax.rewards.plain import clean, latex

_MAX_CHARS = 5000
_PATIENCE_SECS = 5.0  # wait beyond the time limit that the process itself keeps

_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sqrt|sin|cos|tan|log|exp)\b)[A-Za-z]{3}")
_EXPRESSION = re.compile(r"[\d\\+*/^=<>-]|^[A-Za-z]$")
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|(?<=\d)[A-Za-z]")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_BASE = re.compile(r"\d ?_")
_ARITHMETIC = re.compile(r"\\(?:times|cdot|div|[dtc]?frac)(?![A-Za-z])|[^A-Za-z\\]")


def same(answer: str, truth: str) -> bool:
    """Returns whether math-verify finds two expressions equal; false if it is not installed."""
    return is_installed() and _is_asked(answer, truth) and _verdict(answer, truth)


@functools.lru_cache(maxsize=4096)  # a step's rewards and its metrics compare the same texts
def _verdict(answer: str, truth: str) -> bool:
    return _checker().same(latex(clean(answer)), latex(clean(truth)))


def num_given_up() -> int:
    """Returns the number of checks of this process without a verdict."""
    return _checker().num_given_up


@functools.cache
def is_installed() -> bool:
    """Returns whether the extra `math` is installed, without importing it."""
    return all(map(importlib.util.find_spec, ("math_verify", "pebble")))


def _is_asked(answer: str, truth: str) -> bool:
    """Returns whether both texts are expressions that math-verify compares correctly.

    It rounds decimals, which are exact here, ignores the base of 52_8 and reads s and g as units.
    Arithmetic that is not carried out does not count as a number.
    """
    sides = [latex(clean(text)) for text in (answer, truth) if len(text) <= _MAX_CHARS]
    if len(sides) < 2 or any(_WORD.search(s) or not _EXPRESSION.search(s) for s in sides):
        return False
    if any(map(_BASE.search, sides)) or _differ_in_symbols(*sides):
        return False
    plain = [equality.is_plain_number(text) for text in (answer, truth)]
    is_arithmetic = [not _ARITHMETIC.sub("", side) for side in sides]
    return not all(is_number or bare for is_number, bare in zip(plain, is_arithmetic, strict=True))


def _differ_in_symbols(left: str, right: str) -> bool:
    """Returns whether the letters of two expressions differ, their case included."""
    letters, commands = (
        [set(pattern.findall(side)) for side in (left, right)] for pattern in (_LETTER, _COMMAND)
    )
    only = [{c.lower() for c in a - b} for a, b in (commands, commands[::-1])]
    return letters[0] != letters[1] or bool(only[0] & only[1])


@functools.cache
def _checker() -> _Checker:
    return _Checker()


def close() -> None:
    """Ends the checking process, which a later check starts again."""
    _checker().close()


class _Checker:
    """Client of the checking process, which is started on first use and after its death.

    Any thread may call it; checks run one at a time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: subprocess.Popen[str] | None = None
        self._num_asked = 0
        self.num_given_up = 0
        atexit.register(self._end)

    def same(self, answer: str, truth: str) -> bool:
        with self._lock:
            reply = self._ask(answer, truth)
            self._num_asked += 1
            if reply in ("True", "False"):
                return reply == "True"
            self.num_given_up += 1
            if self.num_given_up & (self.num_given_up - 1) == 0:  # 1, 2, 4, 8, …
                logging.warning(
                    "math-verify gave up on %d of %d answers, which count as not right; the last: "
                    "%.80r for %.80r (%s)",
                    self.num_given_up,
                    self._num_asked,
                    answer,
                    truth,
                    reply or "it died",
                )
        return False

    def _ask(self, answer: str, truth: str) -> str:
        """Returns "True", "False", or the name of an error; "" without a reply."""
        if self._server is None or self._server.poll() is not None:
            self._server = _start()
        assert self._server.stdin is not None and self._server.stdout is not None
        try:
            self._server.stdin.write(json.dumps([answer, truth]) + "\n")
            self._server.stdin.flush()
        except BrokenPipeError:
            return ""
        if select.select([self._server.stdout], [], [], _PATIENCE_SECS)[0]:
            return self._server.stdout.readline().strip()
        self._end()
        return ""

    def close(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)  # with its current check
            self._server.wait()
            self._server = None


def _start() -> subprocess.Popen[str]:
    """Starts the checking process, and waits until it has loaded the library."""
    server = subprocess.Popen(
        [sys.executable, "-m", "atlas_jax.rewards.symbolic_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C reaches the run only, which closes the pipe
    )
    assert server.stdout is not None
    server.stdout.readline()
    return server
