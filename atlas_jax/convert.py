"""A model converted: `atlas-convert SRC DST`, same as `python -m atlas_jax.convert SRC DST`.

What SRC is decides the direction:

    Hugging Face directory or hub id   -> training checkpoint (Orbax), which `resume_from` takes
    run directory, or one checkpoint   -> Hugging Face directory
    .gguf file                         -> Hugging Face directory
    adapter directory of PEFT          -> Hugging Face directory, with its base

DST must be absent or empty, or an earlier Hugging Face export (by this command or a run), which is
then replaced; files that you added to such an export are kept. Anything else that exists is refused
and not touched, as is a DST that is SRC, holds it or lies inside it. DST appears when it is whole;
after an error or a kill it is as it was.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # before transformers is imported, which would say that it has no torch
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import argparse
import logging as python_logging
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import jax.numpy as jnp
from absl import logging

from atlas_jax import files as files_lib
from atlas_jax.checkpoint import exports, hf, layout, manager
from atlas_jax.models import attention
from atlas_jax.models.config import from_hf
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.train import MeshConfig
from atlas_jax.sharding import Sharding, make_mesh
from atlas_jax.startup.model import load_tokenizer
from atlas_jax.step import abstract as abstract_tree
from atlas_jax.types import Params

_KIND = "checkpoint"
"""Kind of an export that no marker file has, because a training checkpoint replaces nothing."""


class _Parser(argparse.ArgumentParser):
    """A parser that answers wrong arguments in one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        self.exit(2, f"error: {message}; --help describes all arguments\n")


def main() -> None:
    """Runs the conversion that SRC asks for."""
    parser = _Parser(
        prog="atlas-convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", metavar="SRC")
    parser.add_argument("dst", metavar="DST")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *layout.DTYPES.values()),
        help="of exported tensors; auto (default): of each tensor as it was stored in the model "
        "that the training began with",
    )
    parser.add_argument(
        "--max_shard_size",
        type=int,
        default=5_000_000_000,
        metavar="BYTES",
        help="of tensors in one file (default %(default)s)",
    )
    args = parser.parse_args()
    if args.max_shard_size <= 0:
        parser.error(f"--max_shard_size is {args.max_shard_size}, but must be positive")
    show_all = bool(os.environ.get("ATLAS_TRACEBACK"))
    if not show_all:  # Orbax and TensorStore print each error of the disk many times
        logging.get_absl_logger().addFilter(_is_ours)
        sys.unraisablehook = lambda _: None
    try:
        print(convert(args.src, args.dst, args.dtype, args.max_shard_size))
    except (ValueError, OSError) as error:
        if show_all:
            raise
        sys.exit(f"error: {_one_line(error, args.dst)}")


def _is_ours(record: python_logging.LogRecord) -> bool:
    package = pathlib.Path(exports.__file__).parent.parent
    return package in pathlib.Path(record.pathname).parents


def _one_line(error: ValueError | OSError, dst: str) -> str:
    """Returns the message of an error; the system's errors say what they prevented."""
    text = " ".join(str(error).split())
    code = re.search(r"\[os_error_code='(\d+)'\]", text)  # as Orbax raises them, in a ValueError
    if code:
        text = os.strerror(int(code[1]))
    if code or isinstance(error, OSError):
        return f"{text}; {dst} is as it was before"
    return text


def convert(src: str, dst: str, dtype: str, max_shard_size: int) -> str:
    """Converts `src` to `dst` and returns a line that says what was done.

    Raises:
        ValueError: if `src` is nothing that can be converted, or `dst` may not be replaced.
        OSError: if something cannot be read or written; `dst` is then as it was.
    """
    path = files_lib.resolved(hf.resolve(src))
    checkpoint = _find_checkpoint(path)
    if checkpoint is None and path.suffix != ".gguf" and not layout.is_adapter(path):
        return _to_checkpoint(src, path, dst, dtype)
    if checkpoint is None:
        check_apart(dst, [path])
        exports.check(dst, "model")
        model = hf.open_source(str(path))
        files = hf.model_files(model, load_tokenizer(str(layout.tokenizer_place(path))))
        decoder = _decoder(files)
        params = hf.load(model, decoder)
    else:
        run, step = checkpoint
        inside = [run / "checkpoints", run / manager.MODEL_FILES]
        check_apart(dst, [run] if path == run else inside)
        exports.check(dst, "model")
        files = read_files(str(run / manager.MODEL_FILES))
        decoder = _decoder(files)
        params = _restore(run, step, decoder)
        src = f"{src} (step {step})"
    hf.export(params, decoder, files, dst, dtype=dtype, max_shard_size=max_shard_size, source=src)
    return f"{src} -> Hugging Face directory {dst} ({_said(files, dtype)})"


def _restore(run: pathlib.Path, step: int, decoder: Decoder) -> Params:
    abstract = abstract_tree(decoder.shapes, decoder.placements())
    try:
        checkpoints = manager.Checkpoints(str(run), create=False)
        return checkpoints.restore_params(step, abstract, cast=True)
    except ValueError as error:
        raise ValueError(
            f"checkpoint {step} of {run} does not fit {manager.MODEL_FILES}/config.json: {error}"
        ) from None


def _to_checkpoint(src: str, path: pathlib.Path, dst: str, dtype: str) -> str:
    if dtype != "auto":
        raise ValueError(
            f"--dtype {dtype} is for exports, but {src} becomes a training checkpoint, which holds "
            "every dtype in float32; leave it out"
        )
    check_apart(dst, [path])
    # Before the weights are read, which may take minutes.
    exports.check(dst, _KIND)
    source = hf.open_source(str(path))
    files = hf.model_files(source, load_tokenizer(str(path)))
    params = hf.load(source, _decoder(files))
    with files_lib.replace_directory(dst) as partial:
        hf.write_run_files(str(partial / manager.MODEL_FILES), files)
        checkpoints = manager.Checkpoints(str(partial))
        checkpoints.save_params(params)
        checkpoints.close()
    return f"{src} -> training checkpoint {pathlib.Path(dst) / 'checkpoints' / '0'}"


def _said(files: hf.ModelFiles, dtype: str) -> str:
    """Returns which dtypes an export holds."""
    if dtype != "auto":
        return dtype
    return (
        files.dtype
        if isinstance(files.dtype, str)
        else " and ".join(sorted({*files.dtype.values()}))
    )


def check_apart(directory: str | os.PathLike[str], sources: Iterable[pathlib.Path]) -> None:
    """Checks that an export's target and its sources neither are nor contain each other.

    Args:
        directory: the target.
        sources: the files and directories that are read; targets of their links count too.

    Raises:
        ValueError: if two overlap; the message names both.
    """
    target = files_lib.resolved(directory)
    for source in sources:
        parts = [source, *source.iterdir()] if source.is_dir() else [source]
        for part in map(files_lib.resolved, parts):
            if part == target or part in target.parents or target in part.parents:
                raise ValueError(
                    f"{directory} cannot be written while {source} is read, because one is the "
                    "other or lies inside it; name a directory elsewhere"
                )


def read_files(directory: str, load: Callable[[str], Any] = load_tokenizer) -> hf.ModelFiles:
    """Returns the files that `hf.write_run_files` wrote."""
    path = pathlib.Path(directory)
    config = layout.read_json(path / "config.json")
    generation = path / "generation_config.json"
    dtypes = path / hf.DTYPES_FILE
    said = config.get("dtype") or config.get("torch_dtype") or "float32"
    return hf.ModelFiles(
        config=config,
        generation_config=layout.read_json(generation) if generation.exists() else {},
        tokenizer=load(directory),
        dtype=layout.read_json(dtypes) if dtypes.exists() else said.removeprefix("torch."),
    )


def _find_checkpoint(src: pathlib.Path) -> tuple[pathlib.Path, int] | None:
    """Returns the run and the step, if `src` is a run directory or one of its checkpoints.

    Raises:
        ValueError: if it is one without a complete checkpoint, or without the run's `model/`.
    """
    if src.is_file() or (src / "adapter_config.json").exists() or layout.is_model(src):
        return None
    if src.parent.name == "checkpoints" and src.name.isdigit():
        run = src.parent.parent
        step = int(src.name) if (src / "params").is_dir() else None
    elif (src / "checkpoints").is_dir():
        run = src
        step = manager.Checkpoints(str(src), create=False).latest()
    else:
        return None
    if step is None:
        raise ValueError(f"{src} holds no complete checkpoint; name another run or checkpoint")
    if not (run / manager.MODEL_FILES / "config.json").exists():
        raise ValueError(
            f"{run} has no {manager.MODEL_FILES}/config.json, which says what its checkpoints "
            "hold; name the directory of a whole run"
        )
    return run, step


def _decoder(files: hf.ModelFiles) -> Decoder:
    """Returns the model over all local devices, in float32, which holds every source dtype."""
    mesh = make_mesh(MeshConfig())
    run = attention.select("xla", mesh, packed=False, dtype=jnp.dtype("float32"))
    return Decoder(from_hf(files.config), Sharding(mesh), run)


if __name__ == "__main__":
    main()
