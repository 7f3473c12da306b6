"""Converts a model: `python tools/convert_checkpoint.py SRC DST`.

What SRC is decides the direction:

    Hugging Face directory or hub id   -> training checkpoint (Orbax), which `resume_from` takes
    run directory, or one checkpoint   -> Hugging Face directory
    .gguf file                         -> Hugging Face directory
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import jax.numpy as jnp

from atlas_jax.checkpoint import hf, manager
from atlas_jax.config import MeshConfig
from atlas_jax.models import attention
from atlas_jax.models.config import from_hf
from atlas_jax.models.transformer import Decoder
from atlas_jax.recipes.setup import load_tokenizer
from atlas_jax.sharding import Sharding, make_mesh
from atlas_jax.step import abstract as abstract_tree


def main() -> None:
    """Runs the conversion that SRC asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", metavar="SRC")
    parser.add_argument("dst", metavar="DST")
    parser.add_argument("--dtype", default="auto", help="of exported tensors; auto: as stored")
    parser.add_argument("--max_shard_size", type=int, default=5_000_000_000, help="bytes a file")
    args = parser.parse_args()
    try:
        print(convert(args.src, args.dst, args.dtype, args.max_shard_size))
    except ValueError as error:
        sys.exit(f"error: {error}")


def convert(src: str, dst: str, dtype: str, max_shard_size: int) -> str:
    """Converts `src` to `dst` and returns a line that says what was done."""
    found = _find_checkpoint(pathlib.Path(src).absolute())
    if found is not None:
        run, step = found
        files = hf.read_files(str(run / manager.MODEL_FILES), load_tokenizer)
        decoder = _decoder(files)
        abstract = abstract_tree(decoder.shapes, decoder.placements())
        params = manager.Checkpoints(str(run)).restore_params(step, abstract)
    else:
        path = hf.resolve(src)
        source = hf.open_source(path)
        tokenizer = load_tokenizer(path)
        files = hf.ModelFiles(source.config, source.generation_config, tokenizer)
        decoder = _decoder(files)
        params = hf.load(source, decoder)
        if not path.endswith(".gguf"):
            hf.write_files(dst + f"/{manager.MODEL_FILES}", files)
            checkpoints = manager.Checkpoints(dst)
            checkpoints.save_params(params)
            checkpoints.close()
            return f"{src} -> training checkpoint {checkpoints.directory / '0'}"
    stored = hf.storage_dtype(files.config) if dtype == "auto" else dtype
    hf.export(params, decoder, files, dst, dtype=stored, max_shard_size=max_shard_size)
    return f"{src} -> Hugging Face directory {dst} ({stored})"


def _find_checkpoint(src: pathlib.Path) -> tuple[pathlib.Path, int] | None:
    """Returns the run and the step, if `src` is a run directory or one of its checkpoints."""
    if src.parent.name == "checkpoints" and src.name.isdigit():
        return src.parent.parent, int(src.name)
    if not (src / "checkpoints").is_dir():
        return None
    latest = manager.Checkpoints(str(src)).latest()
    if latest is None:
        raise ValueError(f"{src / 'checkpoints'} holds no complete checkpoint")
    return src, latest


def _decoder(files: hf.ModelFiles) -> Decoder:
    """Returns the model over all local devices, in float32, which holds every source dtype."""
    mesh = make_mesh(MeshConfig())
    run = attention.select("xla", mesh, packed=False, dtype=jnp.dtype("float32"))
    return Decoder(from_hf(files.config), Sharding(mesh), run)


if __name__ == "__main__":
    main()
