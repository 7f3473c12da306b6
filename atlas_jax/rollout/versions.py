"""Directory of exported weights for the servers, with one subdirectory for each version.

Only subdirectories with this run's mark are replaced or removed. Other files in the directory, and
the versions of another run, are kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
import shutil
import stat
import sys
from typing import IO

from absl import logging

from atlas_jax.checkpoint import hf
from atlas_jax.files import link_or_copy

MARK = ".atlas_jax_weights"
"""Name of the mark, a file in each version with the `output_dir` of the run that wrote it."""

_VERSION = re.compile(r"v\d+\.\d+|\.v\d+\.\d+\.partial")
_FILES = ".atlas_jax_files"
_OWNER = ".owner"  # locked by the process that owns the weights while it lives
_MEMORY = pathlib.Path("/dev/shm")
_CGROUP = pathlib.Path("/sys/fs/cgroup")
_ROOM = 1.2  # free space in sizes of a version; the last one is removed before the next is written


class Versions:
    """The versions of one run's weights in one directory."""

    def __init__(self, root: pathlib.Path, run: str, lock: IO[str] | None = None) -> None:
        """Names the directories, which `begin` makes.

        Args:
            root: the directory of the versions.
            run: the run's `output_dir`.
            lock: the lock file that shows other runs that this one lives; `close` closes it.
        """
        self.root = root
        self._run = run
        self._lock = lock
        self._has_files = False
        # The name includes the run, since another run may have the same root.
        self._files = root / f"{_FILES}-{_name(run)}"

    def path(self, label: str) -> pathlib.Path:
        """Returns the directory of a version."""
        return self.root / f"v{label}"

    def partial(self, label: str) -> pathlib.Path:
        """Returns the directory in which a version is written before it gets its name."""
        return self.root / f".v{label}.partial"

    def begin(self, label: str, files: hf.ModelFiles | None) -> None:
        """Makes the directory in which a version is written, with all files but the weights.

        Args:
            label: the label of the version.
            files: the files of the model; None for an adapter, which needs none of them.

        Raises:
            OSError: if that fails, or would replace files that this run did not write.
        """
        # An interrupted run may have left the same label.
        for path in (self.path(label), self.partial(label)):
            if path.exists() and not self._is_own(path):
                raise FileExistsError(
                    f"{path} exists and is not of this run; name another rollout.sync_dir"
                )
            shutil.rmtree(path, ignore_errors=True)
        shared = self._shared_files(files) if files else None
        self._make(self.partial(label))
        if shared is None:
            return
        # A tokenizer may take longer to write than the weights, so it is written once and linked.
        shutil.copytree(
            shared,
            self.partial(label),
            ignore=shutil.ignore_patterns(MARK),
            copy_function=link_or_copy,
            dirs_exist_ok=True,
        )

    def finish(self, label: str) -> None:
        """Gives a complete version its name."""
        self.partial(label).rename(self.path(label))

    def remove_all(self, keep: str = "") -> None:
        """Removes the versions of this run.

        Args:
            keep: the label of a version that is kept, or "".
        """
        paths = list(self.root.iterdir()) if self.root.is_dir() else []
        for path in paths:
            kept = keep and path == self.path(keep)
            if _VERSION.fullmatch(path.name) and not kept and self._is_own(path):
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Removes all files that this run wrote, and the directory if it is then empty."""
        self.remove_all()
        if self._has_files:
            shutil.rmtree(self._files, ignore_errors=True)
        if self._lock:
            # A directory with a lock is in memory and this run's alone.
            shutil.rmtree(self.root, ignore_errors=True)
            self._lock.close()
        with contextlib.suppress(OSError):  # absent, or not empty
            self.root.rmdir()

    def _make(self, path: pathlib.Path) -> None:
        path.mkdir(parents=True)
        (path / MARK).write_text(self._run)

    def _is_own(self, path: pathlib.Path) -> bool:
        mark = path / MARK
        with contextlib.suppress(OSError):
            return not path.is_symlink() and mark.read_text() == self._run
        return False

    def _shared_files(self, files: hf.ModelFiles) -> pathlib.Path:
        """Returns a directory with the files that all versions share, written once in this run."""
        shared = self._files
        if not self._has_files:
            partial = shared.with_name(f"{shared.name}.partial")
            for path in (shared, partial):
                shutil.rmtree(path, ignore_errors=True)
            self._make(partial)
            hf.write_files(str(partial), files)
            partial.rename(shared)
            self._has_files = True
        return shared


def in_memory(run: str, num_bytes: int) -> Versions | None:
    """Returns versions in `/dev/shm` for one run, after removing those of killed runs.

    Args:
        run: the run's `output_dir`.
        num_bytes: the size of a version.

    Returns:
        The versions, or None if memory cannot be used; the reason is logged.
    """
    # Left-overs of killed runs take the memory that this one needs.
    _sweep()
    root = _MEMORY / f"{_prefix()}{_name(run)}"
    free = _free_bytes()
    needed = int(_ROOM * num_bytes)
    if free < needed:
        why = f"it has {free >> 20} MiB of {needed >> 20} MiB that a version needs"
    elif why := _not_private(root):
        pass
    elif (lock := _lock(root)) is None:
        why = f"another process that lives uses {root}"
    else:
        return Versions(root, run, lock)
    logging.warning("weights do not go through %s: %s", _MEMORY, why)
    return None


def _name(run: str) -> str:
    return hashlib.sha256(run.encode()).hexdigest()[:12]


def _prefix() -> str:
    return f"atlas_jax-{os.getuid()}-"


def _free_bytes() -> int:
    """Returns the bytes that `/dev/shm` can take, by its own limit and by the free memory."""
    try:
        free = shutil.disk_usage(_MEMORY).free
        with open("/proc/meminfo") as lines:
            sizes = dict(line.split(":") for line in lines)
        return min(free, int(sizes["MemAvailable"].split()[0]) << 10, _free_in_container())
    except (OSError, KeyError):
        return 0


def _free_in_container() -> int:
    """Returns the bytes of memory that the control group of this process has left."""
    most = _CGROUP / "memory.max"
    used = _CGROUP / "memory.current"
    try:
        return int(most.read_text()) - int(used.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return sys.maxsize


def _not_private(root: pathlib.Path) -> str:
    """Makes a directory that only this user can read; returns the reason of a failure, or "".

    Its name can be guessed, so another user may have made it, or a link of that name, before.
    """
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        status = root.lstat()
    except OSError as error:
        return str(error)
    if not stat.S_ISDIR(status.st_mode):
        return f"{root} is not a directory"
    if status.st_uid != os.getuid():
        return f"{root} belongs to user {status.st_uid}"
    if stat.S_IMODE(status.st_mode) & 0o077:
        return f"{root} is open to other users (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


def _lock(root: pathlib.Path) -> IO[str] | None:
    """Returns the locked owner file of a directory; None if another process holds it.

    The kernel releases the lock when its process ends, however it ends.
    """
    try:
        file = (root / _OWNER).open("a")
    except OSError:  # another process has just removed it
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Without a link the directory was removed between opening and locking, and the lock would
        # protect nothing.
        if os.fstat(file.fileno()).st_nlink:
            return file
    except OSError:
        pass
    file.close()
    return None


def _sweep() -> None:
    """Removes the directories in `/dev/shm` of processes that were killed."""
    for root in _MEMORY.glob(f"{_prefix()}*"):
        if root.is_symlink() or not root.is_dir() or root.lstat().st_uid != os.getuid():
            continue
        lock = _lock(root)
        if lock is not None:
            logging.info("removing %s, which a run that was killed has left", root)
            shutil.rmtree(root, ignore_errors=True)
            lock.close()
