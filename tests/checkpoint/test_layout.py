"""Directories that hold no trainable model are named for what they are."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from atlas_jax import preflight
from atlas_jax.checkpoint import hf, layout

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def make(directory, files, config=()):
    """Writes files: name -> text, bytes, or tensors; `config.json` too, unless it is None."""
    everything = dict(files)
    if config is not None:
        everything["config.json"] = json.dumps({"model_type": "llama"} | dict(config))
    for name, content in everything.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            safetensors.numpy.save_file(content, file)
        else:
            file.write_bytes(content.encode() if isinstance(content, str) else content)
    return directory


ONE = {"model.embed_tokens.weight": np.zeros((2, 2), np.float32)}
ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors",
                                   "b": "model-00002-of-00002.safetensors"}})  # fmt: skip

FOREIGN = {
    "adapter": ({"adapter_config.json": ADAPTER, "adapter_model.safetensors": ONE}, None,
                "a LoRA adapter .* merge it into its base model org/base "),
    "adapter beside a model": ({"adapter_config.json": ADAPTER, "model.safetensors": ONE}, {},
                               "a LoRA adapter .* base model org/base "),
    "other adapter": ({"adapter_config.json": '{"peft_type": "IA3"}'}, None, "a IA3 adapter"),
    "adapter of MLX": ({"adapter_config.json": '{"fine_tune_type": "lora", "model": "org/mlx"}',
                        "adapters.safetensors": ONE}, None, "a LoRA adapter .* model org/mlx "),
    "adapter without its config": ({"adapter_model.bin": "x"}, {}, "an adapter .adapter_model.bin"),
    "diffusers": ({"model_index.json": "{}", "unet/config.json": "{}"}, None, "diffusers pipeline"),
    "Meta": ({"consolidated.00.pth": "x", "params.json": "{}", "tokenizer.model": "x"}, None,
             r"Meta's original layout \(consolidated.00.pth\)"),
    "Mistral": ({"consolidated.safetensors": ONE, "params.json": "{}"}, None,
                "Mistral's own layout"),
    "Mistral with config": ({"consolidated.safetensors": ONE}, {}, "Mistral's own layout"),
    "GGUF": ({"a-Q4_K_M.gguf": "GGUF"}, None, "holds GGUF files .*give one of them"),
    "pickles": ({"pytorch_model.bin": "x"}, {}, r"pickled PyTorch weights \(pytorch_model.bin\)"),
    "sharded pickles": ({"pytorch_model-00001-of-00002.bin": "x", "training_args.bin": "x",
                         "pytorch_model.bin.index.json": "{}"}, {}, "pickled PyTorch weights"),
    "Flax": ({"flax_model.msgpack": "x"}, {}, "holds Flax weights"),
    "TensorFlow": ({"tf_model.h5": "x"}, {}, "holds TensorFlow weights"),
    "ONNX": ({"onnx/model.onnx": "x"}, {}, r"an ONNX export \(onnx/model.onnx\)"),
    "OpenVINO": ({"openvino_model.xml": "x", "openvino_model.bin": "x"}, {}, "an OpenVINO export"),
    "distributed": ({".metadata": "x", "__0_0.distcp": "x"}, None,
                    "distributed PyTorch checkpoint"),
    "DeepSpeed": ({"global_step9/mp_rank_00_model_states.pt": "x",
                   "global_step9/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": "x"}, None,
                  "a DeepSpeed checkpoint"),
    "NeMo": ({"model.nemo": "x"}, None, "a NeMo archive"),
    "settings alone": ({"training_args.bin": "x"}, {}, "has no .*safetensors file, nor other"),
    "nothing": ({"notes.txt": "x"}, None, "is no model: it has no config.json"),
    "GPTQ": ({"model.safetensors": ONE}, {"quantization_config": {"quant_method": "gptq"}},
             r"is quantised \(gptq\); training needs weights in bfloat16, float16, float32"),
    "AWQ": ({"model.safetensors": ONE}, {"quantization_config": {"quant_method": "awq", "bits": 4}},
            r"is quantised \(awq\)"),
    "bitsandbytes": ({"model.safetensors": ONE},
                     {"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    "FP8": ({"model.safetensors": ONE}, {"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    "compressed-tensors": ({"model.safetensors": ONE},
                           {"compression_config": {"format": "pack-quantized"}}, "pack-quantized"),
    "MLX": ({"model.safetensors": ONE}, {"quantization": {"group_size": 64, "bits": 4}},
            r"is quantised \(MLX\)"),
    "GPTQ of old": ({"model.safetensors": ONE, "quantize_config.json": "{}"}, {},
                    r"is quantised \(quantize_config.json\)"),
    "GPTQ that says nothing": (
        {"model.safetensors": {"model.layers.0.mlp.up_proj.qweight": np.zeros(2, np.int32)}}, {},
        "has quantised tensors .model.layers.0.mlp.up_proj.qweight"),
    "eight bits that say nothing": (
        {"model.safetensors": {"model.norm.weight": np.zeros(2, np.int8)}}, {},
        "model.norm.weight has dtype I8; supported are BF16, F16, F32"),
    "a lost shard": ({"model.safetensors.index.json": INDEX,
                      "model-00001-of-00002.safetensors": ONE}, {},
                     r"model-00002-of-00002.safetensors is named in the index but does not exist"),
    "a pointer": ({"model.safetensors": POINTER}, {}, "pointer of Git LFS.* git lfs pull"),
    "a pointer in a set": ({"model.safetensors.index.json": INDEX,
                            "model-00001-of-00002.safetensors": ONE,
                            "model-00002-of-00002.safetensors": POINTER}, {},
                           "model-00002-of-00002.safetensors is a pointer of Git LFS"),
    "all pointers": ({"config.json": POINTER, "model.safetensors": POINTER}, None,
                     "config.json is a pointer of Git LFS"),
    "an index that is a pointer": ({"model.safetensors.index.json": POINTER}, {},
                                   "index.json is a pointer of Git LFS"),
    "an empty file": ({"model.safetensors": b""}, {}, r"model.safetensors is empty; download"),
    "a cut file": ({"model.safetensors": b"\x50\0\0\0\0\0\0\0{"}, {}, "9 bytes. is truncated"),
    "a web page": ({"model.safetensors": "<!doctype html><html>not found</html>"}, {},
                   "is truncated or no safetensors file"),
    "no tensors": ({"model.safetensors": {}}, {}, "has no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_no_trainable_model_is_named_in_a_line_before_it_is_opened(case, tmp_path):
    files, config, message = FOREIGN[case]
    path = make(tmp_path / "model", files, config)
    for check in (preflight.check_model, hf.open_source):
        with pytest.raises(ValueError, match=message) as found:
            check(str(path))
        assert "\n" not in str(found.value)
        assert str(path) in str(found.value) or "has dtype" in str(found.value)


@pytest.mark.parametrize(
    ("files", "used"),
    [
        ({"model.safetensors": ONE, "model.safetensors.index.json": INDEX}, ["model.safetensors"]),
        ({"model.safetensors": ONE, "consolidated.safetensors": ONE, "pytorch_model.bin": "x",
          "onnx/model.onnx": "x", "original/consolidated.00.pth": "x"}, ["model.safetensors"]),
        ({f"model-0000{i}-of-00002.safetensors": {f"{i}.weight": ONE["model.embed_tokens.weight"]}
          for i in (1, 2)}, [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]),
    ],
)  # fmt: skip
def test_everybody_takes_the_same_files_for_the_weights(files, used, tmp_path):
    path = make(tmp_path / "model", files)
    preflight.check_model(str(path))
    source = hf.open_source(str(path))
    assert [file.name for file in layout.weight_files(path)] == used
    assert source.shapes.keys() == {
        name for file in used for name in safetensors.numpy.load_file(path / file)
    }


def test_no_module_but_one_knows_the_names_of_weight_files():
    package = pathlib.Path(layout.__file__).parents[1]
    knowing = {f.name for f in package.rglob("*.py") if layout.INDEX in f.read_text()}
    assert knowing == {"layout.py"}
