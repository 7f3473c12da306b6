"""The process that asks math-verify: pairs of expressions come in, verdicts go out, a line each.

Each check runs in a process of a pool that is killed when it takes too long: some answers, such as
9^{9^{9^9}}, would stall it for ever, and its own time limits are alarm signals, which work in no
other thread than the first. This process imports the library once and does nothing else; those of
the pool are its forks, so that a new one is there at once when one was killed. It ends with its
input, also when the run is killed.
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
_MAX_BYTES = 4 << 30  # of address space of a process


def main() -> None:
    """Answers until the input ends."""
    logging.disable()  # the library warns that its time limits are off
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    pool = pebble.ProcessPool(max_workers=1, context=multiprocessing.get_context("fork"))
    # A fork inherits the locks of streams as they are, so that none may be used by two: this thread
    # keeps the input for itself, and writes without a stream.
    source, sys.stdin = sys.stdin, None
    os.write(1, b"ready\n")
    for line in source:
        future = pool.schedule(_verify, args=json.loads(line), timeout=LIMIT_SECS)
        error = future.exception()  # waits
        os.write(1, f"{type(error).__name__ if error else future.result()}\n".encode())
    pool.stop()
    pool.join()


def _verify(answer: str, truth: str) -> bool:
    """Returns whether two expressions in LaTeX are equal; raises whatever the library does."""
    config = [math_verify.LatexExtractionConfig()]
    gold, given = (
        math_verify.parse(f"${side}$", config, parsing_timeout=None, raise_on_error=True)
        for side in (truth, answer)
    )
    return bool(math_verify.verify(gold, given, timeout_seconds=None, raise_on_error=True))


if __name__ == "__main__":
    main()
