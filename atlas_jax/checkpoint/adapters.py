"""Adapter directories of PEFT: `adapter_config.json` with `adapter_model.safetensors`.

An adapter is written from the factors of a run, read back into them, and read as a model: its base
with the products of its factors added.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding

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
    found = [known[name].paths[0][1:3] for name in known if name in wanted]
    return Lora(
        rank=options.rank,
        scale=scale_of(options.rank, options.alpha, options.rslora),
        targets=tuple((part, name) for part, name in found),
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
    adapted = decoder.lora.targets
    return [kind for kind in _linear(decoder.config) if kind.paths[0][1:3] in adapted]


def targets(decoder: Decoder) -> list[str]:
    """Returns the matrices that have factors, by their names in PEFT."""
    return [_target(kind) for kind in _kinds(decoder)]


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
    found = tensors(params, decoder)
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            new = stack.enter_context(exports.replaced(directory, "model", source, unmarked))
            hf.write_tokenizer(new, files.tokenizer)
            write(new, found, peft_config(options, decoder, base))
    if distributed.is_main():
        logging.info("wrote %s, an adapter of %s", directory, base)
    distributed.barrier(f"export {directory}")


def tensors(params: Params, decoder: Decoder, dtype: str | None = None) -> dict[str, np.ndarray]:
    """Returns the tensors of an adapter by their names in PEFT; every process must call it.

    Args:
        params: the parameters, factors among them.
        decoder: their architecture and placement.
        dtype: dtype of the tensors; None leaves theirs.
    """
    whole = _gathering(decoder.sharding.replicated, dtype)
    found: dict[str, np.ndarray] = {}
    for kind in _kinds(decoder):
        pair = [names.leaf(params, (*kind.paths[0][:-1], name)) for name in FACTORS]
        found |= _to_peft(kind, decoder.config, jax.device_get(whole(pair)))
    return found


@functools.lru_cache
def _gathering(place: NamedSharding, dtype: str | None) -> Callable[[list[jax.Array]], Any]:
    """Returns the compiled copy of arrays to every device."""

    def run(pair: list[jax.Array]) -> list[jax.Array]:
        return [one if dtype is None else one.astype(dtype) for one in pair]

    return jax.jit(run, out_shardings=place)


def shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors of an adapter by their names in PEFT."""
    stored, _, _ = decoder.trained
    found: dict[str, tuple[int, ...]] = {}
    for kind in _kinds(decoder):
        a, b = (names.leaf(stored, (*kind.paths[0][:-1], name)).shape for name in FACTORS)
        for own in _tensor_names(kind, decoder.config):
            found[own[0]] = a[-1], math.prod(a[1:-1])
            found[own[1]] = math.prod(b[2:]), b[1]
    return found


def write(
    directory: pathlib.Path, values: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> None:
    """Writes the two files of an adapter into an existing directory.

    Args:
        directory: the directory.
        values: all tensors, of one dtype, by name.
        config: the content of `adapter_config.json`.

    Raises:
        OSError: if a file cannot be written.
    """
    (directory / layout.ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    _write(directory / layout.ADAPTER, values)


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


def _write(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    dtype = str(next(iter(tensors.values())).dtype)
    header, _ = writer.header([writer.Tensor(n, x.shape) for n, x in tensors.items()], dtype)
    with path.open("wb") as file:
        file.write(header)
        for value in tensors.values():
            file.write(value.view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def peft_config(options: LoraOptions, decoder: Decoder, base: str) -> dict[str, Any]:
    """Returns the content of `adapter_config.json` of an adapter of the model `base`."""
    path = os.path.expanduser(base)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.abspath(path) if os.path.exists(path) else base,
        "r": options.rank,
        "lora_alpha": int(options.alpha) if options.alpha == int(options.alpha) else options.alpha,
        "lora_dropout": options.dropout,
        "use_rslora": options.rslora,
        "target_modules": targets(decoder),
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
