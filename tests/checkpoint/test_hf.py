"""Hugging Face directories, both ways."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from atlas_jax import convert
from atlas_jax.checkpoint import hf
from atlas_jax.config import MeshConfig
from tests import tiny
from tests.tokenizers import CHATML, chatml_tokenizer


def tensors(directory):
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= safetensors.numpy.load_file(path)
    return found


def export(decoder, params, source, directory, dtype, size=10**9):
    files = hf.model_files(hf.SafetensorsSource(source), chatml_tokenizer())
    files = files._replace(generation_config={"eos_token_id": [1, 2]})
    options = {"dtype": dtype, "max_shard_size": size, "source": "test"}
    hf.export(params, decoder, files, str(directory), **options)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bitwise(family, dtype, tmp_path):
    path = tiny.save(family, tmp_path / "source", getattr(torch, dtype), max_shard_size="100KB")
    decoder, params = tiny.load(path, MeshConfig(fsdp=4, tensor=2))
    export(decoder, params, path, tmp_path / "out", dtype, size=100_000)
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert after[name].tobytes() == value.tobytes(), name
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


@pytest.mark.usefixtures("torch_to_find")
def test_export_loads_in_transformers_without_a_warning(tmp_path):
    path = tiny.save("qwen3", tmp_path / "source")
    decoder, params = tiny.load(path)
    export(decoder, params, path, tmp_path / "out", "float32")
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "import transformers as t, torch, sys\n"
        "m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "t.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(m(torch.arange(1, 9)[None]).logits.double().sum().item())"
    )
    command = [sys.executable, "-c", code]
    runs = [
        subprocess.run([*command, str(tmp_path / d)], capture_output=True, text=True, check=False)
        for d in ("out", "source")
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert not [x for x in runs[0].stderr.splitlines() if "warn" in x.lower() or "newly" in x]
    expected = tiny.hf_model("qwen3")(torch.arange(1, 9)[None]).logits.double().sum().item()
    assert float(runs[0].stdout) == pytest.approx(expected, abs=1e-3)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1, 2]


def test_every_device_holds_its_part_only(tmp_path):
    decoder, params = tiny.load(tiny.save("llama2", tmp_path), MeshConfig(fsdp=8))
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    one = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
    assert one < total / 7
    assert decoder.sharding.num_replicas == 8


def rewrite(path, change):
    file = path / "model.safetensors"
    content = safetensors.numpy.load_file(file)
    change(content)
    safetensors.numpy.save_file(content, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "missing model.layers.1.mlp.up_proj",
        ),
        (lambda t: t.update(spare=np.zeros(3, np.float32)), "unknown spare"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(3, np.float32)}),
            r"model.norm.weight has shape \(3,\), but config.json asks for \(64,\)",
        ),
        (lambda t: t.update({"model.norm.weight": np.zeros(64, np.int32)}), "dtype I32"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message, tmp_path):
    path = tiny.save("llama2", tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        tiny.load(path)


def test_tied_weights_that_differ_are_refused(tmp_path):
    path = tiny.save("smollm2", tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": np.ones((400, 64), np.float32)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        tiny.load(path)


def test_a_truncated_file_is_named(tmp_path):
    path = tiny.save("llama2", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors .* is truncated"):
        hf.SafetensorsSource(path)


def test_an_index_that_names_a_lost_file_is_an_error(tmp_path):
    path = tiny.save("llama2", tmp_path, max_shard_size="100KB")
    next(iter(tmp_path.glob("model-00002*"))).unlink()
    with pytest.raises(ValueError, match="named in the index but does not exist"):
        hf.SafetensorsSource(path)


def test_a_directory_without_weights_or_config_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no model: it has no config\.json"):
        hf.open_source(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"no \*.safetensors file"):
        hf.open_source(str(tmp_path))


def test_what_is_no_model_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match="/nothing does not exist; give a directory"):
        hf.resolve(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is a file; give the directory"):
        hf.open_source(str(tmp_path / "config.json"))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ValueError, match=r"holds a LoRA adapter .* its base model org/base"):
        hf.open_source(str(tmp_path))


def two_models(directory, **kw):
    """Saves one model as `save_pretrained` does, then another into the same directory."""
    tiny.save("qwen2", directory, **kw)
    other = tiny.hf_model("qwen2", 1)
    other.save_pretrained(directory)
    return str(directory)


def as_transformers_loads(path):
    """Returns the weights, compared with what transformers loads from the same directory."""
    source = hf.open_source(path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert source.shapes.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(source.read(name), tensor.numpy())
    return source


def test_a_whole_file_comes_before_an_index(tmp_path, caplog):
    path = two_models(tmp_path / "stale_index", max_shard_size="100KB")
    assert not list((tmp_path / "stale_index").glob("model-*"))  # transformers removed them
    as_transformers_loads(path)
    tiny.save("qwen2", tmp_path / "shards", max_shard_size="100KB")
    both = shutil.copytree(tmp_path / "shards", tmp_path / "both")
    tiny.hf_model("qwen2", 1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", both)
    caplog.clear()
    found = as_transformers_loads(str(both)).read("model.norm.weight")
    np.testing.assert_array_equal(
        found, tiny.hf_model("qwen2", 1).state_dict()["model.norm.weight"].numpy()
    )
    assert "model-00001-of-0000" in caplog.text
    assert "not read" in caplog.text


def test_with_an_index_only_its_shards_count(tmp_path, caplog):
    path = tiny.save("qwen2", tmp_path, max_shard_size="100KB")
    tiny.hf_model("qwen2", 1).save_pretrained(tmp_path / "other")
    for name in ("zz_old.safetensors", "model-00001-of-00002.safetensors"):
        shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / name)
    as_transformers_loads(path)
    assert "model-00001-of-00002.safetensors, zz_old.safetensors not read" in caplog.text


def test_a_second_copy_is_not_merged(tmp_path, caplog):
    path = tiny.save("qwen2", tmp_path)
    tiny.hf_model("qwen2", 1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "model_old.safetensors")
    safetensors.numpy.save_file({"x": np.zeros(3)}, tmp_path / "consolidated.safetensors")
    as_transformers_loads(path)
    assert "consolidated.safetensors, model_old.safetensors not read" in caplog.text


def test_a_whole_set_of_shards_without_an_index_is_read(tmp_path):
    path = tiny.save("qwen2", tmp_path, max_shard_size="100KB")
    expected = hf.open_source(path)
    (tmp_path / "model.safetensors.index.json").unlink()
    found = hf.open_source(path)
    assert found.shapes == expected.shapes
    for name in found.shapes:
        np.testing.assert_array_equal(found.read(name), expected.read(name))


@pytest.mark.parametrize(
    "names",
    [
        ("weights.safetensors",),
        ("model-00001-of-00002.safetensors",),
        ("model-00001-of-00001.safetensors", "model-00001-of-00002.safetensors"),
        ("a.safetensors", "b.safetensors"),
    ],
)
def test_files_that_are_no_set_are_refused_by_name(names, tmp_path):
    path = tiny.save("qwen2", tmp_path)
    for name in names:
        shutil.copy(tmp_path / "model.safetensors", tmp_path / name)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=f"neither model.safetensors nor .* {', '.join(names)} is no"
    ):
        hf.open_source(path)


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "a/../../b", 3])
def test_an_index_that_leaves_its_directory_is_refused(file, tmp_path):
    path = tiny.save("qwen2", tmp_path / "model", max_shard_size="100KB")
    tiny.save("qwen2", tmp_path / "other")
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"outside its directory|does not exist"):
        hf.open_source(path)


def test_an_index_without_content_is_refused(tmp_path):
    path = tiny.save("qwen2", tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        hf.open_source(path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json holds no JSON object"):
        hf.open_source(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    path = tiny.save("qwen2", tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    first, second, *_ = sorted(tmp_path.glob("model-*"))
    shutil.copy(first, second)
    with pytest.raises(ValueError, match=r"in model-00002-of-0000\d.safetensors and another file"):
        hf.open_source(path)


def test_a_tied_model_that_stores_only_its_head_is_refused(tmp_path):
    path = tiny.save("smollm2", tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    with pytest.raises(ValueError, match=r"missing model\.embed_tokens\.weight"):
        tiny.load(path)


def say(path, **dtype):
    """Changes what `config.json` says of the dtype."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    kept = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    file.write_text(json.dumps(kept | dtype))


def back(path, out, **options):
    """Exports with dtype `auto` and returns the source's tensors and the export's."""
    decoder, params = tiny.load(str(path))
    export(decoder, params, str(path), out, "auto", **options)
    return tensors(path), tensors(out)


SAID = [{}, {"dtype": "bfloat16"}, {"torch_dtype": "float32"}, {"torch_dtype": "torch.bfloat16"}]


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_auto_is_what_the_files_hold_whatever_the_config_says(said, stored, tmp_path):
    tiny.save("qwen3", tmp_path / "source", getattr(torch, stored))
    say(tmp_path / "source", **said)
    before, after = back(tmp_path / "source", tmp_path / "out")
    assert {k: (v.dtype, v.tobytes()) for k, v in before.items()} == {
        k: (v.dtype, v.tobytes()) for k, v in after.items()
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == stored
    assert "torch_dtype" not in config


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("size", [10**9, 60_000])
def test_tensors_of_several_dtypes_keep_each_its_own(said, size, tmp_path):
    tiny.save("smollm2", tmp_path / "source", torch.bfloat16)
    norms = tiny.hf_model("smollm2").state_dict()  # float32

    def change(content):
        content |= {k: v.numpy() for k, v in norms.items() if "norm" in k}
        content["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float16)

    rewrite(tmp_path / "source", change)
    say(tmp_path / "source", **said)
    before, after = back(tmp_path / "source", tmp_path / "out", size=size)
    before.pop("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert {v.dtype.name for v in after.values()} == {"bfloat16", "float32"}
    assert {k: (v.dtype, v.tobytes()) for k, v in before.items()} == {
        k: (v.dtype, v.tobytes()) for k, v in after.items()
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == ("float32" if "float32" in said.values() else "bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    np.testing.assert_array_equal(
        model.state_dict()["model.norm.weight"].numpy(), norms["model.norm.weight"].numpy()
    )


def test_the_dtypes_of_a_run_outlast_its_source(tmp_path):
    tiny.save("smollm2", tmp_path / "source", torch.bfloat16)
    norm = tiny.hf_model("smollm2").state_dict()["model.norm.weight"].numpy()
    rewrite(tmp_path / "source", lambda t: t.update({"model.norm.weight": norm}))
    files = hf.model_files(hf.open_source(str(tmp_path / "source")), chatml_tokenizer())
    hf.write_run_files(str(tmp_path / "model"), files)
    found = convert.read_files(str(tmp_path / "model"), lambda _: None)
    assert found.dtype == files.dtype
    assert found.dtype["model.norm.weight"] == "float32"
    assert found.config == files.config
    hf.write_run_files(str(tmp_path / "model"), files._replace(dtype="bfloat16"))
    assert convert.read_files(str(tmp_path / "model"), lambda _: None).dtype == "bfloat16"


@pytest.mark.parametrize("of_run", [False, True])
def test_no_generation_config_is_written_where_there_was_none(of_run, tmp_path):
    tiny.save("smollm2", tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").unlink()
    files = hf.model_files(hf.open_source(str(tmp_path / "source")), chatml_tokenizer())
    if of_run:  # what older versions left says that there was none, too
        hf.write_files(str(tmp_path / "run"), files)
        (tmp_path / "run" / "generation_config.json").write_text("{}\n")
        hf.write_run_files(str(tmp_path / "run"), files)
        assert not (tmp_path / "run" / "generation_config.json").exists()
        (tmp_path / "run" / "generation_config.json").write_text("{}\n")
        files = convert.read_files(str(tmp_path / "run"), lambda _: chatml_tokenizer())
    hf.write_files(str(tmp_path / "out"), files)
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_a_tokenizer_with_several_templates_is_exported(tmp_path):
    templates = {"default": CHATML, "tool_use": CHATML + "{# tools #}"}
    path = tiny.save("smollm2", tmp_path / "source")
    decoder, params = tiny.load(path)
    files = hf.model_files(hf.open_source(path), chatml_tokenizer(templates))
    for _ in range(2):  # the second replaces the first, its folder too
        hf.export(
            params, decoder, files, str(tmp_path / "out"), dtype="auto", max_shard_size=10**9,
            source="",
        )  # fmt: skip
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == templates


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="neither a directory nor"):
        hf.resolve("nobody/there")


def test_loading_holds_one_tensor_not_the_model(tmp_path):
    """A model of several shards, loaded in a process whose host allocations are traced."""
    big = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=12, vocab_size=2048)
    config = transformers.LlamaConfig(**(tiny._SIZES | big), tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="5MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    code = (
        "import sys, tracemalloc\n"
        "from tests import tiny\n"
        "import numpy, jax\n"
        "tiny.load(sys.argv[1], devices=jax.devices()[:1])\n"  # imports, which are no tensors
        "tracemalloc.start()\n"
        "d, p = tiny.load(sys.argv[1], devices=jax.devices()[:1])\n"
        "print(tracemalloc.get_traced_memory()[1], sum(x.nbytes for x in jax.tree.leaves(p)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    peak, total = map(int, subprocess.check_output(command, text=True).split())
    assert peak < total / 4, json.dumps({"peak": peak, "total": total})
