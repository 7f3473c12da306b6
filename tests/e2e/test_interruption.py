"""Runs that are interrupted: by a signal, a full disk, a closed terminal, a second run."""

import os
import pathlib
import shutil
import signal
import subprocess
import threading
import time

import pytest

from tests.e2e import test_sft

inputs = test_sft.inputs


def started(inputs, output, *extra, **how):
    """Starts a run; what it says goes to a pipe unless told otherwise.

    On one device it may use programs that another run has compiled.
    """
    command = test_sft.command(inputs, output, *extra, devices=1)
    command["env"].pop("ATLAS_TRACEBACK")
    where = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(**command, **(where | how))


def answers(pid, number):
    """Returns whether a process has a handler for a signal."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    mask = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(mask >> (number - 1) & 1)


def wait_for(path, text, process, secs=300):
    limit = time.monotonic() + secs
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("secs", [0.0, 1.0, 3.5])
def test_a_signal_in_the_first_seconds_is_answered_in_a_line(inputs, tmp_path, number, secs):
    """From when the process answers signals; before, Python itself still starts."""
    process = started(inputs, tmp_path, "--config.max_steps=100000")  # not done in a few seconds
    while not answers(process.pid, signal.SIGTERM):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(secs)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "Traceback" not in said
    assert f"{number.name}: sto" in said
    assert said.count("KeyboardInterrupt") == 0


def test_a_signal_while_a_program_compiles_is_answered_at_once(inputs, tmp_path):
    """The main thread is inside XLA then, where Python runs no signal handler."""
    process = started(inputs, tmp_path, "--config.gradient_accumulation_steps=3")
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    wait_for(tmp_path / "start.json", "{", process)  # the first step comes next
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 75
    reader.join(10)
    said = "".join(lines)
    assert "SIGINT: stops as soon as" in said
    assert "stopped at step" in said
    assert "Traceback" not in said
    assert (tmp_path / "checkpoints").exists()


def test_a_reader_that_goes_away_does_not_end_the_run(inputs, tmp_path):
    """As in `… | tee log`, where Ctrl-C ends tee too."""
    read, write = os.pipe()
    process = started(
        inputs, tmp_path, "--config.max_steps=100000", "--config.save_steps=0",
        stdout=write, stderr=write,
    )  # fmt: skip
    os.close(write)
    wait_for(tmp_path / "training.log", "step 2/", process)
    os.close(read)
    seen = (tmp_path / "training.log").read_text().count("\n")
    limit = time.monotonic() + 120
    while (tmp_path / "training.log").read_text().count("\n") < seen + 20:
        assert process.poll() is None, "it goes on"
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 75
    last = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert f"stopped at step {last} (SIGINT)" in (tmp_path / "training.log").read_text()


@pytest.fixture
def disk(tmp_path):
    """A file system of 6 MB, and a function that makes it larger."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let tests mount a small file system")

    def enlarge():
        subprocess.run(["mount", "-o", "remount,size=200m", str(place)], check=True)

    try:
        yield place, enlarge
    finally:
        subprocess.run(["umount", str(place)], check=False)


def test_a_full_disk_is_one_line_and_the_run_continues_when_there_is_room(inputs, disk, tmp_path):
    place, enlarge = disk
    process = started(inputs, place / "run", "--config.save_total_limit=0")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in said
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in error
    assert str(place) in error
    assert len([line for line in said.splitlines() if "No space left" in line]) <= 2
    whole = [p for p in (place / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    enlarge()
    process = started(inputs, place / "run", "--config.save_total_limit=0")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    if whole:
        assert "continuing" in said
    left = [p.name for p in (place / "run" / "checkpoints").iterdir() if not p.name.isdigit()]
    assert not left, "what was half written is gone"
    assert (place / "run" / "final" / "model.safetensors").exists()


def test_a_disk_that_is_full_at_the_start_is_one_line(inputs, disk):
    place, _ = disk
    (place / "filler").write_bytes(bytes(shutil.disk_usage(place).free))
    process = started(inputs, place / "run")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "No space left on device" in said.splitlines()[-2]


def test_a_second_run_in_the_directory_is_refused_by_name_and_a_kill_frees_it(inputs, tmp_path):
    first = started(inputs, tmp_path, "--config.max_steps=100000", "--config.save_steps=0")
    try:
        wait_for(tmp_path / "training.log", "step 1/", first)
        before = (tmp_path / "config.json").read_bytes()
        second = started(inputs, tmp_path)
        said, _ = second.communicate(timeout=300)
        assert second.returncode == 1
        assert f"is used by another run (process {first.pid} on " in said
        assert (tmp_path / "config.json").read_bytes() == before
    finally:
        first.kill()
        first.wait()
    third = started(inputs, tmp_path, "--config.max_steps=1")
    said, _ = third.communicate(timeout=300)
    assert third.returncode == 0, said
    assert not (tmp_path / ".run.json").exists()


def test_a_closed_terminal_lets_the_run_save(inputs, tmp_path):
    process = started(inputs, tmp_path, "--config.max_steps=100000", "--config.save_steps=0")
    wait_for(tmp_path / "training.log", "step 1/", process)
    process.send_signal(signal.SIGHUP)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "SIGHUP: stops as soon as" in said
    assert list((tmp_path / "checkpoints").iterdir())
