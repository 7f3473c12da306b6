"""A run's directory: one run in it at a time, its log, and what the run was started with.

`opened` makes the directory, locks it and starts the log. What describes the run is written by
`commit`, after everything that can refuse the run has been checked, so that a failed attempt leaves
the files of the run that is there as they were:

    config.json   the resolved options, without secrets, and the environment that they ran in
    model/        configuration and tokenizer, which make the checkpoints convertible
    start.json    the weights that training began with

The tokens of its rows, which are no part of that description, are kept in `data/`, see
`data.tokenized`.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging as python_logging
import os
import pathlib
import secrets
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

import filelock
import jax
from absl import logging

from atlas_jax import distributed
from atlas_jax.checkpoint import hf, manager
from atlas_jax.files import write_whole
from atlas_jax.options.train import TrainConfig, masked
from atlas_jax.types import ENVIRONMENT

_LOCK = ".lock"
_HOLDER = ".run.json"
_CONFIG = "config.json"
_START = "start.json"
_VARIABLES = ("CUDA_", "JAX_", "LIBTPU_", "NCCL_", "XLA_")
"""Beginnings of the variables that XLA, CUDA and NCCL read."""


class Origin(NamedTuple):
    """The weights that training begins with."""

    path: str
    """A model directory or hub id, or the directory of another run."""
    step: int | None = None
    """The checkpoint of that run; None for a model."""

    def __str__(self) -> str:
        return self.path if self.step is None else f"{self.path}/checkpoints/{self.step}"


class Started(NamedTuple):
    """Weights and tokenizer that a run was started with; digests tell models of one path apart."""

    origin: Origin
    weights: str
    """Digest of `model_name_or_path`."""
    tokenizer: str
    """Digest of the tokenizer."""
    student: str = ""
    """Digest of GRPO's student; empty where the trainer does not read it."""
    teacher: str = ""
    """Digest of the model whose distribution is learnt; empty without one."""
    date: str = ""
    """The date that chat templates take for today; empty in runs that do not say."""


@contextlib.contextmanager
def opened(config: TrainConfig) -> Iterator[None]:
    """Holds `output_dir` for one run, with its log and the database's snapshot in it.

    Raises:
        ValueError: if another run uses the directory, if the processes of this run have different
            options or directories, or for a database that cannot be trained on.
        OSError: if the directory cannot be written, or if the database is lost; a full disk is
            named with the directory.
    """
    text = _config_text(config)
    # Before anything is written: processes with other options would wait for each other for ever.
    distributed.check_same(text, "its options differ from those of process 0; give all the same")
    directory = pathlib.Path(config.output_dir)
    # Before the first program is compiled; JAX looks at this option only then.
    jax.config.update("jax_compilation_cache_dir", _compilation_cache(config))
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            stack.enter_context(_locked(directory))
        # The lock comes first, since its file holds the number that the processes compare.
        _check_shared(directory)
        stack.enter_context(_log(directory))
        if distributed.is_main():
            _take_snapshot(config)
        # The others read the snapshot that process 0 has just written.
        distributed.barrier("the data's snapshot")
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename:
                raise
            raise OSError(error.errno, error.strerror, config.output_dir) from error


def _take_snapshot(config: TrainConfig) -> None:
    if config.data.db_url:
        from atlas_jax.data import session_rows  # a run on files knows no database

        session_rows.take_snapshot(config.data, config.output_dir)


def commit(config: TrainConfig, files: hf.ModelFiles, started: Started) -> None:
    """Writes what describes the run, when nothing can refuse it any more."""
    if distributed.is_main():
        directory = pathlib.Path(config.output_dir)
        write_whole(directory / _CONFIG, _text({**masked(config), ENVIRONMENT: _environment()}))
        hf.write_run_files(str(directory / manager.MODEL_FILES), files)
        values = started._asdict() | {"origin": started.origin._asdict()}
        write_whole(directory / _START, json.dumps(values, indent=2) + "\n")
    distributed.barrier("the run's description")


def started(output_dir: str) -> Started | None:
    """Returns what the run in the directory was started with; None if it does not say."""
    path = pathlib.Path(output_dir) / _START
    if not path.exists():
        return None
    values = json.loads(path.read_text())
    return Started(**(values | {"origin": Origin(**values["origin"])}))


def tokens(config: TrainConfig) -> str:
    """Returns the directory in which a run keeps the tokens of its rows."""
    return str(pathlib.Path(config.output_dir) / "data")


def today() -> datetime.date:
    """Returns this host's date."""
    return datetime.date.today()


def date(output_dir: str) -> datetime.date:
    """Returns what chat templates take for today: the day on which the run was started.

    Every process must call it, and gets the same. A run that goes on after midnight, or on another
    day, keeps its examples.
    """
    before = started(output_dir) if output_dir else None
    mine = before.date if before and before.date else today().isoformat()
    return datetime.date.fromisoformat(distributed.gather_texts(mine)[0])


def changed(config: TrainConfig) -> str:
    """Returns the options that differ from those of the run in the directory, as a sentence part.

    Empty if none differs, or if the directory holds no run.
    """
    path = pathlib.Path(config.output_dir) / _CONFIG
    if not path.exists():
        return ""
    before = json.loads(path.read_text())
    before.pop(ENVIRONMENT, None)
    before = _flat(before)
    now = _flat(json.loads(_config_text(config)))
    names = [n for n in sorted(before.keys() | now.keys()) if before.get(n) != now.get(n)]
    changes = [f"{n}={now.get(n)} (was {before.get(n)})" for n in names]
    from atlas_jax.wording import shorten  # for what is wrong

    return ", ".join(shorten(changes, 8))


def _config_text(config: TrainConfig) -> str:
    return _text(masked(config))


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _environment() -> dict[str, str]:
    """Returns what the speed and the rounding of a run depend on besides its options."""
    chosen = {n: v for n, v in sorted(os.environ.items()) if n.startswith(_VARIABLES)}
    device = jax.devices()[0].device_kind
    return {"jax": jax.__version__, "devices": f"{jax.device_count()} x {device}", **chosen}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
    """Holds the directory's lock, which a kill releases.

    Raises:
        ValueError: if another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = _acquired(directory)
    try:
        now = datetime.datetime.now().isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": now}
        write_whole(directory / _HOLDER, json.dumps(holder | {"id": secrets.randbits(63)}) + "\n")
        yield
    finally:
        # Before the lock is released: the next run writes its own.
        (directory / _HOLDER).unlink(missing_ok=True)
        lock.release()


def _acquired(directory: pathlib.Path) -> filelock.BaseFileLock:
    path = str(directory / _LOCK)
    # A soft lock is a file with host, process and start time, for file systems without locks.
    for kind in (filelock.FileLock, filelock.SoftFileLock):
        # A run that waited for another one would look as if it hung.
        lock = kind(path, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            who = _holder(directory)
            name = f"process {who['pid']} on {who['host']} since {who['started']}" if who else "?"
            raise ValueError(
                f"output_dir={directory} is used by another run ({name}); end that one first, or "
                f"name another output_dir{_stale(kind, path)}"
            ) from None
        except OSError as error:
            if kind is filelock.SoftFileLock or not directory.is_dir():
                raise
            logging.warning("%s has no file locks (%s); using a lock file", directory, error)
        else:
            return lock
    raise AssertionError("a lock is acquired or an error is raised")


def _stale(kind: type[filelock.BaseFileLock], path: str) -> str:
    """Returns what to do about a lock file that a killed run has left on another host."""
    soft = kind is filelock.SoftFileLock
    return f"; if that host was lost, remove {path}, since this disk has no locks" if soft else ""


def _holder(directory: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads((directory / _HOLDER).read_text())
    except (OSError, ValueError):
        return {}


def _check_shared(directory: pathlib.Path) -> None:
    """Checks that every process sees the directory that process 0 has locked."""
    distributed.barrier("the run's directory")
    distributed.check_same(
        str(_holder(directory).get("id")),
        f"output_dir={directory} is not the directory that process 0 writes to; use one on a file "
        "system that all hosts share",
    )


def _compilation_cache(config: TrainConfig) -> str | None:
    """Returns the directory of compiled programs, or None to keep none.

    XLA's CPU programs lose the order of their collectives in the cache: devices that run them in
    different orders wait for each other for ever, or take one sum for another.
    """
    if jax.device_count() > 1 and jax.default_backend() == "cpu":
        return None
    if not config.compilation_cache_dir:
        return None
    directory = pathlib.Path(config.compilation_cache_dir).expanduser()
    if jax.process_count() > 1 and not _seen_by_all(directory):
        # Only process 0 writes programs, so others would compile anew what it finds, and on GPUs
        # wait for its share of the autotuning, which it skips.
        directory = pathlib.Path(config.output_dir).absolute() / "xla"
    return str(directory)


def _seen_by_all(directory: pathlib.Path) -> bool:
    """Returns whether all processes see one directory, by a file that process 0 leaves there."""
    mark = directory / "process_0"
    if distributed.is_main():
        with contextlib.suppress(OSError):  # its own text is then empty
            directory.mkdir(parents=True, exist_ok=True)
            write_whole(mark, secrets.token_hex())
    distributed.barrier("the compilation cache")
    try:
        text = mark.read_text()
    except OSError:
        text = ""
    texts = set(distributed.gather_texts(text))
    return len(texts) == 1 and "" not in texts


@contextlib.contextmanager
def _log(directory: pathlib.Path) -> Iterator[None]:
    """Writes the log to `training.log` too; processes other than the first log warnings only."""
    logging.get_absl_handler().addFilter(_own_or_serious)
    if not distributed.is_main():
        logging.set_verbosity(logging.WARNING)
        yield
        return
    verbosity = logging.get_verbosity()
    logging.set_verbosity(max(verbosity, logging.INFO))  # WARNING where no command has raised it
    handler = python_logging.FileHandler(directory / "training.log")
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(_own_or_serious)
    logging.get_absl_logger().addHandler(handler)
    logging.info("jax %s, %d x %s", jax.__version__, jax.device_count(), jax.devices()[0])
    # One of several processes that fails ends soon; what its watch finds out then is logged too.
    lasts = jax.process_count() > 1
    try:
        yield
        lasts = False
    finally:
        logging.set_verbosity(verbosity)
        if not lasts:
            logging.get_absl_logger().removeHandler(handler)
            handler.close()


def _own_or_serious(record: python_logging.LogRecord) -> bool:
    """Lets through what this package logs, and the warnings of others (Orbax logs every file).

    Orbax logs an error of its threads with a long traceback, and raises it here besides.
    """
    path = pathlib.Path(record.pathname)
    if pathlib.Path(__file__).parent.parent in path.parents:
        return True
    twice = "orbax" in path.parts and record.levelno >= python_logging.ERROR
    hidden = twice and not os.environ.get("ATLAS_TRACEBACK")
    return record.levelno >= python_logging.WARNING and not hidden
