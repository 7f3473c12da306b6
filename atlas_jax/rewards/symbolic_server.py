"""Process that runs math-verify: it reads a pair of expressions and writes a verdict, line by line.

Each check runs in a process of a pool, which is killed if it takes too long: some answers, such as
9^{9^{9^9}}, would take for ever. The library's own time limits are alarm signals, which work in the
main thread only. This process imports the library once. The pool's processes are its forks, so a
killed one is replaced at once. The process ends with its input, even if the run is killed.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import sys

import math_verify
import pebble

LIMIT_SECS = 2.0  # of one check
_MAX_BYTES = 4 << 30  # address space of a process


def main() -> None:
    """Answers pairs until the input ends."""
    logging.disable()  # the library warns that its time limits are off
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    pool = pebble.ProcessPool(max_workers=1, context=multiprocessing.get_context("fork"))
    # A fork inherits the state of stream locks, so no stream may be used by two threads. This
    # thread alone reads the input, and it writes without a stream.
    source = sys.stdin
    sys.stdin = None
    os.write(1, b"ready\n")
    for line in source:
        future = pool.schedule(_verify, args=json.loads(line), timeout=LIMIT_SECS)
        error = future.exception()  # waits
        os.write(1, f"{type(error).__name__ if error else future.result()}\n".encode())
    pool.stop()
    pool.join()


def _verify(answer: str, truth: str) -> bool:
    """Returns whether two LaTeX expressions are equal, with the errors of the library."""
    config = [math_verify.LatexExtractionConfig()]
    gold, given = (
        math_verify.parse(f"${side}$", config, parsing_timeout=None, raise_on_error=True)
        for side in (truth, answer)
    )
    return bool(math_verify.verify(gold, given, timeout_seconds=None, raise_on_error=True))


if __name__ == "__main__":
    main()
