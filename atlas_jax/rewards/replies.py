"""Cache of judges' replies on disk, and the account of a run's costs.

The replies are in one SQLite file in the cache directory, which processes, runs and hosts share. It
uses a rollback journal: a write-ahead log needs shared memory, which a network file system between
hosts does not provide. A failure of the cache is logged once and never an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pathlib
import re
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from absl import logging

from atlas_jax.files import write_whole
from atlas_jax.types import Message

FILE_NAME = "replies.sqlite"
"""Name of the file in the cache directory."""

_FLUSH_SECS = 1.0  # between two writes; a kill loses the replies since the last
_FLUSH_REPLIES = 256  # most replies between two writes
_LOCK_SECS = 5.0  # longest wait for another process that writes
_KEPT_FRAC = 0.9  # fraction of the size limit that is kept when the oldest replies are removed
_TABLE = """
CREATE TABLE IF NOT EXISTS replies (
    number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, text BLOB NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, is_cut INTEGER NOT NULL)
"""


class Reply(NamedTuple):
    """The text of a model, with its tokens."""

    text: str
    input_tokens: int
    output_tokens: int
    is_cut: bool = False  # whether it reached the limit of tokens


def key_of(parts: Sequence[str], messages: Sequence[Message]) -> str:
    """Returns the key of a call in the cache: a digest of everything on which the reply depends.

    Args:
        parts: address, model, temperature, limit of tokens and response format, in a fixed order.
        messages: the conversation.
    """
    texts = [text for m in messages for text in (m["role"], m["content"])]
    # The lengths keep the parts apart: the same characters divided otherwise are another call.
    content = "".join(f"{len(part)}:{part}" for part in [*parts, *texts])
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


class ReplyCache:
    """Replies by the key of their call; threads may share one cache."""

    def __init__(self, directory: str, max_bytes: int = 0, *, is_read_only: bool = False) -> None:
        """Opens the cache of a directory.

        Args:
            directory: the directory of the file; "" keeps nothing.
            max_bytes: the size of the file above which the oldest replies are removed; 0 is no
                limit.
            is_read_only: whether the cache is only read.
        """
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._pending: dict[str, Reply] = {}
        self._flushed_at = -math.inf
        self._file: sqlite3.Connection | None = None
        self._path = pathlib.Path(directory).expanduser().absolute() / FILE_NAME
        if directory:
            with self._tolerant():
                self._file = self._open(is_read_only)

    def read(self, key: str) -> Reply | None:
        """Returns the reply to a call, or None."""
        with self._tolerant():
            if kept := self._pending.get(key):
                return kept
            if self._file is None:
                return None
            row = self._file.execute(
                "SELECT CAST(text AS BLOB), CAST(input_tokens AS INTEGER), "
                "CAST(output_tokens AS INTEGER), is_cut FROM replies WHERE key = ?",
                (bytes.fromhex(key),),
            ).fetchone()
            if row:
                text = row[0].decode("utf-8", "surrogatepass")
                return Reply(
                    text=text, input_tokens=row[1], output_tokens=row[2], is_cut=bool(row[3])
                )
        return None

    def write(self, key: str, reply: Reply) -> None:
        """Stores a reply, which replaces an earlier one; `flush` writes it to the disk."""
        if self._file is None:
            return
        with self._lock:
            self._pending[key] = reply
            is_late = time.monotonic() - self._flushed_at >= _FLUSH_SECS
            if is_late or len(self._pending) >= _FLUSH_REPLIES:
                self.flush()

    def flush(self) -> None:
        """Writes the replies in memory to the file, in one transaction."""
        with self._tolerant():
            if self._file is None or not self._pending:
                return
            rows = [
                (bytes.fromhex(key), r.text.encode("utf-8", "surrogatepass"), *r[1:])
                for key, r in self._pending.items()
            ]
            with _transaction(self._file):
                self._file.executemany(
                    "INSERT OR REPLACE INTO replies (key, text, input_tokens, output_tokens, "
                    "is_cut) VALUES (?, ?, ?, ?, ?)",
                    rows,
                )
            self._pending.clear()
            self._flushed_at = time.monotonic()
            self._trim(self._file)

    def _open(self, is_read_only: bool) -> sqlite3.Connection:
        if not is_read_only:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        # Opened for writing even to read: a journal that a kill has left must be rolled back.
        can_write = not is_read_only or os.access(self._path.parent, os.W_OK)
        mode = "ro" if not can_write else "rw" if is_read_only else "rwc"
        file = sqlite3.connect(
            f"file:{urllib.parse.quote(str(self._path))}?mode={mode}",
            uri=True,
            timeout=_LOCK_SECS,
            isolation_level=None,
            check_same_thread=False,
        )
        if not is_read_only:
            file.execute("PRAGMA auto_vacuum = FULL")  # the file shrinks when replies are removed
            file.execute(_TABLE)
        # Fails if the file is not such a cache.
        file.execute("SELECT number, key, text, is_cut FROM replies LIMIT 1")
        return file

    def _trim(self, file: sqlite3.Connection) -> None:
        """Removes the oldest replies if the file is above its limit."""
        while self._max_bytes and (size := _size(file)) > self._max_bytes:
            (count,) = file.execute("SELECT count(*) FROM replies").fetchone()
            if not count:
                return
            oldest = math.ceil(count * (1 - _KEPT_FRAC * self._max_bytes / size))
            with _transaction(file):
                file.execute(
                    "DELETE FROM replies WHERE number IN "
                    "(SELECT number FROM replies ORDER BY number LIMIT ?)",
                    (oldest,),
                )

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Turns the cache off, with a warning, if its file fails."""
        with self._lock:
            try:
                yield
            except (sqlite3.Error, OSError, ValueError) as error:
                self._file = None
                self._pending.clear()
                logging.warning(
                    "the cache of judges' replies is not used from here on: %s: %s; see to the "
                    "file, or name another reward.rim.cache_dir",
                    *(self._path, error),
                )


@contextlib.contextmanager
def _transaction(file: sqlite3.Connection) -> Iterator[None]:
    file.execute("BEGIN IMMEDIATE")
    try:
        yield
        file.execute("COMMIT")
    finally:
        if file.in_transaction:
            file.execute("ROLLBACK")


def _size(file: sqlite3.Connection) -> int:
    (pages,) = file.execute("PRAGMA page_count").fetchone()
    (size,) = file.execute("PRAGMA page_size").fetchone()
    return int(pages) * int(size)


class Spent(NamedTuple):
    """Calls, tokens and money spent on judges."""

    calls: int = 0
    tokens: int = 0
    cost: float | None = 0.0  # None: a part is unknown


_LEDGER_NAME = re.compile(r"(?P<run>.*_process_)\d+\.json")
_WIDTH = 160  # bytes of an account; fixed, so that a new one exactly overwrites the old one


class Ledger:
    """Account of the costs of this process of a run, over all its restarts.

    A call is on disk before it is made, so it survives a kill. The account is overwritten in place
    by one write of less than a sector, so no other process reads half of it.
    """

    def __init__(self, path: str) -> None:
        """Continues the account in a file; "" keeps it in memory.

        Raises:
            ValueError: if the file holds no account, for instance because a power cut emptied it.
        """
        self._path = path
        self._lock = threading.Lock()
        self._is_laid_out = False
        self._is_warned = False
        self.spent = _read(path) if path and os.path.exists(path) else Spent()
        self.others = _sum([_read(p) for p in _others(path)])
        """Costs of the other processes of the run when this one began."""

    @property
    def total(self) -> Spent:
        """Costs of all processes when this one began, and of this one since then."""
        return _sum([self.spent, self.others])

    def begin(self) -> None:
        """Counts a call."""
        self._count(Spent(calls=1))

    def refund(self) -> None:
        """Subtracts a call that the server did not accept."""
        self._count(Spent(calls=-1))

    def add(self, tokens: int, cost: float | None) -> None:
        """Adds the tokens and the cost of a call; an unknown cost (None) makes the sum unknown."""
        self._count(Spent(0, tokens, cost))

    def save(self) -> None:
        """Writes the account, flushed to the disk against power cuts."""
        with self._lock:
            self._write(is_whole=True)

    def _count(self, more: Spent) -> None:
        with self._lock:
            self.spent = _sum([self.spent, more])
            self._write(is_whole=not self._is_laid_out)

    def _write(self, is_whole: bool) -> None:
        if not self._path:
            return
        text = json.dumps(self.spent._asdict()).ljust(_WIDTH) + "\n"
        try:
            if is_whole or not os.path.exists(self._path):
                write_whole(self._path, text)
                self._is_laid_out = True
            else:
                with open(self._path, "r+b", buffering=0) as file:
                    file.write(text.encode())
        except OSError as error:
            if not self._is_warned:
                logging.warning(
                    "what judges have cost cannot be written: %s: %s; a restart will not know it",
                    *(self._path, error),
                )
            self._is_warned = True


def _others(path: str) -> list[str]:
    """Returns the accounts of other processes, from earlier starts with more processes too."""
    file = pathlib.Path(path)
    name = _LEDGER_NAME.fullmatch(file.name)
    if not name or not file.parent.is_dir():
        return []
    return sorted(
        str(other)
        for other in file.parent.iterdir()
        if (found := _LEDGER_NAME.fullmatch(other.name))
        if found["run"] == name["run"] and other.name != file.name
    )


def _read(path: str) -> Spent:
    try:
        spent = Spent(**json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
        numbers = [spent.calls, spent.tokens, 0 if spent.cost is None else spent.cost]
        if not all(isinstance(n, int | float) and 0 <= n < math.inf for n in numbers):
            raise ValueError(f"{spent} has what is no number of 0 or more")
        return spent
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not the account of what judges have cost ({error}); write "
            '{"calls": …, "tokens": …, "cost": …} with what is known, or remove it to '
            "begin at 0"
        ) from None


def _sum(parts: Sequence[Spent]) -> Spent:
    costs = [part.cost for part in parts if part.cost is not None]
    is_known = len(costs) == len(parts)
    return Spent(
        calls=sum(part.calls for part in parts),
        tokens=sum(part.tokens for part in parts),
        cost=sum(costs) if is_known else None,
    )
