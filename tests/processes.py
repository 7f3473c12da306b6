"""Several processes as one run, on this machine; logs go to files, and nothing is left behind."""

from __future__ import annotations

import contextlib
import pathlib
import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence


def xla_flags(devices: int) -> str:
    """Returns XLA_FLAGS for so many CPU devices.

    Compiling takes most of the time of tests, and LLVM's optimizations a third of that; the runs of
    `e2e/test_sft.py` have them.
    """
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"


def succeeded(args: Sequence[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a command that must end well, and returns what it said."""
    result = subprocess.run(args, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def free_port(count: int = 1) -> int:
    """Returns the first of `count` ports in a row that nobody uses.

    They are below those that the system gives to connections, which could take one before the
    program that is to listen there has started.
    """
    while True:
        first = random.SystemRandom().randrange(20_000, 32_000)  # tests run in several processes
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("", port))
            return first


def address_flags(num_processes: int, host: str = "127.0.0.1") -> list[list[str]]:
    """Returns what joins each process to the run."""
    where = f"--coordinator={host}:{free_port()}"
    return [
        [where, f"--num_processes={num_processes}", f"--process_id={i}"]
        for i in range(num_processes)
    ]


class Run:
    """The processes of a run; the log of process i is `logs/i.log`."""

    def __init__(self, commands: Sequence[dict], logs: pathlib.Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"{i}.log" for i in range(len(commands))]
        self.processes = []
        for command, log in zip(commands, self.logs, strict=True):
            with log.open("w") as file:
                self.processes.append(subprocess.Popen(**command, stdout=file, stderr=file))

    def wait(self, secs: float = 300) -> list[int]:
        """Returns the exit codes."""
        limit = time.monotonic() + secs
        return [process.wait(max(limit - time.monotonic(), 0.1)) for process in self.processes]

    def text(self, process: int) -> str:
        """Returns what a process wrote so far."""
        return self.logs[process].read_text()

    def wait_until(self, reached: Callable[[], bool], secs: float = 300) -> None:
        """Waits for a state of the run, which must not end before."""
        limit = time.monotonic() + secs
        while not reached():
            assert all(p.poll() is None for p in self.processes), self.text(0)[-3000:]
            assert time.monotonic() < limit, self.text(0)[-3000:]
            time.sleep(0.05)


@contextlib.contextmanager
def started(commands: Sequence[dict], logs: pathlib.Path) -> Iterator[Run]:
    """Starts the processes, and kills what is left of them in the end."""
    run = Run(commands, logs)
    try:
        yield run
    finally:
        for process in run.processes:
            process.kill()
            process.wait()


def finish(commands: Sequence[dict], logs: pathlib.Path) -> Run:
    """Runs the processes to their end, which must be a good one."""
    with started(commands, logs) as run:
        codes = run.wait()
        assert not any(codes), (codes, *(run.text(i)[-3000:] for i in range(len(codes))))
    return run
