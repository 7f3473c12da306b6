"""An endless, restorable stream of batches from the rows of a dataset.

All rows are tokenized once, up front, into flat arrays. The batch of step `n` is a pure function of
those arrays, the seed and `n`, computed on demand. A checkpoint therefore stores only the step, and
any number of processes sees the same global batches. Grain's threads assemble them ahead of time.

    epoch e:  permutation(seed, e)  ->  rows (packed, or one example each)  ->  global_rows a step
    process p of P takes rows [p * global_rows / P, (p + 1) * global_rows / P) of each step

The last step of an epoch is filled up with blank rows, so every example is seen exactly once an
epoch.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import grain
import numpy as np
from absl import logging

from atlas_jax.data import chat, examples
from atlas_jax.data.chat_template import ChatTemplate
from atlas_jax.data.packing import (
    bucket_length,
    capped_buckets,
    collate,
    pack_best_fit,
)
from atlas_jax.data.sources import LESSONS, Rows, check_rejected, epoch_order, unfold
from atlas_jax.data.tokenized import Sequences, Tokenized, tokenize
from atlas_jax.options.train import TrainConfig
from atlas_jax.types import Batch, Example

Table: TypeAlias = list[list[int]] | np.ndarray
"""Indices of the examples of each row: lists if rows are packed, else an array of one column."""

_SEGMENTS = 8
"""Steps of `segment_bound`."""


class HostRows(NamedTuple):
    """The rows of a step, and this process's share of them."""

    global_rows: int
    """Number of rows a step, over all processes."""
    process_index: int = 0
    num_processes: int = 1
    microbatches: int = 1
    """Forward passes of a step, each with a length of its own if rows are not packed."""


class DataOrder(NamedTuple):
    """Settings that, with the examples, determine the examples of each step."""

    global_rows: int
    max_seq_length: int
    packing: bool
    shuffle: bool
    seed: int


class Report(NamedTuple):
    """Statistics of the rows."""

    rows: int
    examples: int
    tokens: int
    trained_tokens: int
    notes: Mapping[str, tuple[str, ...]]
    """Note of `chat.NOTES` -> names of the rows with it; of rejected rows, `name: reason`."""


_LOST = ("empty", "masked", "truncated")
"""Notes on rows that are not or not completely trained; too many of them stop the run."""


def build(
    rows: Rows,
    config: TrainConfig,
    template: ChatTemplate,
    layout: HostRows,
    stop_ids: Sequence[int] = (),
    training: bool = True,
    token_dir: str = "",
) -> TokenDataset:
    """Tokenizes rows and returns the dataset that serves them as batches.

    Args:
        rows: the rows, from `sources.load_rows`.
        config: the config, for lengths, packing, seed and the `data` options; rows are packed only
            with `packing=True`, since `auto` depends on the devices.
        template: the chat template of a fast tokenizer; conversations need one.
        layout: the number of rows a step, and this process's share.
        stop_ids: tokens that end a turn in addition to the tokenizer's end of text, such as those
            of the model's `generation_config.json`.
        training: whether to shuffle and pack as configured; false keeps the order, for evaluation.
        token_dir: the directory that keeps the tokens for the next start; "" keeps none.

    Raises:
        ValueError: if the rows a step do not divide over the processes, the tokenizer has not what
            the rows need, too many rows are rejected, or no example is left.
    """
    _check_layout(layout)
    rows = unfold(rows, LESSONS)
    tokenizer = template.tokenizer
    samples, rejected = examples.parse_rows(rows, config.data, config.teaching)
    chat.check_tokenizer(tokenizer, samples)
    options = chat.mask_options(
        tokenizer,
        config.data.completion_only,
        config.max_seq_length,
        stop_ids,
        config.data.turns,
    )
    tokenized = tokenize(template, samples, options, token_dir)
    remarks = tokenized.remarks
    rejected += [f"{r.name}: {r.reason}" for r in remarks if "rejected" in r.notes]
    # Rows that lose their answer would make the run look as if it had trained on them.
    lost = [f"{r.name}: {chat.NOTES[note]}" for r in remarks for note in _LOST if note in r.notes]
    check_rejected(rejected + lost, len(rows.rows), config.data.max_rejected_frac)
    report = _report(len(rows.rows) + len(rows.rejected), rows.rejected + rejected, tokenized)
    _log(report)
    _check_not_empty(report)
    order = DataOrder(
        global_rows=layout.global_rows,
        max_seq_length=config.max_seq_length,
        packing=config.packing is True,
        shuffle=training and config.data.shuffle,
        seed=config.seed,
    )
    buckets = capped_buckets(config.data.length_buckets, config.max_seq_length)
    return TokenDataset(tokenized, report, order, layout, buckets, config.data.num_workers)


class TokenDataset:
    """The batches of one process by step, from tokenized examples."""

    def __init__(
        self,
        tokenized: Tokenized,
        report: Report,
        order: DataOrder,
        layout: HostRows,
        buckets: tuple[int, ...],
        num_threads: int,
    ) -> None:
        self.report = report
        self.token_path = tokenized.path
        """The file that holds the tokens, or None."""
        sequences = tokenized.sequences
        self.fingerprint = fingerprint(sequences, order)
        """Hash of the examples and of the settings of their order."""
        self._sequences = sequences
        self._lengths = np.diff(sequences.offsets)
        self._order = order
        self._layout = layout
        self._buckets = buckets
        self._num_threads = num_threads
        self._first_steps = [0]  # of each known epoch, and of the one after
        self._max_segments = 0  # not known yet
        self._rows: dict[int, Table] = {}  # by epoch, for the latest epochs
        self._lock = threading.RLock()  # Grain's threads share the two above

    @property
    def tokens(self) -> np.ndarray:
        """Concatenated tokens of all examples, [sum of T] int32."""
        return self._sequences.tokens

    def example(self, index: int) -> Example:
        """Returns one example, in the order of the dataset's rows."""
        part = slice(self._sequences.offsets[index], self._sequences.offsets[index + 1])
        return Example(self._sequences.tokens[part], self._sequences.loss_mask[part])

    def num_steps(self, epochs: int | float) -> int:
        """Returns the number of steps of the first `epochs` passes, rounded up."""
        whole = int(epochs)
        with self._lock:
            self._know_epochs(math.ceil(epochs))
            first = self._first_steps[whole]
            after = self._first_steps[math.ceil(epochs)]
        return first + math.ceil((epochs - whole) * (after - first))

    def batch(self, step: int) -> Batch:
        """Returns this process's rows of one step, counted from the first step of epoch 0.

        Those of each microbatch stand together, the longest first, as `row_lengths` has them.
        """
        parts = self._parts(step)
        share = self._layout.global_rows // len(parts) // self._layout.num_processes
        first = self._layout.process_index * share
        mine: list[list[Example]] = []
        for part in parts:
            rows = [[self.example(int(i)) for i in row] for row in part[first : first + share]]
            mine += rows + [[]] * (share - len(rows))
        return collate(mine, self.row_lengths(step)[0])

    def row_lengths(self, step: int) -> tuple[int, ...]:
        """Returns the length of rows in each microbatch, or one length that all have.

        It depends on the rows of all processes, so that all have the same shapes.
        """
        if self._order.packing:
            return (self._order.max_seq_length,)
        longest = (max(map(self._row_tokens, part), default=0) for part in self._parts(step))
        return tuple(bucket_length(tokens, self._buckets) for tokens in longest)

    def _parts(self, step: int) -> list[Table]:
        """Returns the rows of a step, or of each of its microbatches if those differ in length.

        Rows that are missing in an epoch's last step come last.
        """
        rows = self._step_rows(step)
        count = self._layout.microbatches
        if self._order.packing or count == 1:
            return [rows]
        # Which rows a step has stays as it is. Its longest come first: too little memory shows at
        # once.
        ordered = np.array(sorted(rows, key=self._row_tokens, reverse=True))
        size = self._layout.global_rows // count
        return [ordered[i : i + size] for i in range(0, count * size, size)]

    def _row_tokens(self, row: list[int] | np.ndarray) -> int:
        return int(self._lengths[row].sum())

    @property
    def max_segments(self) -> int:
        """Most examples of a row: as many as in the first epoch, rounded up, and a few more.

        Programs are compiled for it, and the rows of later epochs keep to it.
        """
        if not self._order.packing:
            return 1
        with self._lock:
            if not self._max_segments:
                self._max_segments = segment_bound(max(map(len, self._epoch_rows(0))))
            return self._max_segments

    def num_tokens(self, step: int) -> int:
        """Returns the number of tokens of a step over all processes, without padding."""
        return sum(map(self._row_tokens, self._step_rows(step)))

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Batches:
        """Returns an iterator over the batches of `[start_step, stop_step)`.

        Args:
            start_step: the step of the first batch.
            stop_step: the step after the last batch; None continues for ever.
        """
        return Batches(self, start_step, sys.maxsize if stop_step is None else stop_step)

    def read(self, start_step: int, stop_step: int) -> grain.DatasetIterator[Batch]:
        """Returns Grain's iterator over a range of steps, which threads prefetch."""
        options = grain.ReadOptions(
            num_threads=self._num_threads, prefetch_buffer_size=2 * self._num_threads
        )
        steps = grain.MapDataset.source(range(start_step, stop_step))
        return iter(steps.map(self.batch).to_iter_dataset(options))

    def _step_rows(self, step: int) -> Table:
        with self._lock:
            while self._first_steps[-1] <= step:
                self._know_epochs(len(self._first_steps))
            epoch = bisect.bisect_right(self._first_steps, step) - 1
            first = (step - self._first_steps[epoch]) * self._order.global_rows
            return self._epoch_rows(epoch)[first : first + self._order.global_rows]

    def _know_epochs(self, count: int) -> None:
        """Extends `_first_steps` to the end of the first `count` epochs."""
        for epoch in range(len(self._first_steps) - 1, count):
            num_rows = len(self._epoch_rows(epoch)) if self._order.packing else len(self._lengths)
            steps = math.ceil(num_rows / self._order.global_rows)
            self._first_steps.append(self._first_steps[-1] + steps)

    def _epoch_rows(self, epoch: int) -> Table:
        if epoch not in self._rows:
            # Two epochs are kept, because at the border of two epochs the prefetching threads read
            # from both.
            self._rows = {e: rows for e, rows in self._rows.items() if abs(e - epoch) == 1}
            most = self.max_segments if epoch and self._order.packing else 0
            self._rows[epoch] = epoch_rows(self._lengths, self._order, epoch, most)
        return self._rows[epoch]


class Batches(Iterator[Batch]):
    """An iterator over the batches of a range of steps, whose state is the next step."""

    def __init__(self, dataset: TokenDataset, start_step: int, stop_step: int) -> None:
        self._dataset = dataset
        self._step = start_step
        self._stop_step = stop_step
        self._reader = dataset.read(start_step, stop_step)

    def __next__(self) -> Batch:
        batch = next(self._reader)
        self._step += 1
        return batch

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the last batch, over all processes."""
        return self._dataset.num_tokens(self._step - 1)

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Length of rows in each microbatch of the last batch, or one that all have."""
        return self._dataset.row_lengths(self._step - 1)

    def get_state(self) -> dict[str, Any]:
        """Returns the position, for JSON: the next step and the data's fingerprint."""
        return {"step": self._step, "fingerprint": self._dataset.fingerprint}

    def set_state(self, state: dict[str, Any], *, allow_other_data: bool = False) -> None:
        """Continues with the batch that was the next one when `state` was taken.

        Args:
            state: from `get_state`.
            allow_other_data: whether the step is kept though the data or their order are others.

        Raises:
            ValueError: if the state is from other data or other settings of their order, unless
                they are allowed.
        """
        if state["fingerprint"] != self._dataset.fingerprint and not allow_other_data:
            raise ValueError(
                f"the checkpoint at step {state['step']} is from data {state['fingerprint']}, this "
                f"run has {self._dataset.fingerprint}: the examples, the tokenizer, the seed, the "
                "batch size, max_seq_length, packing or shuffle differ; restore them, or start "
                "with a new output_dir and resume_from"
            )
        # The threads may have read ahead from the old position.
        self.close()
        self._step = state["step"]
        self._reader = self._dataset.read(self._step, self._stop_step)

    def close(self) -> None:
        """Ends the prefetching threads."""
        self._reader.close()


def segment_bound(segments: int) -> int:
    """Returns the segments that attention has room for in rows of so many.

    There is some room for other epochs, whose rows are packed otherwise.
    """
    return _SEGMENTS * (segments // _SEGMENTS + 1)


def epoch_rows(lengths: np.ndarray, order: DataOrder, epoch: int, max_examples: int = 0) -> Table:
    """Returns the examples of each row of an epoch, every example exactly once.

    Args:
        lengths: the number of tokens of each example, [examples].
        order: the settings, for shuffling and packing.
        epoch: the epoch, counted from 0, which determines the permutation.
        max_examples: most examples of a row; 0 for any.
    """
    # Packing follows the permutation, so every epoch has other neighbours in its rows.
    indices = epoch_order(len(lengths), epoch, order.seed, order.shuffle)
    if not order.packing:
        return indices[:, None]
    rows = pack_best_fit(lengths[indices], order.max_seq_length, max_examples)
    return [indices[row].tolist() for row in rows]


def fingerprint(sequences: Sequences, order: DataOrder) -> str:
    """Returns a short hash of the examples and of the settings of their order."""
    digest = hashlib.sha256(json.dumps(order._asdict(), sort_keys=True).encode())
    for array in sequences:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _check_layout(layout: HostRows) -> None:
    if layout.global_rows % layout.num_processes:
        raise ValueError(
            f"{layout.global_rows} rows a step do not divide over {layout.num_processes} "
            "processes; use a multiple as train_batch_size"
        )


def _report(num_rows: int, rejected: list[str], tokenized: Tokenized) -> Report:
    tokens, loss_mask, offsets = tokenized.sequences
    notes = {
        note: tuple(r.name for r in tokenized.remarks if note in r.notes) for note in chat.NOTES
    }
    return Report(
        rows=num_rows,
        examples=len(offsets) - 1,
        tokens=len(tokens),
        trained_tokens=int(loss_mask.sum()),
        notes=notes | {"rejected": tuple(rejected)},
    )


def _log(report: Report) -> None:
    logging.info(
        "%d rows -> %d examples, %d tokens, %d of them trained",
        *(report.rows, report.examples, report.tokens, report.trained_tokens),
    )
    for note, names in report.notes.items():
        if names:
            from atlas_jax.wording import shorten  # for what is wrong

            shown = ", ".join(shorten(names, 5))
            logging.warning("%d %s (%s): %s", len(names), note, chat.NOTES[note], shown)


def _check_not_empty(report: Report) -> None:
    if not report.examples:
        counts = ", ".join(f"{len(names)} {note}" for note, names in report.notes.items())
        raise ValueError(
            f"no example is left of {report.rows} rows: {counts}; look at the rows and at "
            "data.format, raise max_seq_length if they are masked, or set "
            "data.completion_only=false to train on prompts too"
        )
