"""Hugging Face directories: read into sharded arrays, and written for transformers and vLLM.

Tensors are read one at a time: the host holds one of them, the devices hold their shards. Files are
written into a directory beside the target, which takes the target's name when it is complete.
`exports` decides whether a target may be replaced.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from atlas_jax import distributed
from atlas_jax.checkpoint import exports, layout, names, writer
from atlas_jax.models.config import from_hf
from atlas_jax.models.transformer import Decoder
from atlas_jax.types import Params

_DOWNLOADS = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")
DTYPES_FILE = "dtypes.json"
"""File of `write_run_files` with the dtype of each tensor, where they differ."""


@runtime_checkable
class Source(Protocol):
    """A model on disk under Hugging Face names and shapes; `[out, in]` for linear maps."""

    @property
    def config(self) -> dict[str, Any]:
        """Content of `config.json`."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """Content of `generation_config.json`; empty if the model has none."""

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
        """Returns the dtype in which a tensor is stored, with the errors of `read`."""
        return layout.dtype_of(name, self._files[name])


def resolve(name_or_path: str) -> str:
    """Returns a local path: the argument if it exists, else its hub repository, downloaded.

    Raises:
        ValueError: if the argument is neither a path nor a repository.
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
    """Opens a model directory, an adapter's with its base, or a `.gguf` file.

    Raises:
        ValueError: if it is incomplete or not supported.
    """
    if layout.is_adapter(pathlib.Path(path)):
        from atlas_jax.checkpoint import adapters  # most models are whole

        return adapters.AdapterSource(path)
    if not path.endswith(".gguf"):
        return SafetensorsSource(path)
    from atlas_jax.checkpoint import gguf  # needs an extra, and no other model does

    return gguf.GGUFSource(path)


def _stored_dtype(source: Source) -> writer.Dtype:
    """Returns the dtype in which the weights are stored, by tensor name if they differ.

    It is read from the files, because `config.json` may state another one. For a GGUF file it is
    the dtype of its config.
    """
    if not isinstance(source, SafetensorsSource):
        return source.config["dtype"]
    config = from_hf(source.config)
    exported = [name for entry in names.entries(config) for name in names.hf_names(entry, config)]
    # Tensors that are missing here are reported by `load`.
    found = {name: source.dtype(name) for name in exported if name in source.shapes}
    different = set(found.values())
    return found if len(different) > 1 else different.pop() if different else "float32"


def _main_dtype(dtype: writer.Dtype, config: Mapping[str, Any]) -> str:
    """Returns the dtype for `config.json`: the stated one if some tensor has it, else the usual."""
    if isinstance(dtype, str):
        return dtype
    said = str(config.get("dtype") or config.get("torch_dtype"))
    usual = collections.Counter(dtype.values()).most_common(1)[0][0]
    return said if said in dtype.values() else usual


def digest(source: Source) -> str:
    """Returns a short hash of a model's weights, which differs between models.

    It covers all names and shapes, and the numbers of a few tensors of every kind, since some
    fine-tunings change only the attention and others only the other parts. Of an adapter it covers
    all factors.
    """
    names = sorted(source.shapes)
    total = hashlib.sha256(json.dumps([(n, source.shapes[n]) for n in names]).encode())
    for kind in ("q_proj.weight", "qkv_proj.weight", "down_proj.weight"):
        for name in [n for n in names if n.endswith(kind)][-1:]:
            total.update(np.ascontiguousarray(source.read(name)).tobytes())
    for name in sorted(getattr(source, "adapted", ())):
        for factor in source.pair(name):  # type: ignore[attr-defined]
            total.update(np.ascontiguousarray(factor).tobytes())
    return total.hexdigest()[:16]


def load(source: Source, decoder: Decoder) -> Params:
    """Returns the parameters of `source`, sharded as `decoder` says, in its parameter dtype.

    Raises:
        ValueError: if tensors are missing, unknown or of another shape; the message names them.
    """
    # All names first: reading takes minutes, after which one wrong name would be a late error.
    _check(source, decoder)
    placements = decoder.placements()
    params: Params = {}
    for entry in names.entries(decoder.config):
        places = [names.leaf(placements, path) for path in entry.paths]
        values = _load_kind(source, decoder, entry, places)
        for path, value in zip(entry.paths, values, strict=True):
            set_leaf(params, path, value)
    return params


def _load_kind(
    source: Source,
    decoder: Decoder,
    entry: names.TensorKind,
    places: list[jax.sharding.NamedSharding],
) -> list[jax.Array]:
    """Returns the parameters of one kind of tensor, stacked if each layer has one."""
    shapes = names.shapes_of(entry, decoder.shapes)
    dtype = decoder.param_dtype
    if not entry.per_layer:
        loaded = names.from_hf(entry, source.read(entry.name), shapes)
        return [_place(x, place).astype(dtype) for x, place in zip(loaded, places, strict=True)]
    # Layers are stacked in device memory even if they are to stay in host memory, because JAX
    # cannot write a device array into a slice of a host array.
    stacks = [
        _zeros((decoder.config.num_layers, *shape), dtype, _with_spec(place, place.spec))
        for shape, place in zip(shapes, places, strict=True)
    ]
    for i, name in enumerate(names.hf_names(entry, decoder.config)):
        loaded = names.from_hf(entry, source.read(name), shapes)
        for k, (tensor, place) in enumerate(zip(loaded, places, strict=True)):
            one = _with_spec(place, place.spec[1:])
            stacks[k] = _write_layer(stacks[k], _place(tensor, one), np.int32(i))
        # Dispatch is asynchronous: without waiting, many tensors would be in memory at once.
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
    """Returns the shapes of the parameters in `source` by name, without buffers and a tied head."""
    return {
        name: shape
        for name, shape in source.shapes.items()
        if not name.endswith(layout.BUFFERS) and not (tied and name == "lm_head.weight")
    }


def _check(source: Source, decoder: Decoder) -> None:
    expected = names.hf_shapes(decoder.config, decoder.shapes)
    tied = decoder.config.tie_embeddings
    stored = stored_shapes(source, tied)
    missing = sorted(expected.keys() - stored.keys())
    extra = sorted(stored.keys() - expected.keys())
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
        if stored[name] != shape:
            raise ValueError(
                f"tensor {name} has shape {stored[name]}, but config.json asks for {shape}"
            )


def set_leaf(tree: Params, path: tuple[str, ...], value: jax.Array) -> None:
    """Puts a leaf into a tree, whose branches it makes."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


class ModelFiles(NamedTuple):
    """The files of an export other than the weights, and the dtype of the weights."""

    config: dict[str, Any]
    generation_config: dict[str, Any]
    """Content of the file; empty if there is none, and transformers then reads `config`."""
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    dtype: writer.Dtype
    """dtype in which the source stores its tensors: one for all, or one by name."""


def model_files(source: Source, tokenizer: Any) -> ModelFiles:
    """Returns the files for an export of `source`; `dtype` in its config is the stored dtype."""
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
    """Writes a directory that `AutoModelForCausalLM.from_pretrained` and vLLM load unchanged.

    Every process must call it, since a parameter may be spread over all of them. Process 0 writes.

    Args:
        params: the parameters.
        decoder: the parameters' architecture and placement.
        files: configuration and tokenizer.
        directory: the target: absent, empty, or an earlier export, which is replaced. The user's
            files in it are kept.
        dtype: dtype of the written tensors; `auto` is the dtype in which the source stores each of
            them, whatever its `config.json` states.
        max_shard_size: the largest number of bytes of tensors in one file.
        source: the origin of the weights, for the marker file.
        unmarked: patterns of the files of an export without a marker, see `exports.check`.

    Raises:
        ValueError: if `directory` holds anything that this program may not replace.
        OSError: if a file cannot be written; `directory` is then unchanged.
    """
    if dtype != "auto":
        files = files._replace(dtype=dtype, config=_with_dtype(files.config, dtype))
    # Wide dtypes first, so that every tensor is aligned in a file of several dtypes.
    tensors = sorted(
        writer.tensors(decoder),
        key=lambda t: -jnp.dtype(writer.dtype_of(t.name, files.dtype)).itemsize,
    )
    main = distributed.is_main()
    with contextlib.ExitStack() as stack:
        partial = pathlib.Path(directory)  # never written to: only process 0 writes
        if main:
            partial = stack.enter_context(exports.replaced(directory, "model", source, unmarked))
            write_files(str(partial), files)
        shards = _shards(tensors, files.dtype, max_shard_size)
        writer.write(params, decoder, partial, files.dtype, shards, lambda _: main)
    if main:
        logging.info("wrote %s", directory)
    # The others must not report an export that process 0 has not finished.
    distributed.barrier(f"export {directory}")


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")} | {"dtype": dtype}


def write_files(directory: str, files: ModelFiles) -> None:
    """Writes the files of a model other than the weights into a directory that has none yet."""
    path = pathlib.Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(files.config, indent=2) + "\n")
    if files.generation_config:
        generation = json.dumps(files.generation_config, indent=2) + "\n"
        (path / "generation_config.json").write_text(generation)
    write_tokenizer(path, files.tokenizer)


def write_tokenizer(path: pathlib.Path, tokenizer: Any) -> None:
    """Writes the files of a tokenizer into a directory."""
    tokenizer.save_pretrained(str(path))
    # transformers 5 writes a class name that version 4, which vLLM may run, cannot load.
    options = path / "tokenizer_config.json"
    text = options.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    options.write_text(text)


def write_run_files(directory: str, files: ModelFiles) -> None:
    """Writes the config and tokenizer that converting a run's checkpoints needs.

    Raises:
        ValueError: if `directory` holds anything that this program may not replace.
    """
    with exports.replaced(directory, "run", "", exports.UNMARKED_FILES) as partial:
        write_files(str(partial), files)
        if not isinstance(files.dtype, str):
            (partial / DTYPES_FILE).write_text(json.dumps(files.dtype, indent=2) + "\n")


def _shards(
    tensors: list[writer.Tensor], dtype: writer.Dtype, limit: int
) -> list[list[writer.Tensor]]:
    """Splits the tensors, in order, into files of at most `limit` bytes or of a single tensor."""
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
