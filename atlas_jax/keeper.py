"""A keeper process: no process that its command starts outlives the command or the keeper's parent.

    python keeper.py DIRECTORY COMMAND [ARGUMENT …]

vLLM starts an engine, which starts workers. When one of them is killed, the others keep their GPU.
A keeper runs between `serve` and vLLM. It ends vLLM when its own standard input ends, which the
kernel closes however `serve` dies, and kills the remaining processes when vLLM has ended. Processes
that lose their parent become children of the keeper (PR_SET_CHILD_SUBREAPER), so a process cannot
escape by starting a session. `serve` is a subreaper too, and does the same if the keeper is killed.
DIRECTORY holds the command's temporary files and is removed afterwards.

The keeper runs as a plain file, so it imports only the standard library. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import time

GRACE_SECS = 30.0
"""Seconds that the command has after SIGTERM to end by itself."""

_REST_SECS = 5.0  # from SIGTERM to SIGKILL, for processes that the command leaves
_KILL_SECS = 30.0  # for SIGKILL to take effect, which a driver call may delay
_LOOK_SECS = 0.1
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Makes descendants that lose their parent children of this process.

    Raises:
        OSError: if the kernel does not support it.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(ancestor: int) -> list[int]:
    """Returns the ids of all descendants of a process."""
    children: dict[int, list[int]] = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            # The name is in parentheses and may hold any character; the parent's id is the second
            # field after it.
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [ancestor]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def listens(ancestor: int, port: int) -> bool:
    """Returns whether a descendant of a process listens on a TCP port."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        path = pathlib.Path("/proc/net", table)
        lines = path.read_text().splitlines() if path.exists() else []  # absent without IPv6
        for line in lines[1:]:
            _, local, _, state, *more = line.split()
            if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{more[5]}]")
    inodes = set()
    for pid in descendants(ancestor):
        with contextlib.suppress(OSError):
            inodes |= {os.readlink(path) for path in pathlib.Path(f"/proc/{pid}/fd").iterdir()}
    return bool(sockets & inodes)


def end_descendants() -> None:
    """Ends all descendants of this process: SIGTERM first, SIGKILL after some seconds.

    Python's resource trackers are killed last. They free the shared memory of killed processes,
    and end by themselves after all of those have ended.
    """
    _signal(signal.SIGTERM, _REST_SECS)
    _signal(signal.SIGKILL, _KILL_SECS)
    _signal(signal.SIGKILL, _KILL_SECS, with_trackers=True)


def clear(directory: str) -> None:
    """Removes vLLM's temporary files, and the shared memory that is named after one of them.

    vLLM does not remove its sockets, the file with which its workers find each other, and on CPUs
    the shared memory of their sums.
    """
    for path in pathlib.Path(directory).glob("vllm_dist_*"):
        for memory in pathlib.Path("/dev/shm").glob(f"{path.name}-*"):
            memory.unlink(missing_ok=True)
    # Last, because the names above are found in it.
    shutil.rmtree(directory, ignore_errors=True)


def _signal(number: int, secs: float, with_trackers: bool = False) -> None:
    """Sends the descendants a signal, and waits until all have ended or the time is over."""
    limit = time.monotonic() + secs
    told: set[int] = set()
    # Listed anew in every round, since a process that is ending may still start others.
    while (left := _alive()) and time.monotonic() < limit:
        for pid in [p for p in left - told if with_trackers or not _is_tracker(p)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        told |= left
        time.sleep(_LOOK_SECS / 10)


def _is_tracker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return (
            b"multiprocessing.resource_tracker" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
        )
    return False


def _alive() -> set[int]:
    """Returns the living descendants, after collecting the exit codes of dead children."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return set(descendants(os.getpid()))


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def _is_wanted() -> bool:
    """Waits a moment, and returns false if the keeper's parent has ended or asks for the end."""
    ready, _, _ = select.select([sys.stdin], [], [], _LOOK_SECS)
    return not ready or bool(os.read(sys.stdin.fileno(), 1))


def main(directory: str, command: list[str]) -> int:
    """Runs the command to its end and returns its exit code, negative for a signal.

    Args:
        directory: an empty directory for temporary files.
        command: the command line.
    """
    adopt_orphans()
    child = subprocess.Popen(
        command,
        env=os.environ | {"TMPDIR": directory},
        stdin=subprocess.DEVNULL,
        # If the keeper itself is killed, the kernel sends at least vLLM's front end this signal.
        preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
    )
    # The end of our standard input is the only sign of the parent's death that the kernel
    # guarantees.
    while child.poll() is None and _is_wanted():
        pass
    if child.poll() is None:
        # vLLM frees its shared memory and its sockets only if it may end by itself.
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECS)
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_KILL_SECS)
    # vLLM's workers survive the front end, with their GPU memory.
    end_descendants()
    clear(directory)
    return -signal.SIGKILL if child.returncode is None else child.returncode


if __name__ == "__main__":
    code = main(sys.argv[1], sys.argv[2:])
    sys.exit(code if code >= 0 else 128 - code)
