"""Cache of a dataset's tokens in a run's `output_dir`.

    data/tokens-0123456789abcdef.npz    the result of `tokenize` for one fingerprint

The fingerprint covers the samples, the tokenizer, the chat template with its options and date, the
options of the mask, and the versions of the libraries that render and encode. A file is written
atomically under a lock: one of the processes that share a disk makes it, and the others wait and
read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import pathlib
import re
import time
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import filelock
import msgspec
import numpy as np
from absl import logging

from atlas_jax.data import chat
from atlas_jax.data.chat_template import ChatTemplate
from atlas_jax.data.examples import Conversation, Sample
from atlas_jax.files import replace_atomically

_FORMAT = "atlas_jax tokens 1"
_FILE = re.compile(r"tokens-[0-9a-f]{16}\.npz")
_LOCK = "tokens.lock"
_LIBRARIES = ("jinja2", "tokenizers", "transformers")
_POLL_SECS = 0.2
_FIRST = 256
"""Number of samples from which the time of all is estimated."""
_WORTH_SECS = 10.0
"""Seconds of remaining work above which workers start; they are ready after seconds."""

_BROKEN = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)


class Sequences(NamedTuple):
    """Concatenated examples; example `i` is `[offsets[i], offsets[i + 1])` of the flat arrays."""

    tokens: np.ndarray  # [sum of T] int32
    loss_mask: np.ndarray  # [sum of T] bool
    offsets: np.ndarray  # [examples + 1] int64


class Remark(NamedTuple):
    """Notes on an example, or the reason for its rejection."""

    name: str
    notes: tuple[str, ...]
    """Keys of `chat.NOTES`."""
    reason: str


class Tokenized(NamedTuple):
    """The examples of a dataset, with remarks on unusual samples."""

    sequences: Sequences
    remarks: list[Remark]
    path: pathlib.Path | None = None
    """The cache file, or None."""


def tokenize(
    template: ChatTemplate,
    samples: Sequence[Sample],
    options: chat.MaskOptions,
    directory: str = "",
) -> Tokenized:
    """Returns the examples of all samples, in order, from the cache file if it exists.

    Args:
        template: the chat template of a tokenizer that `chat.check_tokenizer` accepts.
        samples: the samples of the dataset.
        options: the options of the loss mask.
        directory: the directory of the cache file; "" for no file.
    """
    _fit_first(template, samples)
    if not directory:
        return _encode(template, samples, options)
    key = fingerprint(template, samples, options)
    path = pathlib.Path(directory) / f"tokens-{key[:16]}.npz"
    if cached := _load(path, key):
        return cached
    path.parent.mkdir(parents=True, exist_ok=True)
    # One process tokenizes for all; the others then find the file.
    with _locked(path.with_name(_LOCK)):
        if cached := _load(path, key):
            return cached
        made = _encode(template, samples, options)
        _store(path, key, made)
        return made._replace(path=path)


def fingerprint(
    template: ChatTemplate, samples: Iterable[Sample], options: chat.MaskOptions
) -> str:
    """Returns a hash of everything on which the result of `tokenize` depends."""
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    trained = options._asdict() | {"stop_ids": sorted(options.stop_ids)}
    digest = hashlib.sha256(
        json.dumps([_FORMAT, versions, template.identity(), trained], sort_keys=True).encode()
    )
    for sample in samples:
        content = _content(sample)
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def remove_others(directory: str, wanted: Collection[pathlib.Path | None]) -> None:
    """Removes the cache files of other fingerprints from a directory."""
    for path in pathlib.Path(directory).glob("tokens-*.npz"):
        # Only files of this program: the directory may hold others of the user's.
        if path not in wanted and _FILE.fullmatch(path.name) and _is_ours(path):
            path.unlink(missing_ok=True)
            logging.info("removed %s, which holds the tokens of other rows or options", path)


def _fit_first(template: ChatTemplate, samples: Iterable[Sample]) -> None:
    """Checks, if a sample has a system message, whether the template has a place for it.

    A warning is then logged once, even if workers render or the cache file is read.
    """
    for sample in samples:
        messages = sample.messages if isinstance(sample, Conversation) else []
        if [message["role"] for message in messages[:2]] == ["system", "user"]:
            template.fitted(messages)
            return


def _content(sample: Sample) -> bytes:
    """Returns bytes that identify a sample."""
    kind = type(sample).__name__
    try:
        return msgspec.msgpack.encode([kind, *sample])
    except (TypeError, ValueError, OverflowError, RecursionError):
        # Numbers of more than 64 bits, and lone surrogates in the arguments of tools.
        return repr([kind, *sample]).encode(errors="surrogatepass")


def _encode(
    template: ChatTemplate, samples: Sequence[Sample], options: chat.MaskOptions
) -> Tokenized:
    examples = []
    remarks = []
    for encoded in _encoded(template, samples, options):
        if encoded.example:
            examples.append(encoded.example)
        if encoded.notes:
            remarks.append(Remark(encoded.name, encoded.notes, encoded.reason))
    sequences = Sequences(
        tokens=np.concatenate([np.zeros(0, np.int32), *(e.tokens for e in examples)]),
        loss_mask=np.concatenate([np.zeros(0, bool), *(e.loss_mask for e in examples)]),
        offsets=np.cumsum([0, *(len(e.tokens) for e in examples)], dtype=np.int64),
    )
    return Tokenized(sequences, remarks)


def _encoded(
    template: ChatTemplate, samples: Sequence[Sample], options: chat.MaskOptions
) -> Iterator[chat.Encoded]:
    """Yields the results of `chat.encode`, made by several processes where that saves time."""
    start = time.monotonic()
    first = list(chat.encode(template, samples[:_FIRST], options))
    secs = (time.monotonic() - start) * (len(samples) / _FIRST - 1)
    yield from first
    if secs <= _WORTH_SECS:
        yield from chat.encode(template, samples[_FIRST:], options)
        return
    from atlas_jax.data import encoding_pool  # most datasets are done before a worker would be

    yield from encoding_pool.encode(template, samples[_FIRST:], options)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock that ends with its process; does nothing on a file system without locks."""
    lock = filelock.FileLock(str(path))
    try:
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=0)
        if not lock.is_locked:
            logging.info("waiting for the process that tokenizes the rows for all")
            lock.acquire(poll_interval=_POLL_SECS)
    except OSError:
        logging.info("%s: no file locks here; every process tokenizes", path.parent)
    try:
        yield
    finally:
        lock.release()


def _store(path: pathlib.Path, key: str, made: Tokenized) -> None:
    """Writes the file; on a full disk the next start tokenizes again."""
    header = _bytes([_FORMAT, key])
    remarks = _bytes(made.remarks)
    try:
        with replace_atomically(path) as partial, partial.open("wb") as file:
            np.savez(file, header=header, remarks=remarks, **made.sequences._asdict())
    except OSError as error:
        logging.warning("the tokens of the rows cannot be kept in %s (%s)", path, error)


def _load(path: pathlib.Path, key: str) -> Tokenized | None:
    """Returns the content of the file; None if it is missing or not valid."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            header = _values(file["header"])
            sequences = Sequences(*(file[name] for name in Sequences._fields))
            remarks = [Remark(n, tuple(notes), why) for n, notes, why in _values(file["remarks"])]
        # The name has only a part of the key, so the whole key is compared.
        if header != [_FORMAT, key] or not _is_whole(sequences):
            raise ValueError("its content is another")
    except _BROKEN as error:
        logging.warning("%s does not hold the tokens of the rows (%s); made again", path, error)
        return None
    logging.info("%d examples read from %s", len(sequences.offsets) - 1, path)
    return Tokenized(sequences, remarks, path)


def _is_whole(sequences: Sequences) -> bool:
    tokens, mask, offsets = sequences
    kinds = [array.dtype for array in sequences] == [np.int32, bool, np.int64]
    return bool(
        kinds
        and tokens.shape == mask.shape == (offsets[-1],)
        and offsets[0] == 0
        and (np.diff(offsets) > 0).all()
    )


def _is_ours(path: pathlib.Path) -> bool:
    try:
        with np.load(path, allow_pickle=False) as file:
            return _values(file["header"])[0] == _FORMAT
    except _BROKEN:
        return False


def _bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _values(content: np.ndarray) -> Any:
    return json.loads(content.tobytes())
