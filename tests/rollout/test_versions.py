"""The directory of the versions: what is written into it, and what is never touched."""

import fcntl
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from atlas_jax.checkpoint import hf
from atlas_jax.rollout import versions
from atlas_jax.rollout.versions import MARK, Versions
from tests import words


@pytest.fixture(scope="module")
def files():
    return hf.ModelFiles({"model_type": "llama"}, {}, words.tokenizer(("a", "b")), "float32")


def write(directory, label, files):
    directory.begin(label, files)
    (directory.partial(label) / "model.safetensors").write_text(label)
    directory.finish(label)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_only_what_this_run_wrote_is_removed(tmp_path, files):
    """A working tree as `rollout.sync_dir`, with names that look like versions."""
    others = (".venv", "vllm", "videos", "v3_results", ".vscode", "v1.0", ".v2.0.partial", "files")
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    ours = Versions(tmp_path, "run")
    for label in ("7.0", "8.0"):
        ours.remove_all()
        write(ours, label, files)
    (shared,) = tmp_path.glob(".atlas_jax_files*")
    assert names(tmp_path) == sorted((*others, "v8.0", shared.name))
    ours.close()
    assert names(tmp_path) == sorted(others)
    for name in others:
        assert (tmp_path / name / "content").read_text() == name


def test_two_runs_in_one_directory_leave_each_other_alone(tmp_path, files):
    one, other = Versions(tmp_path, "one"), Versions(tmp_path, "other")
    write(one, "1.0", files)
    write(other, "0.0", files)
    write(one, "2.0", files)
    assert (tmp_path / "v2.0" / MARK).read_text() == "one"
    other.remove_all()
    other.close()
    assert (tmp_path / "v2.0").exists()
    one.remove_all()
    write(one, "3.0", files)
    one.close()
    assert not tmp_path.exists()


@pytest.mark.parametrize("name", ["v1.0", ".v1.0.partial"])
def test_what_is_in_the_way_is_an_error_and_stays(tmp_path, files, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "content").write_text("precious")
    ours = Versions(tmp_path, "run")
    with pytest.raises(FileExistsError, match=r"exists and is not of this run; name another"):
        write(ours, "1.0", files)
    assert (tmp_path / name / "content").read_text() == "precious"


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path, files):
    killed = Versions(tmp_path, "run")
    write(killed, "1.0", files)
    killed.begin("2.0", files)
    (shared,) = tmp_path.glob(".atlas_jax_files*")
    (shared / "tokenizer.json").write_text("half wr")
    again = Versions(tmp_path, "run")
    again.remove_all()
    write(again, "2.0", files)
    assert names(tmp_path) == [shared.name, "v2.0"]
    whole = (tmp_path / "v2.0" / "tokenizer.json").read_text()
    assert whole == files.tokenizer.backend_tokenizer.to_str(pretty=True)


def test_a_tokenizer_with_several_chat_templates_is_written(tmp_path):
    tokenizer = words.tokenizer(("a", "b"))
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    ours = Versions(tmp_path, "run")
    for label in ("1.0", "2.0"):
        write(ours, label, hf.ModelFiles({}, {}, tokenizer, "float32"))
        folder = tmp_path / f"v{label}" / "additional_chat_templates"
        assert (folder / "tool_use.jinja").read_text() == "{{ tools }}"


def test_files_are_copied_where_they_cannot_be_linked(tmp_path, files, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")  # as vfat and object stores do

    monkeypatch.setattr(os, "link", refuse)
    write(Versions(tmp_path, "run"), "1.0", files)
    assert (tmp_path / "v1.0" / "tokenizer.json").stat().st_nlink == 1


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A directory in the place of /dev/shm."""
    monkeypatch.setattr(versions, "_MEMORY", tmp_path)
    return tmp_path


def test_memory_is_private_to_the_user(memory, files):
    ours = versions.in_memory("run", 1)
    assert ours.root.parent == memory
    assert ours.root.stat().st_mode & 0o777 == 0o700
    write(ours, "1.0", files)
    ours.close()
    assert not list(memory.iterdir())


def test_memory_without_room_is_not_used(memory, caplog):
    free = shutil.disk_usage(memory).free
    assert versions.in_memory("run", free) is None
    assert "weights do not go through" in caplog.text
    assert "MiB that a version needs" in caplog.text
    assert not list(memory.iterdir())


def test_memory_of_a_container_counts(memory, tmp_path_factory, monkeypatch, caplog):
    group = tmp_path_factory.mktemp("group")
    monkeypatch.setattr(versions, "_CGROUP", group)
    (group / "memory.current").write_text("900\n")
    (group / "memory.max").write_text("max\n")
    assert versions.in_memory("run", 100) is not None
    (group / "memory.max").write_text("1000\n")
    assert versions.in_memory("run", 50) is not None
    assert versions.in_memory("run", 99) is None
    assert "MiB that a version needs" in caplog.text


def test_a_directory_that_others_prepared_is_not_used(memory, tmp_path_factory, caplog):
    root = versions.in_memory("run", 1).root
    shutil.rmtree(root)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "content").write_text("precious")
    root.symlink_to(elsewhere)
    assert versions.in_memory("run", 1) is None
    assert "is not a directory" in caplog.text
    assert (elsewhere / "content").read_text() == "precious"
    root.unlink()
    root.mkdir(mode=0o755)
    lock = (root / ".owner").open("a")
    fcntl.flock(lock, fcntl.LOCK_EX)  # else it would be swept
    assert versions.in_memory("run", 1) is None
    assert "open to other users (mode 755)" in caplog.text
    lock.close()


def test_a_directory_of_another_user_is_not_used(memory, caplog):
    if os.getuid():
        pytest.skip("only root can make one")
    root = versions.in_memory("run", 1).root
    os.chown(root, 12345, 12345)
    assert versions.in_memory("run", 1) is None
    assert "belongs to user 12345" in caplog.text
    assert root.exists()


KILLED = """
import os, pathlib, signal, sys
from atlas_jax.rollout import versions
versions._MEMORY = pathlib.Path(sys.argv[1])
ours = versions.in_memory(sys.argv[2], 1)
root = ours.root
(root / "v1.0").mkdir()
(root / "v1.0" / "model.safetensors").write_text("weights")
print(root, flush=True)
if sys.argv[3] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.stdin.read()
"""


def start(memory, run, then):
    command = [sys.executable, "-c", KILLED, str(memory), run, then]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, pathlib.Path(process.stdout.readline().strip())


def test_what_killed_runs_left_is_swept_and_what_others_use_is_not(memory):
    dead, left = start(memory, "killed", "kill")
    dead.wait(60)
    living, used = start(memory, "living", "wait")
    try:
        assert not left.exists(), "each start sweeps"
        again, left = start(memory, "killed", "kill")
        again.wait(60)
        assert left.exists()
        ours = versions.in_memory("ours", 1)
        assert not left.exists()
        assert (used / "v1.0" / "model.safetensors").exists()
        assert versions.in_memory("living", 1) is None, "its process lives"
        ours.close()
    finally:
        living.kill()
        living.wait()
    versions.in_memory("living", 1).close()
    assert not list(memory.iterdir())


def test_a_version_is_marked_as_its_runs(tmp_path, files):
    write(Versions(tmp_path, "/some/run"), "1.0", files)
    assert (tmp_path / "v1.0" / MARK).read_text() == "/some/run"
