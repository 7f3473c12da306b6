"""One random fault in a GRPO run of real processes, the same command until it ends, and a check.

A run takes its questions from a PostgreSQL server, has two teacher servers and a student server,
and judges behind HTTP. `draw(seed)` says what happens to which of them and when; `World.suffer`
lets it happen, and returns what must not be there (see `PROMISES`).

    python -m tests.e2e.faults FILE

counts the lines that runs have written to a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests import http_faults, processes, vllm_servers
from tests.e2e import test_grpo

STEPS = 3
STAND_INS, REAL = 34, 6  # seeds against stand-ins, and against real vLLM servers
AHEAD = 12  # further seeds against stand-ins, with weights that go to them beside the training
STOPPED_SECS = 20.0  # how long a process stands still that SIGSTOP stops
LIMIT_SECS = 400.0  # longest that one attempt may take
ATTEMPTS = 4
SIGNALS = ("SIGKILL", "SIGTERM", "SIGSTOP")
REPLIES = ("status", "truncate", "slow")
FAULTS = (
    *((name, target) for name in SIGNALS
      for target in ("trainer", "teacher", "student", "judge", "database")),
    *((name, target) for name in REPLIES for target in ("teacher", "student", "judge")),
    ("full disk", "trainer"),
)  # fmt: skip
REAL_FAULTS = tuple((name, target) for name in SIGNALS for target in ("trainer", "teacher"))
AHEAD_FAULTS = (
    ("status", "teacher"), ("SIGKILL", "teacher"), ("SIGTERM", "trainer"), ("SIGSTOP", "teacher"),
    ("truncate", "teacher"), ("SIGKILL", "trainer"), ("slow", "teacher"), ("full disk", "trainer"),
)  # fmt: skip
PROMISES = (
    "step lost behind a checkpoint", "wrong label", "unscored sample trained", "orphan",
    "left in /dev/shm", "bad end",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens.

    Attributes:
        seed: the number it was drawn from.
        name: a signal, what a server does wrong, or a full disk.
        target: what it happens to.
        phase: `start` is before the first request of the run, `work` between the first and the
            last one, `end` after it.
        moment: share of the phase that passes before.
        kills: whether a process that SIGSTOP stopped is killed, not continued.
        secs: how long a slow reply takes.
        times: how many replies are wrong.
        pick: share in the list of the target's processes.
        real: whether the servers are real vLLM servers.
        ahead: whether the next batch is generated while a step trains.
    """

    seed: int
    name: str
    target: str
    phase: str
    moment: float
    kills: bool
    secs: float
    times: int
    pick: float
    real: bool
    ahead: bool


def draw(seed: int) -> Fault:
    """Returns the fault of a seed; the first 25 are one of each kind for each target."""
    draws = random.Random(seed)
    ahead = seed >= STAND_INS + REAL
    real = seed >= STAND_INS and not ahead
    if ahead:
        name, target = AHEAD_FAULTS[(seed - STAND_INS - REAL) % len(AHEAD_FAULTS)]
    elif real:
        name, target = REAL_FAULTS[seed - STAND_INS]
    else:
        kinds = random.Random(13).sample(FAULTS, len(FAULTS))
        name, target = kinds[seed] if seed < len(kinds) else draws.choice(FAULTS)
    phase = draws.choices(("start", "work", "end"), (0.2, 0.7, 0.1))[0]
    if target == "database":
        phase = "start"  # it is read once
    elif target != "trainer" and phase == "end":
        phase = "work"  # nobody asks it any more
    return Fault(
        seed=seed,
        name=name,
        target=target,
        phase=phase,
        moment=draws.random(),
        kills=draws.random() < 0.5,
        secs=draws.uniform(1.0, 15.0),
        times=draws.randint(1, 4),
        pick=draws.random(),
        real=real,
        ahead=ahead,
    )


@dataclasses.dataclass
class Undisturbed:
    """A run without a fault.

    Attributes:
        start_secs: from its start to its first request.
        end_secs: from its last request to its end.
        calls: requests to all servers.
        losses: loss of each step.
        mismatch: largest `rollout/mismatch_kl` of a step.
    """

    start_secs: float
    end_secs: float
    calls: int
    losses: list[float]
    mismatch: float


class World:
    """The processes of a run, and the run."""

    def __init__(
        self,
        inputs: pathlib.Path,
        database: Any,
        place: pathlib.Path,
        real: bool,
        ahead: bool = False,
    ) -> None:
        """Nothing runs yet.

        Args:
            inputs: directory with `model`, and where programs are cached.
            database: server with the sessions, and `database.url`.
            place: empty directory; a file system of its own where the disk can be full.
            real: whether the teacher is served by vLLM.
            ahead: whether the next batch is generated while a step trains.
        """
        self.ahead = ahead
        self.inputs, self.database, self.place, self.real = inputs, database, place, real
        self.output = place / "run"
        self.model = str(inputs / "model")
        self.mark = f"ATLAS_FAULT_RUN={uuid.uuid4()}"
        self.env = dict([self.mark.split("=")])
        self.ports = [processes.free_port() for _ in range(4)]
        self.urls = [f"http://127.0.0.1:{port}" for port in self.ports]
        self.servers: list[subprocess.Popen[bytes] | None] = [None] * 4
        self.trainer: subprocess.Popen[bytes] | None = None
        self.attempts = 0
        weights = hashlib.sha256(str(self.output).encode()).hexdigest()[:12]
        self.memory = {f"atlas_jax-{os.getuid()}-{weights}"}

    @property
    def roles(self) -> dict[str, list[int]]:
        """Numbers of the servers of each role."""
        return {"teacher": [0] if self.real else [0, 1], "student": [2], "judge": [3]}

    @property
    def numbers(self) -> list[int]:
        """Numbers of all servers."""
        return [number for numbers in self.roles.values() for number in numbers]

    def command(self) -> dict[str, Any]:
        """Returns the command of the run."""
        command = test_grpo.command(self.inputs, self.output, "teaching")
        judge = f"{self.urls[3]}/v1"
        values = {
            "max_steps": STEPS, "save_steps": 1, "sync_ref_model": False, "num_iterations": 1,
            "eval_steps": 2, "rollout.eval_limit": 2, "max_prompt_length": 40,
            "data.eval_split_ratio": 0.2,
            "rollout.backend": "vllm", "rollout.sync_dtype": "float32",
            "rollout.max_staleness": int(self.ahead),
            "rollout.probe_tolerance": 1e-4, "rollout.request_timeout_secs": 30.0,
            "rollout.teacher_servers": ",".join(self.urls[i] for i in self.roles["teacher"]),
            "rollout.student_servers": self.urls[2], "rollout.request_seeds": "always",
            "reward.kind": "mixed", "reward.weights": "(1.0, 0.5)",
            "reward.retry_waits_secs": "(1.0, 2.0, 5.0)",
            "reward.rim.small_model.base_url": judge, "reward.rim.small_model.model": "agreeing",
            "reward.rim.large_model.base_url": judge, "reward.rim.large_model.model": "large",
            "reward.rim.small_model.api_key_env": "", "reward.rim.large_model.api_key_env": "",
            "reward.rim.limits.timeout_secs": 30.0, "reward.rim.cache_dir": self.output / "judges",
        }  # fmt: skip
        config = "--config=configs/run/quickstart_grpo.py:data=runtime_pg,rim=rim_offline_config"
        flags = [f for f in command["args"][4:] if "dataset_path" not in f and "eval_path" not in f]
        command["args"][3:] = [config, *flags, *(f"--config.{k}={v}" for k, v in values.items())]
        command["env"] |= self.env | {
            "ATLAS_DATABASE_URL": self.database.url, "XLA_FLAGS": processes.xla_flags(1),
        }  # fmt: skip
        command["env"].pop("ATLAS_TRACEBACK")
        return command

    def serve(self) -> None:
        """Starts the servers that do not run, as a supervisor would."""
        for number in self.numbers:
            process = self.servers[number]
            if process is None or process.poll() is not None:
                self.servers[number] = self._start(number)
        for number in self.numbers:
            self._wait_healthy(number)

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        port = f"--port={self.ports[number]}"
        if number == 3:
            command = [sys.executable, "-m", "tests.judge_server", port, "--latency=0.02"]
        elif self.real and number == 0:
            command = [sys.executable, "-m", "atlas_jax.serve", f"--model={self.model}", port,
                       "--dtype=float32", "--max-model-len=128"]  # fmt: skip
        else:
            command = [sys.executable, "-m", "tests.stand_in", f"--model={self.model}", port,
                       "--secs-per-token=0.02"]  # fmt: skip
        with (self.place.parent / f"server_{number}.log").open("ab") as log:
            env = os.environ | self.env | {"OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, stdout=log, stderr=log, env=env)

    def _wait_healthy(self, number: int) -> None:
        path = "/stand_in/calls" if number == 3 else "/health"
        end = time.monotonic() + vllm_servers.START_SECS
        while not _answers(self.urls[number] + path):
            assert time.monotonic() < end, f"server {number} does not start"
            assert self.servers[number].poll() is None, f"server {number} ended"
            time.sleep(0.1)

    def train(self) -> None:
        """Starts the run, or continues it."""
        self.attempts += 1
        self.log = self.place.parent / f"train_{self.attempts}.log"
        with self.log.open("wb") as log:
            self.trainer = subprocess.Popen(**self.command(), stdout=log, stderr=log)

    def num_calls(self) -> int:
        """Returns how many requests the servers have had from the run; one that is gone has none.

        Health checks of the real server are not among them.
        """
        numbers = [n for n in self.numbers if not (self.real and n == 0)]
        total = 0
        for number in numbers:
            with contextlib.suppress(*_NO_ANSWER):
                asked = http_faults.calls(self.urls[number])
                total += sum(path not in _WATCHING for _, path, *_ in asked)
        return total

    def measure(self) -> Undisturbed:
        """Returns how a run without a fault goes; this world is over then."""
        self.serve()
        start, before = time.monotonic(), self.num_calls()
        self.train()
        first = last = start
        calls = 0
        while self.trainer.poll() is None:
            now = self.num_calls() - before
            if now > calls:
                last = time.monotonic()
                first = last if not calls else first
            calls = now
            time.sleep(0.05)
        assert self.trainer.returncode == 0, self.log.read_text()[-3000:]
        ended = time.monotonic()
        losses = [line["loss/total"] for line in self._steps()]
        mismatch = max(abs(line["rollout/mismatch_kl"]) for line in self._steps())
        assert self.ahead or mismatch < 1e-6
        return Undisturbed(first - start, ended - last, calls, losses, mismatch)

    def suffer(self, fault: Fault, whole: Undisturbed) -> dict[str, Any]:
        """Lets a fault happen, repeats the command until it ends well, and checks what is left."""
        broken: dict[str, list[str]] = {name: [] for name in PROMISES}
        codes, missed = [], True
        with self:
            while len(codes) < ATTEMPTS and 0 not in codes:
                self.serve()
                if not codes:
                    self._arm(fault, whole)
                saved = self._saved()
                self.train()
                if not codes:
                    missed = self._strike(fault, whole)
                codes.append(self._end(fault, broken))
                self._note_memory()
                self._mend()
                self._check_saved(saved, codes[-1], broken)
            if codes[-1] != 0:
                broken["bad end"].append(f"exit codes {codes}: {_end_of(self.log)}")
            self._check_run(broken, whole)
        broken["orphan"] += [" ".join(p.cmdline())[:200] for p in self._marked()]
        for process in self._marked():
            process.kill()
        broken["left in /dev/shm"] += [name for name in self.memory if (_MEMORY / name).exists()]
        return dataclasses.asdict(fault) | {
            "codes": codes,
            "missed": missed,
            "same": self._same(whole),
            "broken": {name: found for name, found in broken.items() if found},
        }

    def _arm(self, fault: Fault, whole: Undisturbed) -> None:
        """Lets a server reply wrongly later."""
        if fault.name not in REPLIES:
            return
        numbers = self.roles[fault.target]
        number = numbers[int(fault.pick * len(numbers))]
        share = {"start": 0.0, "work": fault.moment}[fault.phase]
        wrong = {
            "do": fault.name, "status": 500, "secs": fault.secs, "times": fault.times,
            "after": int(share * whole.calls / 4),
        }  # fmt: skip
        http_faults.set_faults(self.urls[number], [wrong])

    def _strike(self, fault: Fault, whole: Undisturbed) -> bool:
        """Waits for the moment and lets the fault happen; returns whether the run ended before."""
        if fault.name in REPLIES:
            return False
        self._wait_for_moment(fault, whole)
        self._note_memory()
        if self.trainer.poll() is not None:
            return True
        if fault.name == "full disk":
            with contextlib.suppress(OSError), (self.place / "filler").open("wb") as file:
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            return False
        victim = self._victim(fault)
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(getattr(signal, fault.name))
            if fault.name == "SIGSTOP":
                end = time.monotonic() + STOPPED_SECS
                while time.monotonic() < end:
                    time.sleep(0.1)
                victim.kill() if fault.kills else victim.resume()
        return False

    def _wait_for_moment(self, fault: Fault, whole: Undisturbed) -> None:
        start, before = time.monotonic(), self.num_calls()
        if fault.phase == "start":
            pause = fault.moment * whole.start_secs
            while time.monotonic() < start + pause and self.trainer.poll() is None:
                time.sleep(0.02)
        else:
            share = fault.moment if fault.phase == "work" else 1.0
            while self.num_calls() - before < share * whole.calls and self.trainer.poll() is None:
                time.sleep(0.05)
            if fault.phase == "end":
                time.sleep(fault.moment * whole.end_secs)

    def _victim(self, fault: Fault) -> psutil.Process:
        """Returns a process of the target; vLLM has several."""
        if fault.target == "trainer":
            return psutil.Process(self.trainer.pid)
        if fault.target == "database":
            return psutil.Process(self.database.server.get_pid())
        numbers = self.roles[fault.target]
        found = psutil.Process(self.servers[numbers[int(fault.pick * len(numbers))]].pid)
        if self.real:
            tree = [found, *found.children(recursive=True)]
            found = tree[int(fault.pick * len(tree))]
        return found

    def _end(self, fault: Fault, broken: dict[str, list[str]]) -> int:
        """Waits until the run ends, and returns its exit code."""
        try:
            code = self.trainer.wait(LIMIT_SECS)
        except subprocess.TimeoutExpired:
            broken["bad end"].append(f"attempt {self.attempts} hangs: {_end_of(self.log)}")
            self.trainer.kill()
            return self.trainer.wait()
        allowed = {0, 1, 75}
        if fault.target == "trainer" and self.attempts == 1:
            allowed |= {-signal.SIGKILL, -signal.SIGTERM}
        said, problem = self.log.read_text(errors="replace"), ""
        if code not in allowed or "Traceback" in said:
            problem = f"exit code {code}"
        elif code == 1 and len(re.findall(r"^error: ", said, re.MULTILINE)) != 1:
            problem = "no line of error"
        if problem:
            broken["bad end"].append(f"attempt {self.attempts}: {problem}: {_end_of(self.log)}")
        return code

    def _mend(self) -> None:
        """Puts right what the fault broke, as a person would before the command is repeated."""
        (self.place / "filler").unlink(missing_ok=True)
        for number in self.numbers:
            if not (self.real and number == 0) and self.servers[number].poll() is None:
                http_faults.set_faults(self.urls[number], [])
        if self.real and self.servers[0].poll() is None and not _answers(self.urls[0] + "/health"):
            self.servers[0].wait(60)  # it ends when a part of it is killed
        self.database.mend()

    def _saved(self) -> int:
        found = (self.output / "checkpoints").glob("*")
        return max((int(path.name) for path in found if path.name.isdigit()), default=0)

    def _steps(self) -> list[dict[str, Any]]:
        path = self.output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, lines) if "loss/total" in line]

    def _check_saved(self, before: int, code: int, broken: dict[str, list[str]]) -> None:
        """Checks that a run goes on where the last one was, and saves what it has done."""
        lost = broken["step lost behind a checkpoint"]
        saved = self._saved()
        if saved < before:
            lost.append(f"attempt {self.attempts}: checkpoint {before} is gone, {saved} is left")
        said = self.log.read_text(errors="replace")
        if found := re.search(r"continuing from step (\d+)", said):
            if int(found[1]) != before:
                lost.append(f"attempt {self.attempts} continues from {found[1]}, not {before}")
        elif before and "training begins" in said:
            lost.append(f"attempt {self.attempts} begins anew with checkpoint {before} there")
        done = max((line["step"] for line in self._steps()), default=0)
        killed = code < 0
        if done > saved + killed:
            lost.append(f"attempt {self.attempts}: step {done} was logged, {saved} was saved")

    def _check_run(self, broken: dict[str, list[str]], whole: Undisturbed) -> None:
        """Checks what the whole run has written."""
        steps = self._steps()
        if [line["step"] for line in steps] != list(range(1, STEPS + 1)):
            broken["step lost behind a checkpoint"].append(f"{[line['step'] for line in steps]}")
            return
        for line in steps:
            step, trained = line["step"], 0
            # Tokens of weights that are older than their label says differ from the trainer more
            # than those of a run without a fault, in which labels are one update old at most.
            if not abs(line["rollout/mismatch_kl"]) < 1e-6 + 2 * whole.mismatch:
                broken["wrong label"].append(f"step {step}: {line['rollout/mismatch_kl']} nats")
            for sample in test_grpo.samples(self.output, step):
                trained += sample["trains"]
                version = sample["completion"]["weights_version"]
                if sample["trains"] and not step - 1 - self.ahead <= version < step:
                    broken["wrong label"].append(f"step {step} trains tokens of {version}")
                if sample["trains"] and not _is_scored(sample):
                    broken["unscored sample trained"].append(f"step {step}: {sample['reward']}")
            if not trained:
                broken["bad end"].append(f"step {step} trained no sample")
        if not (self.output / "final/model.safetensors").exists():
            broken["bad end"].append("no final model")

    def _same(self, whole: Undisturbed) -> bool:
        """Returns whether the losses are those of a run without a fault."""
        losses = [line["loss/total"] for line in self._steps()]
        return len(losses) == STEPS and losses == pytest.approx(whole.losses, abs=1e-5)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends what runs, as a person would."""
        for process in [self.trainer, *self.servers]:
            if process is not None and process.poll() is None:
                process.terminate()
        for process in [self.trainer, *self.servers]:
            if process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(60)

    def _note_memory(self) -> None:
        """Notes what in memory belongs to this world; other tests use it at the same time."""
        for process in self._marked():
            with contextlib.suppress(OSError):
                maps = pathlib.Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
                self.memory |= set(re.findall(rf"{_MEMORY}/([^/\s]+)", maps))

    def _marked(self) -> list[psutil.Process]:
        """Returns the processes that this world has started, and theirs."""
        name, value = self.mark.split("=")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(name) == value and process.status() != "zombie":
                    found.append(process)
        return found


_MEMORY = pathlib.Path("/dev/shm")
_NO_ANSWER = (OSError, http.client.HTTPException)
_WATCHING = frozenset({"/health", "/is_paused", "/weight_info"})


def _is_scored(sample: dict[str, Any]) -> bool:
    """Returns whether the reward of a sample is what its parts say."""
    if sample["reward"] is None:
        return False
    details = sample["reward_details"]
    gain, rim = (details[name]["value"] for name in ("teaching_gain", "rim"))
    # A lesson that gives the answer away has its own score beside what that is worth.
    own = details.get("own_value", sample["reward"])
    return None not in (gain, rim) and sample["reward"] <= own == pytest.approx(gain + 0.5 * rim)


def _answers(url: str) -> bool:
    with contextlib.suppress(*_NO_ANSWER):
        http_faults.get(url)
        return True
    return False


def _end_of(log: pathlib.Path) -> str:
    return log.read_text(errors="replace")[-1500:]


@contextlib.contextmanager
def small_disk(place: pathlib.Path) -> Iterator[bool]:
    """Makes a file system of 64 MB of a directory where that is allowed; yields whether it is."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    made = not os.geteuid() and not subprocess.run(mount, check=False).returncode
    try:
        yield made
    finally:
        if made:
            subprocess.run(["umount", "--lazy", str(place)], check=False)
        shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    """Prints what the lines of a file add up to."""
    results = [json.loads(line) for line in pathlib.Path(sys.argv[1]).read_text().splitlines()]
    lines = [
        f"{name}: {sum(name in result['broken'] for result in results)} of {len(results)} runs"
        for name in PROMISES
    ]
    lines += [
        f"{sum(len(result['codes']) > 1 for result in results)} runs were continued",
        f"{sum(result['same'] for result in results)} have the losses of an undisturbed run",
        f"{sum(result['missed'] for result in results)} ended before their fault",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
