"""Pairs of query and key against masks that are written out."""

import numpy as np
import pytest

from atlas_jax.plan import pairs
from atlas_jax.plan.pairs import AttentionCall, RowContent


def mask(content, window=0):
    """The mask of a row, position by position."""
    parts = [(0, content.prompt)] if content.prompt else []
    parts += [(i + 1, n) for i, n in enumerate(content.segments)]
    owner = np.concatenate([np.full(n, i) for i, n in parts])
    place = np.arange(len(owner))
    near = place[:, None] >= place[None]
    if window:
        near &= place[:, None] - place[None] < window
    return near & ((owner[:, None] == owner[None]) | ((owner[None] == 0) & bool(content.prompt)))


def blocks(mask, block):
    """The pairs in the blocks of a mask that have any."""
    side = -(-len(mask) // block) * block
    wide = np.zeros((side, side), bool)
    wide[: len(mask), : len(mask)] = mask
    split = wide.reshape(side // block, block, side // block, block)
    return split.any(axis=(1, 3)).sum() * block**2


def call(**changes):
    values = {
        "kind": "attention_forward", "rows": 1, "heads": 1, "queries": 40, "keys": 40,
        "head_dim": 8, "num_products": 2, "causal": True, "packed": False,
    }  # fmt: skip
    return AttentionCall(**values | changes)


@pytest.mark.parametrize("content", [RowContent((40,)), RowContent((7, 20, 13)),
                                     RowContent((10, 11, 12), 7)])  # fmt: skip
def test_needed_pairs_are_those_of_the_mask(content):
    assert pairs.needed(content) == mask(content).sum()


@pytest.mark.parametrize(("window", "block"), [(0, 1), (0, 16), (5, 1), (5, 4), (17, 16)])
def test_a_causal_kernel_computes_the_blocks_that_its_mask_touches(window, block):
    length = 100
    alone = RowContent((length,))
    assert pairs.causal(length, window, block) == blocks(mask(alone, window), block)


def test_a_mask_saves_no_work_and_a_packed_kernel_computes_each_text_by_itself():
    content = RowContent((7, 20, 13))
    dense = call(rows=3, heads=2, block=8)
    packed = dense._replace(packed=True)
    assert pairs.computed_by(dense, content) == 6 * blocks(mask(RowContent((40,))), 8)
    each = [blocks(mask(RowContent((n,))), 8) for n in content.segments]
    assert pairs.computed_by(packed, content) == 6 * sum(each)
    for one in (dense, packed):
        assert pairs.needed_by(one, content) == 6 * mask(content).sum()
    assert pairs.computed_by(packed, content, 1) == pairs.needed_by(packed, content)


def test_two_passes_over_a_shared_prompt_need_what_the_row_needs():
    content = RowContent((10, 11, 12), 7)
    own = call(packed=True)
    of_prompt = call(causal=False)
    both = pairs.needed_by(own, content) + pairs.needed_by(of_prompt, content)
    assert both == mask(content).sum()
    assert pairs.computed_by(of_prompt, content) == 40 * 7  # the prompt's own queries as well
    completions = of_prompt._replace(packed=True, block=4)
    assert pairs.computed_by(completions, content) == (12 + 12 + 12) * 8


def test_operations_are_two_for_each_product_pair_and_number_of_a_head():
    one = call(rows=2, heads=3, num_products=5)
    assert pairs.operations(one, RowContent((40,)), 1) == 2 * 5 * 8 * 2 * 3 * (40 * 41 / 2)


def test_texts_of_a_row_are_as_equal_as_they_can_be():
    assert pairs.even(10, 3).segments == (3, 3, 4)
    assert pairs.even(65536, 32).segments == (2048,) * 32
