"""Everything about a run that can be checked without an accelerator or a vLLM server.

A mistake is told in seconds, before JAX starts and before servers load a model. Imports no JAX.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Sequence

from atlas_jax import config as config_lib
from atlas_jax import extras, reporting, sockets
from atlas_jax.checkpoint import layout
from atlas_jax.config import RIMConfig, TrainConfig
from atlas_jax.data import examples, row_checks, sources
from atlas_jax.data.chat_template import read_options
from atlas_jax.models.config import check_family
from atlas_jax.options.fields import is_reference
from atlas_jax.options.train import batch_plan
from atlas_jax.recipes import checks
from atlas_jax.rewards import forms
from atlas_jax.types import NOTHING_GIVEN, Given

_ROOM_BYTES = 1 << 20
_HUB_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")


def check(config: TrainConfig, num_devices: int = 0, given: Given = NOTHING_GIVEN) -> None:
    """Checks a run: options, keys, directories, models, templates, data, and the database.

    Args:
        config: the run.
        num_devices: devices that will train, over all hosts; 0 leaves out what depends on it.
        given: rows of the caller, in place of files.

    Raises:
        ValueError: says what is wrong, its value, and what to write instead.
        OSError: for files that cannot be read or written, or a database that cannot be reached.
    """
    # Options first, files then, the database last: each step takes longer than the one before.
    config_lib.validate(config, given.rewards)
    config_lib.check_environment(config)
    check_output(config.output_dir)
    if config.servers_option:
        extras.need("vllm", config.servers_option)
    if config.sends_by_nccl:
        from atlas_jax.rollout import libnccl  # only this way of weights needs it

        libnccl.find()
    reporting.check(config.report_to)
    for option, reference in config.functions.items():
        sockets.resolve(reference, option)
    _check_rewards(config.reward_functions, given)
    if config.judges:
        _check_judges_files(config.judges, config.output_dir)
    check_models(config)
    _check_origin(config)
    examples.check_templates(config.teaching)
    checks.of(config).templates(config)
    check_data(config, given)
    if num_devices:
        data, fsdp, _ = config.mesh.shape(num_devices)
        replicas = data * fsdp
        checks.of(config).rows_of_a_step(config, batch_plan(config, replicas), replicas)
    if config.data.db_url or config.data.format == "session":
        from atlas_jax.data import session_rows  # a run on files knows no sessions

        session_rows.check_sessions(config.data, config.output_dir)


def check_output(directory: str) -> None:
    """Checks that `output_dir` can be made and written.

    Raises:
        ValueError: if it is a file, or lies in one.
        OSError: if it cannot be written.
    """
    with _of("output_dir"):
        _check_writable(directory)


def check_output_file(path: str) -> None:
    """Checks that a file can be written; raises as `check_output` does."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a directory; name a file in it")
    _check_writable(os.path.dirname(path) or ".")


def _check_writable(directory: str, room_bytes: int = _ROOM_BYTES) -> None:
    path = pathlib.Path(directory).absolute()
    # Nothing is made: a refused run must leave no directory.
    existing = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not existing.is_dir():
        where = directory if existing == path else f"{directory} cannot be made: {existing}"
        raise ValueError(f"{where} is no directory; name another one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "cannot be written; name another directory", directory)
    if shutil.disk_usage(existing).free < room_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), directory)


def _check_judges_files(rim: RIMConfig, output_dir: str) -> None:
    """Checks the cache of judges' replies and the account of what they have cost."""
    if rim.cache_dir:
        with _of("reward.rim.cache_dir"):
            _check_writable(os.path.expanduser(rim.cache_dir), room_bytes=0)
    from atlas_jax.rewards import replies  # brings an HTTP client, which takes time

    for path in pathlib.Path(output_dir).glob("judges_spent_process_*.json"):
        replies.Ledger(str(path))


def _check_rewards(references: Sequence[str], given: Given) -> None:
    """Checks that functions of the user can be imported, and take what a reward is given."""
    names = (
        [rule for rule in given.rewards if isinstance(rule, str)] if given.rewards else references
    )
    for name in filter(is_reference, names):
        forms.find(name)
    for function in given.rewards:
        if not isinstance(function, str):
            forms.form_of(function, f"the reward {function!r}")


def check_models(config: TrainConfig) -> None:
    """Checks the models and tokenizers that the options name.

    Raises:
        ValueError: names the option.
    """
    tokenizer = config.tokenizer_name_or_path
    with _of("model_name_or_path"):
        check_model(config.model_name_or_path)
        _check_no_adapter(config)
        _check_computed(config.model_name_or_path)
    with _of("tokenizer_name_or_path" if tokenizer else "model_name_or_path"):
        _check_tokenizer(tokenizer or config.model_name_or_path, _needs_chat(config))
    read_options(config.chat_template_kwargs)
    if config.student:
        name = "teaching.student_chat_template_kwargs"
        read_options(config_lib.flat(config)[name], name)
        with _of("student_model"):
            check_model(config.student)
            if config.generates_locally:
                _check_computed(config.student)
            _check_tokenizer(config.student, False)
    if config.teacher:
        with _of("teacher_model_name_or_path"):
            check_model(config.teacher)
            _check_computed(config.teacher)
            _check_tokenizer(config.teacher, False)


def _check_no_adapter(config: TrainConfig) -> None:
    """Checks that factors are not trained on top of others, nor on what PEFT cannot load."""
    path = pathlib.Path(config.model_name_or_path).expanduser()
    lora = config.model.lora
    if lora.rank and lora.export == "adapter" and path.suffix == ".gguf":
        raise ValueError(
            f"{path} is a GGUF file, which no adapter can name as its base; set "
            "model.lora.export=merged, or convert the model with atlas-convert first"
        )
    if lora.rank and layout.is_adapter(path):
        raise ValueError(
            f"{path} is an adapter, and model.lora.rank={config.model.lora.rank} trains one; to go "
            f"on with it, set model_name_or_path={layout.adapter_base(path)} and resume_from={path}"
        )


@contextlib.contextmanager
def _of(option: str) -> Iterator[None]:
    """Puts the name of an option before an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}={error}") from None


def check_model(name: str) -> None:
    """Checks that a model can be opened; nothing is fetched from the hub.

    Raises:
        ValueError: for a directory that is no model, files that are missing or damaged, and what
            looks like a path and does not exist.
    """
    path = pathlib.Path(name).expanduser()
    if not path.exists():
        _check_hub(name, path)
    elif path.is_file():
        _check_gguf(name, path)
    elif layout.is_adapter(path):
        check_model(layout.adapter_base(path))
    else:
        layout.check(path)


def _check_computed(name: str) -> None:
    """Checks that the decoder computes models like a directory's `config.json`."""
    path = pathlib.Path(name).expanduser()
    if layout.is_adapter(path):
        path = pathlib.Path(layout.adapter_base(path))
    if path.is_dir():
        try:
            check_family(layout.read_json(path / "config.json"))
        except ValueError as error:
            raise ValueError(f"{name} cannot be computed here: {error}") from None


def _check_hub(name: str, path: pathlib.Path) -> None:
    """Checks that a name that is no path here can be one of the hub."""
    if not _HUB_ID.fullmatch(name) or name.endswith((".gguf", ".safetensors")):
        raise ValueError(f"{name} does not exist; relative paths start at {os.getcwd()}")
    offline = any(os.environ.get(v, "").upper() in ("1", "TRUE", "ON", "YES") for v in _HUB_OFFLINE)
    beside = "/" in name and path.parent.is_dir()
    if not (offline or beside) or _is_fetched(name):
        return
    why = (
        f"though the directory {path.parent} does"
        if beside
        else "and HF_HUB_OFFLINE forbids to ask the hub"
    )
    raise ValueError(
        f"{name} does not exist, {why}; correct it, or fetch the hub's model of that name first: "
        f"hf download {name}"
    )


def _is_fetched(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _check_gguf(name: str, path: pathlib.Path) -> None:
    extras.need("gguf", name)
    layout.check_fetched(path)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(
            f"{name} is a file and no GGUF file; give a .gguf file, or the directory of a "
            "safetensors model"
        )


def _needs_chat(config: TrainConfig) -> bool:
    """Returns whether rows are rendered by the chat template, as far as options tell."""
    formats = ("messages", "teaching", "session")
    return not config.asks_questions and config.data.format in formats


def _check_tokenizer(name: str, needs_chat: bool) -> None:
    path = pathlib.Path(name).expanduser()
    if not path.exists():
        _check_hub(name, path)
    path = layout.tokenizer_place(path)
    if not path.is_dir():
        return
    layout.check_tokenizer(path)
    options = path / "tokenizer_config.json"
    named = options.exists() and layout.read_json(options).get("chat_template")
    if needs_chat and not named and not any((path / file).exists() for file in _TEMPLATE_FILES):
        raise ValueError(
            f"{name} has no chat template, which conversations need; set tokenizer_name_or_path to "
            "the instruction-tuned model's, or put a chat_template.jinja beside the model"
        )


def _check_origin(config: TrainConfig) -> None:
    """Checks that `resume_from` is a run, one of its checkpoints, or a model."""
    if not config.resume_from:
        return
    path = pathlib.Path(config.resume_from).expanduser()
    if not path.exists():
        raise ValueError(
            f"resume_from={config.resume_from} does not exist; give the output_dir of another run, "
            "one of its checkpoints, or a model directory"
        )
    is_checkpoint = path.parent.name == "checkpoints" and path.name.isdigit()
    if is_checkpoint and not (layout.is_model(path) or layout.is_adapter(path)):
        return
    if any(entry.name.isdigit() for entry in path.glob("checkpoints/*")):
        return
    with _of("resume_from"):
        check_model(config.resume_from)


def check_data(config: TrainConfig, given: Given = NOTHING_GIVEN) -> None:
    """Checks that the files of rows exist and that one of their first rows can be used.

    Args:
        config: the run.
        given: rows of the caller, in place of files.

    Raises:
        ValueError: names the option.
    """
    use = functools.partial(checks.of(config).row, config, given)
    for name in ("rows", "eval_rows"):
        rows = getattr(given, name)
        if rows is not None:
            row_checks.check_records(sources.given_records(name, rows), use)
    if config.data.source and given.rows is None:
        row_checks.check_function(config.data.source, use)
    for option, rows in (("dataset_path", given.rows), ("eval_path", given.eval_rows)):
        path = getattr(config.data, option)
        if path and rows is None:
            try:
                row_checks.check(config.data, path, use)
            except ValueError as error:
                raise ValueError(f"data.{option}: {error}") from None
