"""What the commands share: a user's error is one line, without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from absl import flags

from atlas_jax.types import DependencyError


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; a key that the config lacks is answered with the nearest that it has."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(f"error: {str(error).strip(chr(39))}")


def guarded(command: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Returns `command` with errors of the user as the exit message."""

    def main(argv: list[str]) -> None:
        try:
            command(argv)
        except (ValueError, OSError, DependencyError) as error:
            if os.environ.get("ATLAS_TRACEBACK"):
                raise
            sys.exit(f"error: {error}\n(ATLAS_TRACEBACK=1 shows where)")

    return main
