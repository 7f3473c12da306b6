"""Packing of examples into rows, and of rows into batches of fixed shapes.

Best fit puts each example, in order of arrival, into the row in which it leaves the least room.
Five examples of 5, 3, 4, 3 and 5 tokens, in rows of 10:

    arrives   fits into                     rows after it (room left)
    a: 5      none, a new row               aaaaa.....                   (5)
    b: 3      row 1                         aaaaabbb..                   (2)
    c: 4      none, a new row               aaaaabbb.. cccc......        (2, 6)
    d: 3      row 2                         aaaaabbb.. ccccddd...        (2, 3)
    e: 5      none, a new row               aaaaabbb.. ccccddd... eeeee..... (2, 3, 5)
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from atlas_jax.types import Batch, Example


def capped_buckets(buckets: Sequence[int], max_seq_length: int) -> tuple[int, ...]:
    """Returns the buckets below `max_seq_length`, ascending, and it."""
    return (*sorted({bucket for bucket in buckets if bucket < max_seq_length}), max_seq_length)


def pack_best_fit(
    lengths: Sequence[int] | np.ndarray, row_length: int, max_examples: int = 0
) -> list[list[int]]:
    """Returns the examples of each row, as indices into `lengths`, in order of arrival.

    Among rows with the same room, the one that was filled last is taken.

    Args:
        lengths: the number of tokens of each example, at least 1.
        row_length: the number of tokens of a row.
        max_examples: the number of examples that a row may hold; 0 for any.

    Raises:
        ValueError: if an example is longer than a row.
    """
    rows: list[list[int]] = []
    # Rows are indexed by their room, so that each example costs a bisection instead of a search
    # over all rows.
    rooms: list[int] = []  # the different numbers of tokens that rows have left, ascending
    with_room: dict[int, list[int]] = {}  # room -> rows that have it
    for example, length in enumerate(lengths):
        if length > row_length:
            raise ValueError(
                f"example {example} has {length} tokens and does not fit into a row of "
                f"{row_length}; cut it, or use longer rows"
            )
        # The smallest room that fits, which leaves the large ones to long examples.
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row = len(rows)
            room = row_length
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        rows[row].append(example)
        if len(rows[row]) != max_examples:
            _add_room(rooms, with_room, row, int(room - length))
    return rows


def _add_room(rooms: list[int], with_room: dict[int, list[int]], row: int, room: int) -> None:
    if not room:
        return
    if room not in with_room:
        with_room[room] = []
        bisect.insort(rooms, room)
    with_room[room].append(row)


def bucket_length(length: int, buckets: Sequence[int]) -> int:
    """Returns the smallest bucket of at least `length` tokens.

    Raises:
        ValueError: if every bucket is shorter.
    """
    fitting = [bucket for bucket in buckets if bucket >= length]
    if not fitting:
        raise ValueError(f"no bucket of {tuple(buckets)} holds {length} tokens; add a longer one")
    return min(fitting)


def split_rows(batch: Batch, lengths: Sequence[int]) -> list[Batch]:
    """Returns equal parts of the rows, each cut to its length; there is only padding after it."""
    count = len(batch.tokens) // len(lengths)
    return [
        Batch(*(x[i * count : (i + 1) * count, :length] for x in batch))
        for i, length in enumerate(lengths)
    ]


def collate(rows: Sequence[Sequence[Example]], length: int) -> Batch:
    """Returns rows of examples as one batch, each example a segment of its row.

    A row without examples is all padding, which no loss counts.

    Args:
        rows: the examples of each row.
        length: the number of tokens of a row, at least the sum of its examples.

    Raises:
        ValueError: if a row's examples do not fit.
    """
    shape = (len(rows), length)
    batch = Batch(
        tokens=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, bool),
    )
    for row, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples, start=1):
            end = start + len(example.tokens)
            if end > length:
                raise ValueError(f"row {row} holds {end} tokens or more, but has room for {length}")
            batch.tokens[row, start:end] = example.tokens
            batch.positions[row, start:end] = np.arange(end - start)
            batch.segment_ids[row, start:end] = segment
            # A segment's first token has no predecessor in it, so it is never a target.
            batch.loss_mask[row, start + 1 : end] = example.loss_mask[1:]
            start = end
    return batch
