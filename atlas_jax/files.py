"""Files that are whole or not there."""

from __future__ import annotations

import os
import pathlib


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file, its folder too; a kill leaves the old content or the new one."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)
