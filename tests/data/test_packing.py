"""Packing and collation, by hand and as properties."""

import numpy as np
import pytest

from atlas_jax.data.packing import bucket_length, collate, pack_best_fit
from atlas_jax.types import Example


def example(*tokens, mask=None):
    mask = [True] * len(tokens) if mask is None else mask
    return Example(np.array(tokens, np.int32), np.array(mask, bool))


def test_best_fit_of_five_examples_worked_by_hand():
    assert pack_best_fit([5, 3, 4, 3, 5], 10) == [[0, 1], [2, 3], [4]]


def test_best_fit_takes_the_fullest_row_that_has_room():
    # Rows of 6 and 7 tokens; 3 fits best behind the 7, 4 then only behind the 6.
    assert pack_best_fit([6, 7, 3, 4], 10) == [[0, 3], [1, 2]]


def test_packing_never_splits_loses_or_repeats_an_example():
    lengths = np.random.default_rng(0).integers(1, 65, size=500)
    rows = pack_best_fit(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert max(lengths[row].sum() for row in rows) <= 64
    # At most one row is half empty: the later of two would have gone into the earlier.
    assert sorted(lengths[row].sum() for row in rows)[:2][1] > 32
    assert rows == pack_best_fit(lengths, 64)


def test_a_full_number_of_examples_closes_a_row():
    # Without the limit the 2 goes behind the 4 and the 3, which leave the least room.
    assert pack_best_fit([4, 3, 2, 1], 10) == [[0, 1, 2, 3]]
    assert pack_best_fit([4, 3, 2, 1], 10, max_examples=2) == [[0, 1], [2, 3]]


def test_example_longer_than_a_row_is_an_error():
    with pytest.raises(
        ValueError, match="example 1 has 11 tokens and does not fit into a row of 10"
    ):
        pack_best_fit([3, 11], 10)


def test_bucket_is_the_smallest_that_holds_the_length():
    assert [bucket_length(n, (8, 4, 16)) for n in (1, 4, 5, 16)] == [4, 4, 8, 16]
    with pytest.raises(ValueError, match="holds 17 tokens"):
        bucket_length(17, (8, 4, 16))


def test_collated_row_of_two_examples_worked_by_hand():
    rows = [[example(7, 8, 9, mask=[False, False, True]), example(5, 6)]]
    batch = collate(rows, 6)
    assert batch.tokens.tolist() == [[7, 8, 9, 5, 6, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert batch.loss_mask.tolist() == [[False, False, True, False, True, False]]
    assert [array.dtype for array in batch] == [np.int32, np.int32, np.int32, bool]


def test_row_without_examples_is_blank():
    batch = collate([[example(1, 2)], []], 3)
    assert all(not array[1].any() for array in batch)


def test_row_that_overflows_is_an_error():
    with pytest.raises(ValueError, match="row 0 holds 4 tokens or more, but has room for 3"):
        collate([[example(1, 2), example(3, 4)]], 3)
