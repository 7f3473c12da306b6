"""Texts of the frozen student that are kept: it would write the same, or as good, again."""

from __future__ import annotations

import collections
import threading

from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.types import Completion

_MOST_TOKENS = 2**20  # kept at one time, of about 100 bytes each

_Key = tuple[tuple[int, ...], int, Sampling, int]


class StudentCache:
    """Completions of one student by prompt, limit, sampling and number; the least used go first.

    Any thread may use it. Completions that failed are not kept.
    """

    def __init__(self, keep: str, max_tokens: int = _MOST_TOKENS) -> None:
        """Keeps nothing yet.

        Args:
            keep: `greedy`, `always` or `never`, see `rollout.cache_student`.
            max_tokens: most tokens of the prompts and completions that are kept.
        """
        self._keep = keep
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[_Key, Completion] = collections.OrderedDict()
        self._tokens = 0
        self._found = 0
        self._asked = 0

    def get(self, request: Request, sampling: Sampling, number: int = 0) -> Completion | None:
        """Returns what the student wrote, if it is kept.

        Args:
            request: the prompt and the limit; its seed does not count.
            sampling: how tokens are drawn.
            number: that of the text among several of the same request.
        """
        key = request.prompt_ids, request.max_tokens, sampling, number
        with self._lock:
            self._asked += 1
            completion = self._kept.get(key)
            if completion is not None:
                self._found += 1
                self._kept.move_to_end(key)
        return completion

    def put(
        self, request: Request, sampling: Sampling, completion: Completion, number: int = 0
    ) -> None:
        """Keeps a completion, if such completions are kept; see `get`."""
        wanted = self._keep == "always" or (self._keep == "greedy" and sampling.temperature == 0)
        if not wanted or completion.is_failed:
            return
        key = request.prompt_ids, request.max_tokens, sampling, number
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = completion
            self._tokens += _size(completion)
            while self._tokens > self._max_tokens:
                _, dropped = self._kept.popitem(last=False)
                self._tokens -= _size(dropped)

    def counts(self) -> tuple[int, int]:
        """Returns the texts that were kept and those that were needed, since the last call."""
        with self._lock:
            found = self._found
            asked = self._asked
            self._found = 0
            self._asked = 0
        return found, asked


def _size(completion: Completion) -> int:
    return len(completion.prompt_ids) + completion.num_tokens
