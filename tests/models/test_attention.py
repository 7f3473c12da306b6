"""Every implementation of attention computes what a mask in float32 computes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.config import MeshConfig
from atlas_jax.models import attention, passes, segments
from atlas_jax.models.chunked import Chunked
from atlas_jax.sharding import make_mesh
from tests.models.attention_cases import arrays, by_mask, errors, packed, shared

ONE = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])

EXACT = 1e-5  # relative error in norm, float32
ROUNDED = {"out": 5e-3, "dq": 2e-2, "dk": 2e-2, "dv": 2e-2}  # bfloat16

ROWS = {
    "one segment": packed(200, [200], [130]),
    "packed": packed(200, [50, 70, 80], [1, 128, 30]),
    "64 segments": packed(200, [3] * 64, [2] * 63 + [1]),
    "an empty row": packed(200, [100, 100], []),
}
SHARED = {
    "completions": shared(200, [60, 30, 40, 70], [1, 2, 3, 4]),
    "empty completions": shared(200, [60, 0, 40, 0, 20], [50, 0, 0, 10, 0]),
    "no completion": shared(200, [60], [200]),
    "63 completions": shared(200, [10] + [3] * 63, [11] + [2] * 63),
}


def assert_exact(found):
    assert max(found.values()) < EXACT, found


def assert_rounded(found):
    assert all(found[name] < most for name, most in ROUNDED.items()), found


def by_blocks(query, key, value, segment_ids, sequence_ids=None, *, scale, window=0):
    """The chunked kernel, in one pass; its block does not divide the row."""
    ids = segments.Ids(segment_ids, segment_ids, sequence_ids)
    kernel = Chunked(scale, window=window, block=48)
    return passes.attend((kernel,), query, key, value, (passes.Pass(ids),))


def in_two_passes(query, key, value, segment_ids, sequence_ids, *, scale):
    """The algorithm of shared prompts with the chunked kernel."""
    kernels = Chunked(scale, block=48), Chunked(scale, causal=False, block=48)
    return passes.attend(kernels, query, key, value, segments.passes(segment_ids, sequence_ids))


@pytest.mark.parametrize(
    "heads,size,window", [((4, 2), 64, 0), ((4, 2), 64, 33), ((3, 3), 128, 33), ((4, 1), 256, 0)]
)
@pytest.mark.parametrize("rows", ROWS)
def test_blocks_of_keys_equal_a_mask(rows, heads, size, window):
    data = arrays(2, 200, heads, size)
    assert_exact(errors(by_blocks, data, ROWS[rows], scale=size**-0.5, window=window))


@pytest.mark.parametrize("heads,size", [((4, 2), 64), ((3, 3), 128), ((4, 1), 256)])
@pytest.mark.parametrize("attend", [by_blocks, in_two_passes])
@pytest.mark.parametrize("rows", SHARED)
def test_shared_prompts_equal_a_mask(rows, attend, heads, size):
    segment_ids, sequence_ids = SHARED[rows]
    data = arrays(2, 200, heads, size)
    found = errors(attend, data, segment_ids, sequence_ids=sequence_ids, scale=size**-0.5)
    assert_exact(found)


@pytest.mark.parametrize("attend", [by_blocks, in_two_passes])
def test_bfloat16_is_within_its_rounding(attend):
    segment_ids, sequence_ids = SHARED["completions"]
    data = arrays(2, 200, (4, 2), 64, jnp.bfloat16)
    assert_rounded(errors(attend, data, segment_ids, sequence_ids=sequence_ids, scale=0.125))


def test_scores_far_apart_are_merged_without_overflow():
    """Where the prompt holds nearly all weight, or nearly none."""
    segment_ids, sequence_ids = SHARED["completions"]
    query, key, value, gradient = arrays(2, 200, (4, 2), 64)
    for factor in (30.0, 1e-3):
        stretched = jnp.where(sequence_ids[..., None, None] == 0, factor * key, key)
        data = query, stretched, value, gradient
        found = errors(in_two_passes, data, segment_ids, sequence_ids=sequence_ids, scale=1.0)
        assert max(found.values()) < 1e-4, found


def test_long_rows_of_xla_hold_no_square_of_their_length():
    length = attention._MOST_SCORES + 72
    segment_ids = packed(length, [1500, 500])
    query, key, value, gradient = arrays(1, length, (2, 1), 8)

    def grads(query, key, value):
        def total(*qkv):
            return jnp.vdot(attention.xla(*qkv, segment_ids, scale=0.3, window=700), gradient)

        return jax.grad(total, (0, 1, 2))(query, key, value)

    compiled = jax.jit(grads).lower(query, key, value).compile()
    squares = f"{length},{length}"
    assert squares not in compiled.as_text()
    assert squares in jax.jit(grads_by_mask(segment_ids)).lower(
        query, key, value
    ).as_text().replace("x", ",")
    data = query, key, value, gradient
    assert_exact(errors(attention.xla, data, segment_ids, scale=0.3, window=700))


def grads_by_mask(segment_ids):
    """The oracle's gradients, whose program does hold such an array."""

    def grads(*qkv):
        return jax.grad(lambda *qkv: by_mask(*qkv, segment_ids, scale=0.3).sum(), (0, 1, 2))(*qkv)

    return grads


def test_a_policy_that_keeps_names_runs_no_kernel_twice():
    """With output and statistics kept, the backward pass has no forward kernel of attention."""
    data = arrays(1, 200, (2, 1), 64)[:3]
    ids = ROWS["packed"][:1]

    def scans(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        attend = jax.checkpoint(lambda *qkv: by_blocks(*qkv, ids, scale=0.1).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(attend))(*data)).count("scan[")

    assert scans(passes.OUTPUT, passes.STATISTICS) == 2  # one forward, one backward
    assert scans() == 3


def test_positions_see_themselves_and_what_came_before_in_their_own_sequence():
    segment_ids, sequence_ids = shared(6, [2, 2, 1])
    seen = np.asarray(attention.visible(segment_ids, sequence_ids, 0))[0, 0].astype(int)
    assert seen[:5].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
    ]


@pytest.mark.parametrize(
    "attend,length,says,packs",
    [
        (attention.Cudnn(ONE, True), 8192, "without a mask", True),
        (attention.Cudnn(ONE, True, "jax is old"), 8192, "since jax is old: 134 MB for each row",
         False),
        (attention.xla, 2048, "^attention of XLA$", False),
        (attention.xla, 4096, "in blocks of keys", False),
        (attention.Splash(ONE), 4096, "^splash attention$", True),
    ],
)  # fmt: skip
def test_a_run_says_what_computes_its_attention(attend, length, says, packs):
    assert re.search(says, attention.describe(attend, length))
    assert attention.skips_segments(attend) == packs
