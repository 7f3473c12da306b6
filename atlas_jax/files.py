"""Atomic writing of files and directories: an interruption leaves them whole or absent.

Content is written under a unique name beside the target, flushed to the disk, and renamed. Several
processes may therefore write the same target; the last one wins.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator
from typing import IO

from absl import logging

_WORK = "atlas_jax_partial"
_LOCK = "lock"


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file and its folder; a kill or power cut leaves the old content or the new."""
    with replace_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replace_atomically(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields the path of a file to write, which becomes `path` if no error is raised.

    A link is followed, and its target replaced. After an error the old file is kept and the new one
    removed.
    """
    target = resolved(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{_unique()}.partial")
    try:
        yield partial
        _sync(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_directory(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields an empty directory to fill, which becomes `path` if no error is raised.

    A directory cannot be renamed onto another one, so the old one is moved aside first. A kill
    between the two renames leaves `path` absent; `recover` undoes that.

    Raises:
        OSError: if something cannot be written or renamed; the old directory is then kept.
    """
    target = resolved(path)
    recover(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    work, lock = _work_directory(target)
    try:
        with lock:
            yield from _replace(target, work)
    finally:
        with contextlib.suppress(OSError):  # not empty if it could not be cleared
            work.rmdir()


def _work_directory(target: pathlib.Path) -> tuple[pathlib.Path, IO[str]]:
    """Returns a new directory beside `target`, and its lock file, which is locked while open.

    Before the lock is held, `recover` of another process takes the directory for a left-over and
    may remove it. Another one is then made.
    """
    while True:
        work = target.with_name(f".{target.name}.{_unique()}.{_WORK}")
        work.mkdir()
        try:
            lock = (work / _LOCK).open("w")
        except FileNotFoundError:
            continue
        except OSError:
            work.rmdir()
            raise
        if _try_lock(lock.fileno()) and (work / _LOCK).exists():
            return work, lock
        lock.close()


def _replace(target: pathlib.Path, work: pathlib.Path) -> Iterator[pathlib.Path]:
    new = work / "new"
    try:
        new.mkdir()
        yield new
        _sync_tree(new)
        if target.exists():
            target.rename(work / "old")
        new.rename(target)
        _sync(target.parent)
    finally:
        _clear(work, target)


def recover(path: str | os.PathLike[str]) -> None:
    """Restores or removes the left-overs of a killed `replace_directory(path)`.

    The old directory gets its name back. Directories of running processes are not touched.
    """
    target = resolved(path)
    pattern = re.compile(rf"\.{re.escape(target.name)}\.\d+-[0-9a-f]{{8}}\.{_WORK}")
    if not target.parent.is_dir():
        return
    for work in sorted(p for p in target.parent.iterdir() if pattern.fullmatch(p.name)):
        with contextlib.suppress(FileNotFoundError), (work / _LOCK).open("r+") as lock:
            if _try_lock(lock.fileno()):
                _clear(work, target)
        with contextlib.suppress(OSError):  # not empty while its process lives
            work.rmdir()


def link_or_copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Makes `target` a hard link to `source`, or a copy on a file system without hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def resolved(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the absolute path with all links followed; the path need not exist."""
    return pathlib.Path(os.path.realpath(path))


def _unique() -> str:
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def _try_lock(descriptor: int) -> bool:
    """Locks an open file for this process; returns false if another process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # without locks on this file system, left-overs would otherwise stay forever
    return True


def _clear(work: pathlib.Path, target: pathlib.Path) -> None:
    """Restores or removes the content of an ended replacement, and then its lock file."""
    old = work / "old"
    new = work / "new"
    if old.exists() and new.exists():  # ended between the two renames
        if target.exists():
            logging.warning("%s is the former %s, whose name is taken; left there", old, target)
            return
        old.rename(target)
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    if not old.exists() and not new.exists():
        (work / _LOCK).unlink(missing_ok=True)


def _sync_tree(directory: pathlib.Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            path = pathlib.Path(folder, name)
            if path.is_file() and not path.is_symlink():
                _sync(path)
        _sync(pathlib.Path(folder))


def _sync(path: pathlib.Path) -> None:
    """Flushes a file or directory to the disk; some file systems cannot flush directories."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
