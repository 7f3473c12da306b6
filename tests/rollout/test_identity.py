"""Whether a server has the model that a role means."""

import json
import pathlib
import shutil

import pytest
import safetensors.numpy

from atlas_jax.checkpoint import hf
from atlas_jax.rollout import identity
from atlas_jax.rollout.capabilities import ServerStart
from tests import words

WORDS = ("a", "b")
URL = "http://host:1"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return words.save(tmp_path_factory.mktemp("models") / "student", WORDS)


def start(root):
    return ServerStart(
        root=str(root), max_model_len=64, block_size=16, max_num_seqs=8, dtype="float32",
        device="cpu", policy="priority",
    )  # fmt: skip


def check(root, name):
    source = hf.open_source(name) if pathlib.Path(name).exists() else None
    identity.check_frozen(URL, start(root), str(name), source)


def test_the_same_model_is_accepted_under_each_of_its_names(student, tmp_path, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to(student)
    copy = shutil.copytree(student, tmp_path / "copy")
    monkeypatch.chdir(pathlib.Path(student).parent)
    for root in (student, f"{student}/", link, copy):
        check(root, student)
    check(student, "student")


def test_a_hub_id_is_accepted_as_it_is(student):
    snapshot = hf.open_source(student)
    identity.check_frozen(URL, start("org/model"), "org/model", snapshot)
    with pytest.raises(ValueError, match=r"started with org/other, .*org/model is another model"):
        identity.check_frozen(URL, start("org/other"), "org/model", snapshot)


def test_a_model_that_only_the_server_can_read_is_known_by_its_last_word(student, caplog):
    check("/scratch/models/student", student)
    assert "is taken for" in caplog.text
    with pytest.raises(ValueError, match="cannot read the server's"):
        check("/scratch/models/teacher", student)


def change_weight(directory):
    file = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name] = tensors[name] + 1e-6
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})


def change_base(directory):
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["rms_norm_eps"] = 1e-3
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_weight, r"their weights differ, for example .*v_proj"),
        (change_base, r"different architectures"),
    ],
)
def test_another_model_is_refused_by_name(student, tmp_path, change, message):
    other = tmp_path / "student"
    shutil.copytree(student, other)
    change(other)
    with pytest.raises(ValueError, match=message) as error:
        check(other, student)
    text = str(error.value)
    assert URL in text
    assert str(other) in text
    assert f"student_model={student}" in text


def test_an_adapter_is_loaded_by_no_server_of_another_model(student, tmp_path):
    base = hf.open_source(student)
    copy = shutil.copytree(student, tmp_path / "copy")
    identity.check_base(URL, start(copy), student, base)
    other = words.save(tmp_path / "other", WORDS, seed=1)
    with pytest.raises(ValueError, match=r"other, and the adapter belongs to .*their weights diff"):
        identity.check_base(URL, start(other), student, base)
