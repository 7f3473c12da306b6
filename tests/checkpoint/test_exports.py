"""What an export may replace: an earlier one of its kind, and nothing of the user's."""

import json
import os
import subprocess
import sys

import pytest

from atlas_jax import convert
from atlas_jax.checkpoint import exports


def write(directory, text="weights", kind="model", unmarked=(), names=("config.json", "sub/a.txt")):
    with exports.replaced(directory, kind, "here", unmarked) as new:
        for name in names:
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(text)


def content(directory):
    """Returns what lies in a directory, by path."""
    return {
        path.relative_to(directory).as_posix(): path.read_text()
        for path in directory.rglob("*")
        if path.is_file() and path.name != exports.MARKER
    }


def test_the_marker_says_what_was_written(tmp_path):
    write(tmp_path / "out")
    marker = json.loads((tmp_path / "out" / exports.MARKER).read_text())
    assert (marker["format"], marker["tool"], marker["kind"]) == (1, "atlas_jax", "model")
    assert marker["source"] == "here"
    assert sorted(marker["files"]) == ["config.json", "sub/a.txt"]


def test_an_earlier_export_is_replaced_without_what_it_alone_had(tmp_path):
    write(tmp_path / "out")
    write(tmp_path / "out", "new", names=("config.json",))
    assert content(tmp_path / "out") == {"config.json": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_is_filled(tmp_path):
    write(tmp_path)
    assert sorted(content(tmp_path)) == ["config.json", "sub/a.txt"]


@pytest.mark.parametrize("unmarked", [(), exports.UNMARKED_EXPORT])
@pytest.mark.parametrize("marker", [None, "{", "[]", '{"format": 1, "kind": "model"}'])
def test_a_directory_of_the_users_is_refused(tmp_path, unmarked, marker):
    (tmp_path / "other_model").mkdir()
    (tmp_path / "other_model" / "thesis.txt").write_text("mine")
    if marker is not None:
        (tmp_path / exports.MARKER).write_text(marker)
    with pytest.raises(
        ValueError, match=r"not empty and no earlier export of its kind: it holds .*o"
    ):
        write(tmp_path, unmarked=unmarked)
    assert content(tmp_path) == {"other_model/thesis.txt": "mine"}


def test_another_kind_is_refused(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(ValueError, match=r"it holds \.atlas_jax_export\.json, config\.json, sub;"):
        write(tmp_path / "out", "new", kind="run")
    assert content(tmp_path / "out") == {"config.json": "weights", "sub/a.txt": "weights"}


def test_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        write(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_what_the_user_added_is_kept(tmp_path):
    write(tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    (tmp_path / "out" / "sub" / "deep").mkdir()
    (tmp_path / "out" / "sub" / "deep" / "notes.txt").write_text("mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows").write_text("mine")
    (tmp_path / "out" / "data").symlink_to(tmp_path / "data")
    (tmp_path / "out" / "gone").symlink_to("nowhere")
    for text in ("second", "third"):
        write(tmp_path / "out", text, names=("config.json",))
        assert content(tmp_path / "out") == {
            "config.json": text, "README.md": "mine", "sub/deep/notes.txt": "mine",
        }  # fmt: skip
    assert os.readlink(tmp_path / "out" / "data") == str(tmp_path / "data")
    assert os.readlink(tmp_path / "out" / "gone") == "nowhere"
    assert (tmp_path / "data" / "rows").read_text() == "mine"


def test_what_the_user_added_while_the_export_was_written_is_kept(tmp_path):
    write(tmp_path / "out")
    with exports.replaced(tmp_path / "out", "model", "") as new:
        (new / "config.json").write_text("new")
        (tmp_path / "out" / "README.md").write_text("mine")
    assert content(tmp_path / "out") == {"config.json": "new", "README.md": "mine"}


@pytest.mark.parametrize("change", ["another text", "weighty"])
def test_what_the_user_changed_is_refused(tmp_path, change):
    write(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(change)
    with pytest.raises(ValueError, match=r"holds config\.json, changed since it was exported"):
        write(tmp_path / "out", "new")
    assert content(tmp_path / "out") == {"config.json": change, "sub/a.txt": "weights"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("start", "size"), [(0, 4), (4 << 20, 600 << 10), ((8 << 20) - 4, 4)])
def test_a_change_within_a_large_file_is_noticed(tmp_path, start, size):
    with exports.replaced(str(tmp_path / "out"), "model", "a run", ()) as partial:
        (partial / "model.safetensors").write_bytes(bytes(8 << 20))
    exports.check(str(tmp_path / "out"), "model")
    with (tmp_path / "out/model.safetensors").open("r+b") as file:
        file.seek(start)
        file.write(b"x" * size)
    with pytest.raises(ValueError, match="changed since it was exported"):
        exports.check(str(tmp_path / "out"), "model")


def test_what_the_user_added_under_a_name_that_the_export_needs_is_refused(tmp_path):
    write(tmp_path / "out", names=("config.json",))
    (tmp_path / "out" / "generation_config.json").write_text("mine")
    with pytest.raises(ValueError, match=r"holds generation_config\.json, which an export did not"):
        write(tmp_path / "out", "new", names=("config.json", "generation_config.json"))
    assert content(tmp_path / "out") == {"config.json": "weights", "generation_config.json": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_copy_of_an_export_counts_as_one(tmp_path):
    write(tmp_path / "out")
    subprocess.run(["cp", "-r", tmp_path / "out", tmp_path / "copy"], check=True)
    write(tmp_path / "copy", "new")
    assert content(tmp_path / "copy") == {"config.json": "new", "sub/a.txt": "new"}


def test_a_directory_of_a_run_from_before_markers_is_replaced(tmp_path):
    names = ("config.json", "model-00001-of-00002.safetensors", "trainer_state.json")
    for name in (*names, "additional_chat_templates/tool_use.jinja"):
        (tmp_path / "final" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "final" / name).write_text("old")
    write(tmp_path / "final", "new", unmarked=exports.UNMARKED_EXPORT)
    assert content(tmp_path / "final") == {"config.json": "new", "sub/a.txt": "new"}


def test_a_model_of_the_users_in_the_place_of_the_runs_files_is_refused(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=r"it holds model\.safetensors;"):
        write(tmp_path, unmarked=exports.UNMARKED_FILES)
    assert set(content(tmp_path).values()) == {"mine"}


def test_a_full_disk_leaves_the_old_export(tmp_path):
    write(tmp_path / "out")
    code = (
        "import resource, sys; from tests.checkpoint.test_exports import write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write(sys.argv[1], 'x' * 100_000)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "File too large" in result.stderr
    assert content(tmp_path / "out") == {"config.json": "weights", "sub/a.txt": "weights"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("target", "source"),
    [
        ("a", "a"),
        ("a", "a/b"),
        ("a/b", "a"),
        ("a", "a/m.gguf"),
        ("link", "a"),
        ("a", "link/b"),
        ("a/x/../../a", "a"),
        ("c", "a"),  # a/linked leads there
    ],
)
def test_a_target_that_overlaps_its_source_is_refused(tmp_path, target, source):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").mkdir()
    (tmp_path / "a" / "m.gguf").write_text("mine")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "weights").write_text("mine")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "c" / "weights")
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(ValueError, match="one is the other or lies inside it"):
        convert.check_apart(tmp_path / target, [tmp_path / source])


def test_targets_beside_their_source_are_fine(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_text("mine")
    for target in ("ab", "a.old", "b/a"):
        convert.check_apart(tmp_path / target, [tmp_path / "a", tmp_path / "a" / "f"])
