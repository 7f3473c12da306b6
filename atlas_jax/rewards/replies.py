"""Replies of judges on disk, one small file for each call, and what a run has spent.

A file has its name when it is whole, so that processes, also of several hosts, share a directory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pathlib
import uuid
from collections.abc import Sequence
from typing import NamedTuple

from atlas_jax.files import write_whole
from atlas_jax.types import Message


class Reply(NamedTuple):
    """What a model wrote, and what it took."""

    text: str
    input_tokens: int
    output_tokens: int


def key_of(model: str, messages: Sequence[Message], temperature: float, max_tokens: int) -> str:
    """Returns the name that a call has in the cache: a digest of all that decides its reply."""
    texts = [text for m in messages for text in (m["role"], m["content"])]
    parts = [model, repr(temperature), str(max_tokens), *texts]
    content = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()


class Cache:
    """Replies by the key of their call."""

    def __init__(self, directory: str) -> None:
        """Opens a directory; "" keeps nothing.

        Raises:
            OSError: if it cannot be written.
        """
        tag = uuid.uuid4().hex
        self._partials = (f"{tag}.{i}" for i in itertools.count())
        self._root = pathlib.Path(directory).expanduser() if directory else None
        if self._root:
            for first in range(256):
                (self._root / f"{first:02x}").mkdir(parents=True, exist_ok=True)

    def read(self, key: str) -> Reply | None:
        """Returns the reply to a call; None where there is none, or a broken file."""
        if self._root is None:
            return None
        try:
            with open(self._path(self._root, key), encoding="utf-8") as file:
                return Reply(*json.load(file))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def write(self, key: str, reply: Reply) -> None:
        """Keeps a reply, in the place of an earlier one."""
        if self._root is None:
            return
        path = self._path(self._root, key)
        partial = f"{path}.{next(self._partials)}"
        with open(partial, "wb", buffering=0) as file:
            file.write(json.dumps(reply).encode())
        os.replace(partial, path)

    def _path(self, root: pathlib.Path, key: str) -> str:
        return f"{root}/{key[:2]}/{key[2:]}.json"


class Spent(NamedTuple):
    """What judges have cost."""

    calls: int = 0
    tokens: int = 0
    cost: float | None = 0.0  # None: some of it is not known


class Ledger:
    """What this process of a run has spent, over all its restarts."""

    def __init__(self, path: str) -> None:
        """Continues the account in a file; "" keeps it in memory.

        Raises:
            ValueError: for a file that holds no account, such as one that lost power emptied.
        """
        self._path = path
        self.spent = Spent()
        if path and os.path.exists(path):
            try:
                self.spent = Spent(**json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{path} is not the account of what judges have cost ({error}); write "
                    '{"calls": …, "tokens": …, "cost": …} with what is known, or remove it to '
                    "begin at 0"
                ) from None

    def begin(self) -> None:
        """Counts a call."""
        self.spent = self.spent._replace(calls=self.spent.calls + 1)

    def add(self, tokens: int, cost: float | None) -> None:
        """Counts what a call took; a cost of None is not known, nor is then the sum."""
        calls, before, money = self.spent
        total = None if money is None or cost is None else money + cost
        self.spent = Spent(calls, before + tokens, total)

    def save(self) -> None:
        """Writes the account."""
        if self._path:
            write_whole(self._path, json.dumps(self.spent._asdict()) + "\n")
