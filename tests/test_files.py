"""Files and directories that are whole whatever happens, shown by processes that are killed."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from atlas_jax import files


def python(code, *args, **options):
    """Starts a process that runs `code`; it must not import JAX, or it starts too slowly."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def write_together(contents):
    """Writes each file 200 times, each in a process of its own, all at the same time."""
    code = (
        "import sys; from atlas_jax.files import write_whole\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for i in range(200): write_whole(sys.argv[1], sys.argv[2] * 10_000)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    writers = [python(code, *content, **pipes) for content in contents]
    for writer in writers:
        writer.stdout.readline()
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        assert writer.communicate(timeout=300)[1] == ""


def test_two_files_that_differ_in_their_ending_are_written_at_the_same_time(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "a.jsonl"]
    write_together([(path, str(path)) for path in paths])
    assert sorted(tmp_path.iterdir()) == paths
    assert [path.read_text() for path in paths] == [str(path) * 10_000 for path in paths]


def test_one_file_is_written_by_two_processes_at_the_same_time(tmp_path):
    write_together([(tmp_path / "a.json", letter) for letter in "xy"])
    assert (tmp_path / "a.json").read_text() in ("x" * 10_000, "y" * 10_000)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a.json").write_text("old")
    code = (
        "import resource, sys; from atlas_jax.files import write_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_whole(sys.argv[1], 'x' * 100_000)"
    )
    assert "File too large" in python(code, tmp_path / "a.json").communicate(timeout=300)[1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def calls(monkeypatch):
    """Returns a list that fills with what reaches the disk, in order."""
    order = []

    def note(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            where = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[1])
            order.append((name, pathlib.Path(where).name))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "replace", "rename"):
        note(name)
    return order


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order = calls(monkeypatch)
    files.write_whole(tmp_path / "a.json", "x")
    assert [name for name, _ in order] == ["fsync", "replace"]
    assert order[1][1] == "a.json"


def test_a_directory_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order = calls(monkeypatch)
    with files.replace_directory(tmp_path / "out") as new:
        (new / "folder").mkdir()
        (new / "folder" / "inner").write_text("x")
        (new / "outer").write_text("x")
    named = order.index(("rename", "out"))
    assert {name for call, name in order[:named] if call == "fsync"} == {
        "inner", "folder", "outer", "new",
    }  # fmt: skip
    assert order[named + 1 :] == [("fsync", tmp_path.name)]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    files.write_whole(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with files.replace_directory(tmp_path / "link") as new:
        (new / "a").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "x"


def fill(directory, text):
    for i in range(5):
        (directory / f"{i}.txt").write_text(text)


def content(directory):
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_an_error_leaves_the_old_directory_and_nothing_else(tmp_path):
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt), files.replace_directory(tmp_path / "out") as new:
        fill(new, "new")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert content(tmp_path / "out") == {f"{i}.txt": "old" for i in range(5)}


REPLACE = (
    "import os, pathlib, signal, sys; from atlas_jax import files\n"
    "target, number, real = pathlib.Path(sys.argv[1]), int(sys.argv[2]), os.rename\n"
    "def rename(*args):\n"
    "    global number; number -= 1\n"
    "    if number < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
    "    real(*args)\n"
    "os.rename = rename\n"
    "with files.replace_directory(target) as new:\n"
    "    for i in range(5): (new / f'{i}.txt').write_text('new')"
)
"""Replaces a directory in a process that dies at its rename number N."""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_between_the_renames_is_undone_by_the_next_run(tmp_path, renames):
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    process = python(REPLACE, tmp_path / "out", renames)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "out").exists() == (renames == 0)
    files.recover(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert content(tmp_path / "out") == {f"{i}.txt": "old" for i in range(5)}


def test_what_took_the_name_meanwhile_is_not_replaced_by_what_a_kill_left(tmp_path):
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    python(REPLACE, tmp_path / "out", 1).communicate(timeout=300)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    files.recover(tmp_path / "out")
    assert content(tmp_path / "out") == {"mine.txt": "mine"}
    (left,) = tmp_path.glob(".out.*")
    assert content(left / "old") == {f"{i}.txt": "old" for i in range(5)}


def test_a_replacement_that_runs_is_left_alone_by_another(tmp_path):
    with files.replace_directory(tmp_path / "out") as first:
        fill(first, "first")
        code = (
            "import sys; from atlas_jax import files\n"
            "with files.replace_directory(sys.argv[1]) as new: (new / 'a').write_text('second')"
        )
        assert python(code, tmp_path / "out").communicate(timeout=300)[1] == ""
        assert content(tmp_path / "out") == {"a": "second"}
    assert content(tmp_path / "out") == {f"{i}.txt": "first" for i in range(5)}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_left_overs_of_our_own_are_removed(tmp_path):
    for name in (".out.partial", ".out.old", ".out.12-deadbeef.atlas_jax_partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    with files.replace_directory(tmp_path / "out") as new:
        fill(new, "new")
    assert len(list(tmp_path.glob(".out*/thesis.txt"))) == 3


def test_what_was_killed_before_it_held_its_lock_is_removed(tmp_path):
    (tmp_path / ".out.12-deadbeef.atlas_jax_partial").mkdir()
    files.recover(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_the_lock_is_left_as_it_was(tmp_path):
    code = (
        "import resource, sys; from atlas_jax import files\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "files._work_directory(files.resolved(sys.argv[1]))"
    )
    assert "Too many open files" in python(code, tmp_path / "out").communicate(timeout=300)[1]
    assert not list(tmp_path.iterdir())


def test_work_is_taken_for_a_left_over_by_nobody_while_its_process_lives(tmp_path):
    code = (
        "import os, sys; from atlas_jax import files\n"
        "for i in range(300):\n"
        "    files.recover(sys.argv[1])\n"
        "    with files._work_directory(files.resolved(sys.argv[1]))[1] as lock:\n"
        "        assert os.path.exists(lock.name)"
    )
    processes = [python(code, tmp_path / "out") for _ in range(3)]
    assert [p.communicate(timeout=300)[1] for p in processes] == [""] * 3
    files.recover(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_kill_at_any_moment_leaves_one_whole_directory(tmp_path):
    code = (
        "import itertools, sys; from atlas_jax import files\n"
        "print('ready', flush=True)\n"
        "for i in itertools.count():\n"
        "    with files.replace_directory(sys.argv[1]) as new:\n"
        "        for name in 'abcdefgh':\n"
        "            (new / name).write_text(f'{i}' * 1000)"
    )
    rng = random.Random(0)
    for _ in range(25):
        process = python(code, tmp_path / "out", stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.05 + rng.random() / 10)
        process.kill()
        assert process.communicate(timeout=300)[1] == ""
        files.recover(tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] in ([], ["out"])
        if (tmp_path / "out").exists():
            found = content(tmp_path / "out")
            assert sorted(found) == list("abcdefgh")
            assert len(set(found.values())) == 1
    assert (tmp_path / "out").exists()
