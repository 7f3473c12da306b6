"""Hugging Face directories: read into sharded arrays, and written as transformers and vLLM load.

Reading goes tensor by tensor: the host holds one of them, the devices hold their shards. Writing
goes file by file, into a directory beside the target that takes its name when it is whole. What may
be replaced by it is decided in `exports`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from atlas_jax import distributed
from atlas_jax.checkpoint import exports, gguf, layout, names, writer
from atlas_jax.models.config import from_hf
from atlas_jax.models.transformer import Decoder
from atlas_jax.types import Params

_DOWNLOADS = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")
_DTYPES_FILE = "dtypes.json"


@runtime_checkable
class Source(Protocol):
    """A model on disk under Hugging Face names and shapes; `[out, in]` for linear maps."""

    @property
    def config(self) -> dict[str, Any]:
        """Content of `config.json`."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """Content of `generation_config.json`; empty where there is none."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor."""


class SafetensorsSource:
    """A directory with `config.json` and the safetensors files that transformers would load."""

    def __init__(self, path: str) -> None:
        self.path = pathlib.Path(path)
        files = layout.check(self.path)
        self.config = layout.read_json(self.path / "config.json")
        generation = self.path / "generation_config.json"
        self.generation_config = layout.read_json(generation) if generation.exists() else {}
        self._files: dict[str, Any] = {}
        for file in files:
            content = layout.open_file(file)
            for name in content.keys():  # noqa: SIM118  (not a dict)
                if name in self._files:
                    raise ValueError(
                        f"{self.path} has tensor {name} in {file.name} and another file; "
                        "download the model again"
                    )
                self._files[name] = content
        self.shapes = {
            name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor in the dtype in which it is stored.

        Raises:
            ValueError: if it is stored in a dtype other than bf16, fp16 or fp32.
        """
        self.dtype(name)
        return self._files[name].get_tensor(name)

    def dtype(self, name: str) -> str:
        """Returns the dtype in which a tensor is stored; raises as `read` does."""
        return layout.dtype_of(name, self._files[name])


def resolve(name_or_path: str) -> str:
    """Returns a local path: itself if it exists, else the hub repository of that name, fetched.

    Raises:
        ValueError: if it is neither.
    """
    local = os.path.expanduser(name_or_path)
    if os.path.exists(local):
        return local
    if name_or_path.count("/") > 1 or name_or_path.startswith((".", "~", "/")):
        raise ValueError(
            f"{name_or_path} does not exist; give a directory, a .gguf file or a hub id"
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return huggingface_hub.snapshot_download(name_or_path, allow_patterns=list(_DOWNLOADS))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model {name_or_path!r} is neither a directory nor a .gguf file here, and the hub "
            f"does not give it: {' '.join(str(error).split())}"
        ) from None


def open_source(path: str) -> Source:
    """Opens a model directory or a `.gguf` file.

    Raises:
        ValueError: if it is incomplete or not supported.
    """
    return gguf.GGUFSource(path) if path.endswith(".gguf") else SafetensorsSource(path)


def _stored_dtype(source: Source) -> writer.Dtype:
    """Returns the dtype in which the weights are stored, of each tensor if they differ.

    Files decide, because `config.json` may say another dtype; a GGUF file is what its config says.
    """
    if not isinstance(source, SafetensorsSource):
        return source.config["dtype"]
    config = from_hf(source.config)
    exported = [name for entry in names.entries(config) for name in names.hf_names(entry, config)]
    # `load` refuses a source where one is missing.
    found = {name: source.dtype(name) for name in exported if name in source.shapes}
    different = set(found.values())
    return found if len(different) > 1 else different.pop() if different else "float32"


def _main_dtype(dtype: writer.Dtype, config: Mapping[str, Any]) -> str:
    """Returns what `config.json` is to say: what it says if it is true, else the usual dtype."""
    if isinstance(dtype, str):
        return dtype
    said = str(config.get("dtype") or config.get("torch_dtype"))
    usual = collections.Counter(dtype.values()).most_common(1)[0][0]
    return said if said in dtype.values() else usual


def digest(source: Source) -> str:
    """Returns a short hash that tells the weights of a model from those of others.

    It covers all names and shapes, and the numbers of a few tensors; some fine-tunings change the
    attention alone, others the rest alone.
    """
    names = sorted(source.shapes)
    total = hashlib.sha256(json.dumps([(n, source.shapes[n]) for n in names]).encode())
    for kind in ("q_proj.weight", "qkv_proj.weight", "down_proj.weight"):
        for name in [n for n in names if n.endswith(kind)][-1:]:
            total.update(np.ascontiguousarray(source.read(name)).tobytes())
    return total.hexdigest()[:16]


def load(source: Source, decoder: Decoder) -> Params:
    """Returns the parameters of `source`, sharded as `decoder` says, in its parameter dtype.

    Raises:
        ValueError: names the tensors that are missing, unknown or of another shape.
    """
    _check(source, decoder)
    placements = decoder.placements()
    params: Params = {}
    for entry in names.entries(decoder.config):
        places = [names.leaf(placements, path) for path in entry.paths]
        values = _load_kind(source, decoder, entry, places)
        for path, value in zip(entry.paths, values, strict=True):
            _set(params, path, value)
    return params


def _load_kind(
    source: Source,
    decoder: Decoder,
    entry: names.Entry,
    places: list[jax.sharding.NamedSharding],
) -> list[jax.Array]:
    """Returns the parameters in the tensors of one kind, stacked where each layer has one."""
    shapes = names.shapes_of(entry, decoder.shapes)
    dtype = decoder.param_dtype
    if not entry.per_layer:
        found = names.from_hf(entry, source.read(entry.name), shapes)
        return [_place(x, place).astype(dtype) for x, place in zip(found, places, strict=True)]
    # Layers are stacked in device memory also where they are to rest in the host's: JAX writes no
    # device array into a host one.
    stacks = [
        _zeros((decoder.config.num_layers, *shape), dtype, _with_spec(place, place.spec))
        for shape, place in zip(shapes, places, strict=True)
    ]
    for i, name in enumerate(names.hf_names(entry, decoder.config)):
        found = names.from_hf(entry, source.read(name), shapes)
        for k, (tensor, place) in enumerate(zip(found, places, strict=True)):
            one = _with_spec(place, place.spec[1:])
            stacks[k] = _write_layer(stacks[k], _place(tensor, one), np.int32(i))
        # Dispatch runs ahead of the writes; without waiting, many tensors would be held at once.
        jax.block_until_ready(stacks)
    return [jax.device_put(x, place) for x, place in zip(stacks, places, strict=True)]


def _with_spec(place: jax.sharding.NamedSharding, spec: Any) -> jax.sharding.NamedSharding:
    """Returns a place in device memory on the same mesh."""
    return jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec(*spec))


def _zeros(shape: tuple[int, ...], dtype: Any, place: jax.sharding.NamedSharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)()


def _place(tensor: np.ndarray, place: jax.sharding.NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(tensor.shape, place, lambda index: tensor[index])


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(stacked: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, layer.astype(stacked.dtype), index, 0)


def stored_shapes(source: Source, tied: bool) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of the parameters in `source`, buffers and a tied head left out."""
    return {
        name: shape
        for name, shape in source.shapes.items()
        if not name.endswith(layout.BUFFERS) and not (tied and name == "lm_head.weight")
    }


def _check(source: Source, decoder: Decoder) -> None:
    expected = names.hf_shapes(decoder.config, decoder.shapes)
    tied = decoder.config.tie_embeddings
    found = stored_shapes(source, tied)
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"the weights do not fit config.json: missing {layout.some(missing)}; "
            f"unknown {layout.some(extra)}"
        )
    if (
        tied
        and "lm_head.weight" in source.shapes
        and not np.array_equal(
            source.read("lm_head.weight"), source.read("model.embed_tokens.weight")
        )
    ):
        raise ValueError(
            "config.json says tie_word_embeddings, but lm_head.weight differs from "
            "model.embed_tokens.weight; set tie_word_embeddings to false"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(
                f"tensor {name} has shape {found[name]}, but config.json asks for {shape}"
            )


def _set(tree: Params, path: tuple[str, ...], value: jax.Array) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


class ModelFiles(NamedTuple):
    """What an export holds beside the weights, and how it stores them."""

    config: dict[str, Any]
    generation_config: dict[str, Any]
    """Empty where there is no such file; transformers then goes by `config`."""
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    dtype: writer.Dtype
    """dtype in which the source stores its tensors: one, or one for each name."""


def model_files(source: Source, tokenizer: Any) -> ModelFiles:
    """Returns what an export of `source` holds; `dtype` in its config is what the files hold."""
    dtype = _stored_dtype(source)
    return ModelFiles(
        config=_with_dtype(source.config, _main_dtype(dtype, source.config)),
        generation_config=source.generation_config,
        tokenizer=tokenizer,
        dtype=dtype,
    )


def export(
    params: Params,
    decoder: Decoder,
    files: ModelFiles,
    directory: str,
    *,
    dtype: str,
    max_shard_size: int,
    source: str,
    unmarked: tuple[str, ...] = (),
) -> None:
    """Writes a directory that `AutoModelForCausalLM.from_pretrained` and vLLM load as it is.

    Every process calls it, since a parameter may be spread over all of them; the first one writes.

    Args:
        params: the parameters.
        decoder: their architecture and places.
        files: configuration and tokenizer.
        directory: absent, empty, or an earlier export, which is replaced; the user's files in it
            are kept.
        dtype: of the tensors written; `auto` is the dtype in which the source stores each of them,
            whatever its `config.json` says.
        max_shard_size: bytes of tensors in one file.
        source: where the weights come from, for the marker file.
        unmarked: patterns of the files of an export without a marker, see `exports.check`.

    Raises:
        ValueError: if `directory` holds anything that is not ours to replace.
        OSError: if the disk is full, or something cannot be written. `directory` is then as it was.
    """
    if dtype != "auto":
        files = files._replace(dtype=dtype, config=_with_dtype(files.config, dtype))
    # Wide tensors first, so that each is aligned in a file of several dtypes.
    tensors = sorted(
        writer.tensors(decoder),
        key=lambda t: -jnp.dtype(writer.dtype_of(t.name, files.dtype)).itemsize,
    )
    main = distributed.is_main()
    with contextlib.ExitStack() as stack:
        partial = pathlib.Path(directory)  # where the other processes write nothing
        if main:
            partial = stack.enter_context(exports.replaced(directory, "model", source, unmarked))
            write_files(str(partial), files)
        shards = _shards(tensors, files.dtype, max_shard_size)
        writer.write(params, decoder, partial, files.dtype, shards, lambda _: main)
    if main:
        logging.info("wrote %s", directory)
    distributed.barrier(f"export {directory}")


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")} | {"dtype": dtype}


def write_files(directory: str, files: ModelFiles) -> None:
    """Writes what a model directory holds beside the weights; there is no earlier one there."""
    path = pathlib.Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(files.config, indent=2) + "\n")
    if files.generation_config:
        generation = json.dumps(files.generation_config, indent=2) + "\n"
        (path / "generation_config.json").write_text(generation)
    files.tokenizer.save_pretrained(directory)
    # transformers 5 names a class that version 4, which vLLM may run, does not know.
    options = path / "tokenizer_config.json"
    text = options.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    options.write_text(text)


def write_run_files(directory: str, files: ModelFiles) -> None:
    """Writes what makes the checkpoints of a run convertible; replaces only what it wrote before.

    Raises:
        ValueError: if `directory` holds anything that is not ours to replace.
    """
    with exports.replaced(directory, "run", "", exports.UNMARKED_FILES) as partial:
        write_files(str(partial), files)
        if not isinstance(files.dtype, str):
            (partial / _DTYPES_FILE).write_text(json.dumps(files.dtype, indent=2) + "\n")


def read_files(directory: str, load_tokenizer: Callable[[str], Any]) -> ModelFiles:
    """Returns what `write_run_files` wrote."""
    path = pathlib.Path(directory)
    config = layout.read_json(path / "config.json")
    generation = path / "generation_config.json"
    dtypes = path / _DTYPES_FILE
    said = config.get("dtype") or config.get("torch_dtype") or "float32"
    return ModelFiles(
        config=config,
        generation_config=layout.read_json(generation) if generation.exists() else {},
        tokenizer=load_tokenizer(directory),
        dtype=layout.read_json(dtypes) if dtypes.exists() else said.removeprefix("torch."),
    )


def _shards(
    tensors: list[writer.Tensor], dtype: writer.Dtype, limit: int
) -> list[list[writer.Tensor]]:
    """Cuts the tensors, in order, into files of at most `limit` bytes, or of one tensor."""
    shards: list[list[writer.Tensor]] = [[]]
    used = 0
    for tensor in tensors:
        size = writer.num_bytes(tensor, dtype)
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards
