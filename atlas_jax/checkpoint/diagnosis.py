"""Names for directories that hold no model with safetensors: adapters, and files of other tools.

A directory is told from the names of its files. Imports no JAX.
"""

from __future__ import annotations

import pathlib

from atlas_jax.checkpoint import layout

_BASE = "merge it into its base model{} (peft: merge_and_unload, save_pretrained); give the result"
_SAVE = "load it with transformers and save_pretrained, which writes safetensors"
_CONVERT = "give that model in Hugging Face layout; transformers has a script that converts it"
_SOURCE = "give the model that it was made of"
_WRITE = "write a Hugging Face model of it"
_FOREIGN = (
    ("model_index.json", "a diffusers pipeline", "give a language model"),
    ("consolidated*.pth", "a checkpoint in Meta's original layout", _CONVERT),
    ("consolidated*.safetensors", "a checkpoint in Mistral's own layout", _CONVERT),
    ("*.gguf", "GGUF files", "give one of them instead of their directory"),
    ("pytorch_model*.bin", "pickled PyTorch weights", _SAVE),
    ("flax_model*.msgpack", "Flax weights", _SAVE),
    ("tf_model*.h5", "TensorFlow weights", _SAVE),
    ("*.onnx", "an ONNX export", _SOURCE),
    ("onnx/*.onnx", "an ONNX export", _SOURCE),
    ("openvino_model*.xml", "an OpenVINO export", _SOURCE),
    ("*.engine", "a TensorRT engine", _SOURCE),
    ("*.mlmodelc", "a Core ML export", _SOURCE),
    ("*.mlpackage", "a Core ML export", _SOURCE),
    ("*.tflite", "a LiteRT export", _SOURCE),
    ("weights*.npz", "an MLX model in its old format", _SOURCE),
    ("*.distcp", "a distributed PyTorch checkpoint", _WRITE),
    ("*/*.distcp", "a distributed PyTorch checkpoint", _WRITE),
    ("*zero_pp_rank_*", "a DeepSpeed checkpoint", _WRITE),
    ("*/*zero_pp_rank_*", "a DeepSpeed checkpoint", _WRITE),
    ("mp_rank_*", "a Megatron or DeepSpeed checkpoint", _WRITE),
    ("*/mp_rank_*", "a Megatron or DeepSpeed checkpoint", _WRITE),
    ("*.nemo", "a NeMo archive", _WRITE),
    ("_CHECKPOINT_METADATA", "an Orbax checkpoint", "give a run, or its checkpoints/STEP"),
    ("*.pth", "pickled PyTorch weights", _SAVE),
    ("*.ckpt", "pickled PyTorch weights", _SAVE),
    ("*model*.bin", "pickled PyTorch weights", _SAVE),
    ("*model*.pt", "pickled PyTorch weights", _SAVE),
)
"""Diagnosis and advice for a directory without safetensors weights, by a file that it has."""

_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors",
             "pytorch_lora_weights.safetensors")  # fmt: skip


def check_adapter(path: pathlib.Path) -> None:
    """Checks that a path is a directory, and not one with an adapter.

    Raises:
        ValueError: if it is not; the message names the adapter's base model.
    """
    if path.is_file():
        raise ValueError(f"{path} is a file; give the directory that holds it")
    if (path / layout.ADAPTER_CONFIG).exists():
        raise ValueError(_no_model(path))
    held = [name for name in _ADAPTERS if (path / name).exists()]
    if held and not (path / layout.WHOLE).exists() and not (path / layout.INDEX).exists():
        raise ValueError(
            f"{path} holds an adapter ({held[0]}), not a whole model; {_BASE.format('')}"
        )


_PLAIN: dict[str, object] = {
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": [],
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": [],
    "trainable_token_indices": [],
}
"""Options of PEFT that change what an adapter computes, with the value that does not."""


def adapter_base(path: pathlib.Path) -> str:
    """Returns the base model of a LoRA adapter of PEFT, whose options are checked.

    Raises:
        ValueError: for another kind of adapter, or an option that changes what it computes.
    """
    content = layout.read_json(path / layout.ADAPTER_CONFIG)
    needed = ("r", "lora_alpha", "base_model_name_or_path")
    problems = [f"without {name}" for name in needed if not content.get(name)]
    problems += [f"with {k}" for k, plain in _PLAIN.items() if (content.get(k) or plain) != plain]
    if not (path / layout.ADAPTER).exists():
        problems.append(f"without {layout.ADAPTER}")
    if problems or str(content.get("peft_type")).upper() != "LORA":
        raise ValueError(_no_model(path, ", ".join(problems)))
    layout.check_fetched(path / layout.ADAPTER)
    return str(content["base_model_name_or_path"])


def _no_model(path: pathlib.Path, why: str = "") -> str:
    """Returns the sentence about an adapter that cannot be taken, with its base model."""
    content = layout.read_json(path / layout.ADAPTER_CONFIG)
    kind = str(content.get("peft_type") or content.get("fine_tune_type") or "LoRA")
    kind = "LoRA" if kind.lower() == "lora" else kind
    base = content.get("base_model_name_or_path") or content.get("model") or ""
    return (
        f"{path} holds a {kind} adapter ({layout.ADAPTER_CONFIG}), not a whole model"
        f"{f' ({why})' if why else ''}; {_BASE.format(f' {base}' if base else '')}"
    )


def foreign(path: pathlib.Path) -> str:
    """Returns the diagnosis of a directory without safetensors weights; "" if it is unknown."""
    for pattern, what, advice in _FOREIGN:
        if file := next(path.glob(pattern), None):
            name = file.relative_to(path)
            return f"{path} holds {what} ({name}) and no safetensors of a model; {advice}"
    return ""
