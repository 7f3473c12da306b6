"""`atlas-convert` as a user runs it in a checkout: nothing of theirs is lost, errors are a line."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from absl import logging as absl_logging

from atlas_jax import convert as tool
from atlas_jax.checkpoint import exports
from tests import tiny
from tests.gguf_files import embedding, model_metadata, write_gguf
from tests.tokenizers import CHATML, chatml_tokenizer

TOOL = pathlib.Path("tools/convert_checkpoint.py").absolute()
TEMPLATES = {"default": CHATML, "tool_use": CHATML + "{# tools #}"}


def convert(*args, code=0, through=()):
    """Runs the tool in a process and returns what it says; an error is one line and no more."""
    environment = os.environ | {
        "PYTHONPATH": str(TOOL.parent.parent), "XLA_FLAGS": "", "ATLAS_TRACEBACK": "",
    }  # fmt: skip
    result = subprocess.run(
        [*through, sys.executable, str(TOOL), *map(str, args)], env=environment,
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert result.returncode == code, result.stderr[-3000:]
    return _checked(result.stderr) if code else result.stdout


@pytest.fixture
def here(monkeypatch):
    """The same in this process, which has loaded JAX already."""
    logger = absl_logging.get_absl_logger()
    # The tool's main changes both for its process.
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(logger, "filters", list(logger.filters))

    def convert(*args, code=0):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, args)])
        out, err = io.StringIO(), io.StringIO()
        found = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                tool.main()
            except SystemExit as error:
                found = error.code if isinstance(error.code, int) else 1
                err.write("" if isinstance(error.code, int) else f"{error.code}\n")
        assert found == code, err.getvalue()
        return _checked(err.getvalue()) if code else out.getvalue()

    return convert


def _checked(text):
    assert len(text.splitlines()) == 1, text[-3000:]
    assert text.startswith("error: ")
    return text


def save(directory, seed=0, **kw):
    """Saves a model with two chat templates and no generation_config.json."""
    tiny.hf_model("smollm2", seed).save_pretrained(directory, **kw)
    (directory / "generation_config.json").unlink()
    chatml_tokenizer(TEMPLATES).save_pretrained(directory)
    return directory


def content(directory):
    """Returns everything in a directory, by path."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def weights(directory):
    return {
        name: tensor.tobytes()
        for name, tensor in safetensors.numpy.load_file(directory / "model.safetensors").items()
    }


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model `hf`, another one `hf2`, and the training checkpoint `run` of the first."""
    directory = tmp_path_factory.mktemp("convert")
    save(directory / "hf")
    save(directory / "hf2", 1)
    convert(directory / "hf", directory / "run")
    return directory


def test_a_round_trip_loses_nothing(places, tmp_path):
    convert(places / "run", tmp_path / "out")
    assert weights(tmp_path / "out") == weights(places / "hf")
    for name in ("out", "run/model"):
        where = (tmp_path if name == "out" else places) / name
        assert not (where / "generation_config.json").exists()
        assert transformers.AutoTokenizer.from_pretrained(where).chat_template == TEMPLATES
    marker = json.loads((tmp_path / "out" / exports.MARKER).read_text())
    assert marker["source"] == f"{places / 'run'} (step 0)"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_export_stops_generating_where_its_source_does(here, tmp_path):
    model = transformers.LlamaForCausalLM(tiny.hf_model("smollm2").config)
    model.config.eos_token_id = model.generation_config.eos_token_id = 7
    with torch.no_grad():  # a model that says 7 after every token but 0
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.embed_tokens.weight[7, 0] = 5
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").unlink()
    chatml_tokenizer().save_pretrained(tmp_path / "hf")
    here(tmp_path / "hf", tmp_path / "run")
    here(tmp_path / "run", tmp_path / "out")
    # What an older version left in a run says that there was none, too.
    (tmp_path / "run" / "model" / "generation_config.json").write_text("{}\n")
    here(tmp_path / "run", tmp_path / "older")
    for name in ("hf", "out", "older"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        tokens = loaded.generate(torch.arange(1, 4)[None], max_new_tokens=20, do_sample=False)
        assert tokens[0].tolist() == [1, 2, 3, 7], name


def test_what_the_user_has_is_not_replaced(here, places, tmp_path):
    precious = tmp_path / "precious"
    (precious / "other_model").mkdir(parents=True)
    (precious / "thesis.txt").write_text("mine")
    (precious / "other_model" / "model.safetensors").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("precious")
    before = content(tmp_path)
    for src in ("run", "hf"):
        for dst in ("precious", "link"):
            line = here(places / src, tmp_path / dst, code=1)
            assert f"{tmp_path / dst} is not empty" in line
            assert "it holds other_model, thesis.txt; name another directory" in line
    assert "is a file" in here(places / "run", tmp_path / "file", code=1)
    assert "is not empty" in convert(places / "run", precious, code=1)
    assert content(tmp_path) == before


def test_a_target_that_is_the_source_is_refused(here, places, tmp_path):
    shutil.copytree(places / "run", tmp_path / "run")
    shutil.copytree(places / "hf", tmp_path / "hf")
    (tmp_path / "models").mkdir()
    write_gguf(tmp_path / "models" / "m.gguf", model_metadata(), embedding())
    before = content(tmp_path)
    for src, dst in (
        ("run", "run"), ("run", "run/checkpoints"), ("run", "run/new"), ("run", "."),
        ("run/checkpoints/0", "run"), ("run/checkpoints/0", "run/model"),
        ("hf", "hf"), ("hf", "hf/run"), ("models/m.gguf", "models"), ("models/m.gguf", "."),
    ):  # fmt: skip
        assert "lies inside it" in here(tmp_path / src, tmp_path / dst, code=1), (src, dst)
        assert content(tmp_path) == before, (src, dst)


def test_an_earlier_export_is_replaced_and_what_was_added_to_it_kept(here, places, tmp_path):
    here(places / "run", tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    here(places / "hf2", tmp_path / "run2")
    here(tmp_path / "run2" / "checkpoints" / "0", tmp_path / "out")
    assert weights(tmp_path / "out") == weights(places / "hf2")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    (tmp_path / "out" / "config.json").write_text("mine")
    before = content(tmp_path)
    line = here(places / "run", tmp_path / "out", code=1)
    assert "holds config.json, changed since it was exported" in line
    assert content(tmp_path) == before


def test_a_second_conversion_into_a_run_is_refused(here, places):
    before = content(places)
    line = here(places / "hf2", places / "run", code=1)
    assert "is not empty" in line
    assert "it holds checkpoints, model" in line
    assert content(places) == before


def test_directories_are_told_apart_by_what_they_are(here, places, tmp_path):
    named = tmp_path / "checkpoints" / "500"
    shutil.copytree(places / "hf", named)
    with_folder = shutil.copytree(places / "hf", tmp_path / "with_folder")
    (with_folder / "checkpoints").mkdir()
    # A run has a config.json too, of its options.
    run = shutil.copytree(places / "run", tmp_path / "run")
    (run / "config.json").write_text(json.dumps({"output_dir": str(run)}))
    assert "-> training checkpoint" in here(named, tmp_path / "a")
    assert "-> training checkpoint" in here(with_folder, tmp_path / "b")
    assert "-> Hugging Face directory" in here(run, tmp_path / "c")


def test_wrong_arguments_are_a_line_and_leave_nothing(here, places, tmp_path):
    shutil.copytree(places / "run", tmp_path / "no_model", ignore=lambda *_: ["model"])
    (tmp_path / "empty_run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    before = content(tmp_path)
    run, out = places / "run", tmp_path / "out"
    for dtype in ("fp16", "half", "int8", "float64"):
        line = here(run, out, "--dtype", dtype, code=2)
        assert all(name in line for name in ("auto", "bfloat16", "float16", "float32")), line
    for args, code, words in (
        ([run, out, "--max_shard_size", "0"], 2, "must be positive"),
        ([run], 2, "DST"),
        ([places / "hf", out, "--dtype", "bfloat16"], 1, "--dtype bfloat16 is for exports"),
        ([tmp_path / "nowhere" / "run", out], 1, "does not exist"),
        ([run / "checkpoints" / "7", out], 1, "does not exist"),
        (["nowhere", out], 1, "'nowhere' is neither a directory"),
        ([tmp_path / "no_model", out], 1, "has no model/config.json"),
        ([tmp_path / "empty_run", out], 1, "holds no complete checkpoint"),
        ([tmp_path / "lora", out], 1, "holds a LoRA adapter"),
        ([places / "hf" / "config.json", out], 1, "is a file; give the directory"),
    ):
        assert words in here(*args, code=code), args
        assert content(tmp_path) == before, args


def test_a_full_disk_is_a_line_and_leaves_what_there_was(here, places, tmp_path):
    here(places / "run", tmp_path / "out")
    before = content(tmp_path)
    for src, dst in (("run", "out"), ("run", "new"), ("hf", "new_run")):
        limited = ("bash", "-c", 'ulimit -f 100; exec "$@"', "-")
        line = convert(places / src, tmp_path / dst, code=1, through=limited)
        assert "File too large" in line
        assert line.rstrip().endswith(f"; {tmp_path / dst} is as it was before")
        assert content(tmp_path) == before


def test_the_help_says_what_is_replaced():
    text = convert("--help")
    for words in ("absent or empty", "Anything else that exists is refused", "--dtype", "float16"):
        assert words in text


def test_dtypes_survive_without_the_source(here, tmp_path):
    tiny.save("smollm2", tmp_path / "hf", torch.bfloat16)
    chatml_tokenizer().save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    norm = tiny.hf_model("smollm2").state_dict()["model.norm.weight"].numpy()
    safetensors.numpy.save_file(tensors | {"model.norm.weight": norm}, file)
    before = safetensors.numpy.load_file(file)
    here(tmp_path / "hf", tmp_path / "run")
    shutil.rmtree(tmp_path / "hf")
    assert "(bfloat16 and float32)" in here(tmp_path / "run", tmp_path / "out")
    after = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert {k: (v.dtype, v.tobytes()) for k, v in before.items()} == {
        k: (v.dtype, v.tobytes()) for k, v in after.items()
    }
    assert "(float16)" in here(tmp_path / "run", tmp_path / "half", "--dtype", "float16")
    half = safetensors.numpy.load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {np.dtype("float16")}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
