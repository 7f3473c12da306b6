"""Token of a run's vLLM servers, in a file that only its owner can read.

Servers and their clients take VLLM_API_KEY if it is set, else the token in this file. All servers
of a run share one file, which the first of them makes.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import tempfile
import time

NAME = "server_token"
"""Name of the file in the `output_dir` of a run."""

_LOOKS = 20
_LOOK_SECS = 0.1
_BYTES = 32
_MOST = 4096  # characters that are read, since the path may name a wrong file


def read(path: str | os.PathLike[str]) -> str:
    """Returns the token in a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if other users can read it, or it holds no token.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        # Of the open file, which nobody can exchange before it is read.
        status = os.fstat(file.fileno())
        text = file.read(_MOST).strip()
    if status.st_mode & 0o077 or status.st_uid not in (os.getuid(), 0):
        raise ValueError(
            f"the token file {path} has mode {status.st_mode & 0o777:03o} and owner "
            f"{status.st_uid}, so others may know the token; remove it, and a new one is made"
        )
    if not (text.isascii() and text.isprintable() and text and " " not in text):
        raise ValueError(f"the token file {path} holds no token; remove it, and a new one is made")
    return text


def read_or_make(path: str | os.PathLike[str]) -> str:
    """Returns the token in a file; a missing file is made, with a random token.

    If several processes make it at once, all return the token of the one that succeeds.

    Raises:
        ValueError: if other users can read the file, or it holds no token.
        OSError: if the file cannot be written.
    """
    target = pathlib.Path(path)
    with contextlib.suppress(FileNotFoundError):
        return _read_whole(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_urlsafe(_BYTES)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")  # mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(f"{token}\n")
        _publish(partial, target, token)
    finally:
        os.unlink(partial)
    return _read_whole(target)


def _read_whole(target: pathlib.Path) -> str:
    """Returns the token in a file, after waiting for a process that may be writing it."""
    for _ in range(_LOOKS):
        if target.stat().st_size:
            break
        time.sleep(_LOOK_SECS)
    return read(target)


def _publish(partial: str, target: pathlib.Path, token: str) -> None:
    """Makes `target` unless another process has made it."""
    try:
        os.link(partial, target)  # atomic, and fails if `target` exists
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        with (
            contextlib.suppress(FileExistsError),
            open(target, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file,
        ):
            file.write(f"{token}\n")
