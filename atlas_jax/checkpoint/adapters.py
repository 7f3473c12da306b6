"""Adapter directories of PEFT: `adapter_config.json` with `adapter_model.safetensors`.

An adapter is written from the factors of a run, read back into them, and read as a model: its base
with the products of its factors added.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from atlas_jax import distributed
from atlas_jax.checkpoint import exports, hf, layout, names, writer
from atlas_jax.models.config import ModelConfig
from atlas_jax.models.lora import FACTORS, Lora
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.train import LoraOptions
from atlas_jax.types import Params

_PREFIX = "base_model.model."
_PARTS = (".lora_A.weight", ".lora_B.weight")


def factors(options: LoraOptions, architecture: ModelConfig, dtype: jnp.dtype) -> Lora:
    """Returns the factors that the options ask for.

    Raises:
        ValueError: for a matrix that the model does not have.
    """
    known = {_target(kind): kind for kind in _linear(architecture) if len(kind.paths) == 1}
    wanted: tuple[str, ...] = options.targets
    if wanted == ("all-linear",) and len(known) == len(_linear(architecture)):
        wanted = tuple(known)
    if missing := [name for name in wanted if name not in known]:
        raise ValueError(
            f"model.lora.targets has {', '.join(missing)}, for which this model takes no factors; "
            f"name some of {', '.join(known)}"
        )
    targets = [known[name].paths[0][1:3] for name in known if name in wanted]
    return Lora(
        rank=options.rank,
        scale=scale_of(options.rank, options.alpha, options.rslora),
        targets=tuple((part, name) for part, name in targets),
        dropout=options.dropout,
        dtype=dtype,
    )


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    """Returns the factor of the product of the factors, `rslora` as in arXiv:2312.03732."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def _linear(architecture: ModelConfig) -> list[names.TensorKind]:
    return [kind for kind in names.entries(architecture) if kind.kind == "linear"]


def _target(kind: names.TensorKind) -> str:
    """Returns PEFT's name of a matrix, such as `q_proj`."""
    return kind.name.split(".")[-2]


def _kinds(decoder: Decoder) -> list[names.TensorKind]:
    """Returns the matrices that have factors."""
    assert decoder.lora is not None
    targets = decoder.lora.targets
    return [kind for kind in _linear(decoder.config) if kind.paths[0][1:3] in targets]


def _tensor_names(kind: names.TensorKind, config: ModelConfig) -> list[tuple[str, str]]:
    """Returns the names of A and B in each layer."""
    modules = [name.removesuffix(".weight") for name in names.hf_names(kind, config)]
    return [(_PREFIX + name + _PARTS[0], _PREFIX + name + _PARTS[1]) for name in modules]


def export(
    params: Params,
    decoder: Decoder,
    options: LoraOptions,
    files: hf.ModelFiles,
    directory: str,
    *,
    base: str,
    source: str,
    unmarked: tuple[str, ...] = (),
) -> None:
    """Writes an adapter that PEFT and vLLM load unchanged; every process must call it.

    Args:
        params: the parameters, factors among them.
        decoder: their architecture and placement.
        options: rank, alpha and so on.
        files: the tokenizer.
        directory: the target, see `hf.export`.
        base: the model that the factors were trained on.
        source: the origin of the weights, for the marker file.
        unmarked: patterns of the files of an export without a marker, see `exports.check`.

    Raises:
        ValueError: if `directory` holds anything that this program may not replace.
        OSError: if a file cannot be written; `directory` is then unchanged.
    """
    whole = jax.jit(lambda tree: tree, out_shardings=decoder.sharding.replicated)
    found: dict[str, np.ndarray] = {}
    for kind in _kinds(decoder):
        stored = names.stored(params, kind.paths[0])
        pair = jax.device_get(whole([stored[name] for name in FACTORS]))
        found |= _to_peft(kind, decoder.config, pair)
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            new = stack.enter_context(exports.replaced(directory, "model", source, unmarked))
            hf.write_tokenizer(new, files.tokenizer)
            config = _config(options, [_target(kind) for kind in _kinds(decoder)], base)
            (new / layout.ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            _write(new / layout.ADAPTER, found)
    if distributed.is_main():
        logging.info("wrote %s, an adapter of %s", directory, base)
    distributed.barrier(f"export {directory}")


def _to_peft(
    kind: names.TensorKind, config: ModelConfig, pair: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the tensors of a matrix in all layers: A is `[r, in]`, B is `[out, r]`."""
    a, b = pair
    rank = a.shape[-1]
    tensors = {}
    for layer, own in enumerate(_tensor_names(kind, config)):
        tensors[own[0]] = np.ascontiguousarray(a[layer].reshape(-1, rank).T)
        tensors[own[1]] = np.ascontiguousarray(b[layer].reshape(rank, -1).T)
    return tensors


def _write(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    dtype = str(next(iter(tensors.values())).dtype)
    header, _ = writer.header([writer.Tensor(n, x.shape) for n, x in tensors.items()], dtype)
    with path.open("wb") as file:
        file.write(header)
        for value in tensors.values():
            file.write(value.view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _config(options: LoraOptions, targets: list[str], base: str) -> dict[str, Any]:
    """Returns the content of `adapter_config.json`."""
    path = os.path.expanduser(base)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.abspath(path) if os.path.exists(path) else base,
        "r": options.rank,
        "lora_alpha": int(options.alpha) if options.alpha == int(options.alpha) else options.alpha,
        "lora_dropout": options.dropout,
        "use_rslora": options.rslora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


class AdapterSource(hf.SafetensorsSource):
    """A base model with an adapter's factors added to its matrices, as a model on disk."""

    def __init__(self, path: str) -> None:
        place = pathlib.Path(path)
        self.base = layout.adapter_base(place)
        super().__init__(hf.resolve(self.base))
        self.path = place
        self.options = layout.read_json(place / layout.ADAPTER_CONFIG)
        self.rank = int(self.options["r"])
        rslora = bool(self.options.get("use_rslora"))
        self.scale = scale_of(self.rank, float(self.options["lora_alpha"]), rslora)
        self._factors = layout.open_file(place / layout.ADAPTER)
        keys = set(self._factors.keys())
        self._pairs = {}
        for name in self.shapes:
            pair = tuple(_PREFIX + name.removesuffix(".weight") + part for part in _PARTS)
            if keys >= set(pair):
                self._pairs[name] = pair
                keys -= set(pair)
        if keys or not self._pairs:
            raise ValueError(
                f"{path} has tensors that its base {self.base} does not explain: "
                f"{layout.some(sorted(keys))}"
            )

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor of the merged model, in the dtype of the base.

        Raises:
            ValueError: as `SafetensorsSource.read`.
        """
        base = super().read(name)
        if name not in self._pairs:
            return base
        a, b = (x.astype(np.float32) for x in self.pair(name))
        return (base.astype(np.float32) + self.scale * (b @ a)).astype(base.dtype)

    def pair(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the factors `[r, in]` and `[out, r]` of a tensor of the base."""
        a, b = (self._factors.get_tensor(part) for part in self._pairs[name])
        return a, b

    @property
    def adapted(self) -> set[str]:
        """The names of the tensors that have factors."""
        return set(self._pairs)


def load(path: str, decoder: Decoder, base: hf.Source) -> Params:
    """Returns the factors of an adapter, placed as `decoder` says.

    Args:
        path: the adapter's directory.
        decoder: has the rank, the scale and the matrices that the adapter must have.
        base: the model of the run, which must be the adapter's.

    Raises:
        ValueError: if the adapter is of other matrices, another rank or another model.
    """
    source = AdapterSource(path)
    lora = decoder.lora
    assert lora is not None
    said = source.options
    if (source.rank, source.scale) != (lora.rank, lora.scale):
        raise ValueError(
            f"{path} has r={said['r']}, lora_alpha={said['lora_alpha']} and use_rslora="
            f"{said.get('use_rslora', False)}; set model.lora.rank, alpha and rslora to these"
        )
    kinds = _kinds(decoder)
    wanted = {name for kind in kinds for name in names.hf_names(kind, decoder.config)}
    if source.adapted != wanted:
        raise ValueError(
            f"{path} has factors for other matrices than model.lora.targets: "
            f"{layout.some(sorted(source.adapted ^ wanted))}; set it to "
            f"{said['target_modules']}"
        )
    if _base_digest(source) != hf.digest(base):
        raise ValueError(
            f"{path} was trained on {source.base}, which is another model than "
            "model_name_or_path; set that to it"
        )
    shapes, _, placements = decoder.trained
    tree: Params = {}
    for kind in kinds:
        pairs = [source.pair(name) for name in names.hf_names(kind, decoder.config)]
        for i, name in enumerate(FACTORS):
            at = (*kind.paths[0][:-1], name)
            shape = names.leaf(shapes, at)
            value = np.stack([pair[i].T for pair in pairs]).reshape(shape.shape)
            hf.set_leaf(
                tree, at, jax.device_put(value.astype(shape.dtype), names.leaf(placements, at))
            )
    return tree


def _base_digest(source: AdapterSource) -> str:
    return hf.digest(hf.SafetensorsSource(hf.resolve(source.base)))
