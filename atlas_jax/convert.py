"""A model converted: `atlas-convert SRC DST`, same as `python -m atlas_jax.convert SRC DST`.

What SRC is decides the direction:

    Hugging Face directory or hub id   -> training checkpoint (Orbax), which `resume_from` takes
    run directory, or one checkpoint   -> Hugging Face directory; of a run with LoRA an adapter
                                          directory of PEFT, or the former with --merged
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
import dataclasses
import logging as python_logging
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
from absl import logging

from atlas_jax import files as files_lib
from atlas_jax.checkpoint import adapters, exports, hf, layout, manager
from atlas_jax.models import attention
from atlas_jax.models.config import from_hf
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.train import LoraOptions, MeshConfig
from atlas_jax.sharding import Sharding, make_mesh
from atlas_jax.startup.directory import started
from atlas_jax.startup.model import load_tokenizer
from atlas_jax.step import abstract as abstract_tree
from atlas_jax.step import joined
from atlas_jax.types import Params

_KIND = "checkpoint"
"""Kind of an export that no marker file has, because a training checkpoint replaces nothing."""

_NOT_LORA = "--merged is for runs with LoRA, and {} is none; leave it out"


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
    parser.add_argument(
        "--merged",
        action="store_true",
        help="writes the whole model of a run with LoRA, with the factors added",
    )
    args = parser.parse_args()
    if args.max_shard_size <= 0:
        parser.error(f"--max_shard_size is {args.max_shard_size}, but must be positive")
    show_all = bool(os.environ.get("ATLAS_TRACEBACK"))
    if not show_all:  # Orbax and TensorStore print each error of the disk many times
        logging.get_absl_logger().addFilter(_is_ours)
        sys.unraisablehook = lambda _: None
    try:
        print(convert(args.src, args.dst, args.dtype, args.max_shard_size, args.merged))
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


def convert(src: str, dst: str, dtype: str, max_shard_size: int, merged: bool = False) -> str:
    """Converts `src` to `dst` and returns a line that says what was done.

    Args:
        src: a model, a run or a checkpoint.
        dst: the target.
        dtype: dtype of exported tensors, or `auto`.
        max_shard_size: bytes of tensors in one file.
        merged: whether a run with LoRA becomes a whole model.

    Raises:
        ValueError: if `src` is nothing that can be converted, or `dst` may not be replaced.
        OSError: if something cannot be read or written; `dst` is then as it was.
    """
    path = files_lib.resolved(hf.resolve(src))
    checkpoint = _find_checkpoint(path)
    if checkpoint is not None:
        return _from_checkpoint(src, path, *checkpoint, dst, dtype, max_shard_size, merged)
    if merged:
        raise ValueError(_NOT_LORA.format(src))
    if path.suffix != ".gguf" and not layout.is_adapter(path):
        return _to_checkpoint(src, path, dst, dtype)
    check_apart(dst, [path])
    exports.check(dst, "model")
    model = hf.open_source(str(path))
    files = hf.model_files(model, load_tokenizer(str(layout.tokenizer_place(path))))
    decoder = _decoder(files)
    params = hf.load(model, decoder)
    hf.export(params, decoder, files, dst, dtype=dtype, max_shard_size=max_shard_size, source=src)
    return f"{src} -> Hugging Face directory {dst} ({_said(files, dtype)})"


def _from_checkpoint(
    src: str,
    path: pathlib.Path,
    run: pathlib.Path,
    step: int,
    dst: str,
    dtype: str,
    max_shard_size: int,
    merged: bool,
) -> str:
    inside = [run / "checkpoints", run / manager.MODEL_FILES]
    check_apart(dst, [run] if path == run else inside)
    exports.check(dst, "model")
    files = read_files(str(run / manager.MODEL_FILES))
    decoder = _decoder(files)
    adapted = _Adapted.of(run, decoder)
    if merged and not adapted:
        raise ValueError(_NOT_LORA.format(src))
    source = f"{src} (step {step})"
    frozen: Params = {}
    if adapted and not merged:
        adapted.export(_restore(run, step, adapted.decoder), files, dst, dtype, source)
        return f"{source} -> adapter directory {dst}, of the base {adapted.base}"
    if adapted:
        frozen = adapted.load_base()
        decoder = adapted.decoder
    params = joined(frozen, _restore(run, step, decoder))
    hf.export(
        params, decoder, files, dst, dtype=dtype, max_shard_size=max_shard_size, source=source
    )
    return f"{source} -> Hugging Face directory {dst} ({_said(files, dtype)})"


class _Adapted(NamedTuple):
    """Factors that a run with LoRA trains, and what they are added to."""

    run: pathlib.Path
    options: LoraOptions
    base: str
    """The `model_name_or_path` of the run."""
    decoder: Decoder

    @classmethod
    def of(cls, run: pathlib.Path, decoder: Decoder) -> _Adapted | None:
        """Returns those of a run; None if it trains a whole model.

        Args:
            run: the run's `output_dir`.
            decoder: the model without factors.
        """
        path = run / "config.json"
        said = layout.read_json(path) if path.exists() else {}
        group = said.get("model", {}).get("lora", {})
        if not group.get("rank"):
            return None
        options = LoraOptions(**(group | {"targets": tuple(group["targets"])}))
        factors = adapters.factors(options, decoder.config, decoder.param_dtype)
        return cls(
            run=run,
            options=options,
            base=said["model_name_or_path"],
            decoder=dataclasses.replace(decoder, lora=factors),
        )

    def export(
        self, params: Params, files: hf.ModelFiles, dst: str, dtype: str, source: str
    ) -> None:
        """Writes an adapter directory."""
        if dtype != "auto":
            raise ValueError(
                f"--dtype {dtype} is for whole models, and {self.run} holds factors; leave it out, "
                "or add --merged"
            )
        adapters.export(
            params, self.decoder, self.options, files, dst, base=self.base, source=source
        )

    def load_base(self) -> Params:
        """Returns the parameters of the base, which must be the one of the run's start."""
        source = hf.open_source(hf.resolve(self.base))
        before = started(str(self.run))
        if before and before.weights != hf.digest(source):
            raise ValueError(
                f"{self.base} is another model than the one that {self.run} began with; put that "
                "one back"
            )
        return hf.load(source, self.decoder)


def _restore(run: pathlib.Path, step: int, decoder: Decoder) -> Params:
    trained = decoder.trained
    abstract = abstract_tree(trained.shapes, trained.placements)
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
