"""Tokenization of samples by several processes: this one and workers that it starts.

A worker is a program of its own, neither forked from a process with JAX's threads nor a second run
of the user's script. It reads pickled chunks from its standard input and answers on its standard
output. It first imports the tokenizer's library, which takes seconds.

This process repeats the chunks of a worker that died, and then raises the same error if a sample
caused it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any, TypeAlias

from absl import logging

from atlas_jax.data import chat
from atlas_jax.data.chat_template import ChatTemplate
from atlas_jax.data.examples import Sample

_CHUNK = 256  # number of samples that a worker gets at one time
_MAX_WORKERS = 15

_MODULE = "atlas_jax.data.encoding_pool"
_ENDED = (EOFError, OSError, pickle.UnpicklingError)

Task: TypeAlias = tuple[ChatTemplate, chat.MaskOptions]
"""The template and options that a worker uses for all of its chunks."""


def encode(
    template: ChatTemplate,
    samples: Sequence[Sample],
    options: chat.MaskOptions,
) -> Iterator[chat.Encoded]:
    """Yields the results of `chat.encode`, computed by one process for each available processor.

    Args:
        template: the chat template of the run.
        samples: all samples of a dataset.
        options: the options of the loss mask.
    """
    queue = _Queue(samples)
    done: dict[int, list[chat.Encoded]] = {}
    count = min(_num_processors() - 1, _MAX_WORKERS, len(queue.places))
    with contextlib.ExitStack() as stack:
        if count > 0:
            logging.info("tokenizing %d rows with %d further processes", len(samples), count)
            stack.enter_context(_helped(queue, done, (template, options), count))
        for place, chunk in queue:
            done[place] = list(chat.encode(template, chunk, options))
    for place, chunk in queue:  # chunks of workers that died
        done[place] = list(chat.encode(template, chunk, options))
    return itertools.chain.from_iterable(done[place] for place in sorted(done))


def _num_processors() -> int:
    """Returns the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Queue(Iterator[tuple[int, Sequence[Sample]]]):
    """Chunks that no thread has taken yet, with the index of their first sample."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self.places = collections.deque(range(0, len(samples), _CHUNK))

    def __next__(self) -> tuple[int, Sequence[Sample]]:
        try:
            place = self.places.popleft()
        except IndexError:
            raise StopIteration from None
        return place, self._samples[place : place + _CHUNK]


@dataclasses.dataclass
class _Helper:
    """A worker process."""

    process: subprocess.Popen[bytes]
    is_ready: bool = False
    is_dismissed: bool = False

    def dismiss(self, even_if_ready: bool = True) -> None:
        """Kills the process."""
        if even_if_ready or not self.is_ready:
            self.is_dismissed = True
            self.process.kill()


@contextlib.contextmanager
def _helped(
    queue: _Queue, done: dict[int, list[chat.Encoded]], task: Task, count: int
) -> Iterator[None]:
    """Lets workers take chunks of the queue too, and waits at the end for their last chunks."""
    workers: list[_Helper] = []
    with futures.ThreadPoolExecutor(count) as threads:
        try:
            workers += (_Helper(_start()) for _ in range(count))
            serving = [threads.submit(_serve, worker, queue, done, task) for worker in workers]
            yield
            for worker in workers:
                worker.dismiss(even_if_ready=False)  # still importing: the work is done without it
            futures.wait(serving)
        finally:
            for worker in workers:
                worker.dismiss()
                # Collects the exit code, or the process would stay as a zombie.
                worker.process.communicate()


def _start() -> subprocess.Popen[bytes]:
    # This process repeats and reports errors of a worker, so its standard error is dropped. A
    # session of its own keeps Ctrl-C from it.
    alone = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-m", _MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | alone,
        start_new_session=True,
    )


def _serve(worker: _Helper, queue: _Queue, done: dict[int, list[chat.Encoded]], task: Task) -> None:
    """Sends chunks to a worker until none is left or it dies."""
    try:
        _ask(worker, task)
        worker.is_ready = True
        for place, chunk in queue:
            try:
                done[place] = _ask(worker, list(chunk))
            except _ENDED:
                queue.places.append(place)
                raise
    except _ENDED:
        if not worker.is_dismissed:
            logging.warning("a process that tokenizes ended early; the others do its part")


def _ask(worker: _Helper, content: Any) -> Any:
    requests = worker.process.stdin
    answers = worker.process.stdout
    assert requests and answers  # pipes, see `_start`
    pickle.dump(content, requests, pickle.HIGHEST_PROTOCOL)
    requests.flush()
    return pickle.load(answers)


def main() -> None:
    """Runs a worker: reads its task and chunks, and answers each, until its input ends."""
    # Libraries may print, which must not be mixed with the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    template, options = pickle.load(sys.stdin.buffer)
    answer: Any = None
    with contextlib.suppress(EOFError):
        while True:
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
            answer = list(chat.encode(template, pickle.load(sys.stdin.buffer), options))


if __name__ == "__main__":
    main()
