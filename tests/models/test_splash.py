"""Splash attention, interpreted on a CPU, computes attention by a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.config import MeshConfig
from atlas_jax.models import splash
from atlas_jax.sharding import make_mesh
from atlas_jax.types import UNKNOWN, RowBounds
from tests.models.attention_cases import arrays, errors, packed, shared

ONE = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


def attend(bounds=UNKNOWN):
    def run(query, key, value, segment_ids, sequence_ids=None, **options):
        return splash.over(segment_ids, sequence_ids, bounds, ONE)(query, key, value, **options)

    return run


@pytest.mark.parametrize(
    "length,size,window,bounds",
    [
        (256, 128, 0, RowBounds()),
        (150, 64, 100, RowBounds()),
        (32, 128, 0, RowBounds(3, longest=20)),
        (300, 256, 0, RowBounds(3, longest=140)),
    ],
)
def test_packed_rows_equal_a_mask(length, size, window, bounds):
    third = length // 3
    ids = packed(length, [third, third, third], [third + 2, third])
    data = arrays(2, length, (4, 2), size)
    found = errors(attend(bounds), data, ids, scale=size**-0.5, window=window)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("bounds", [RowBounds(), RowBounds(4, longest=90, prompt=70)])
def test_shared_prompts_equal_a_mask(bounds):
    segment_ids, sequence_ids = shared(300, [60, 90, 30, 70], [1, 2, 0, 4])
    data = arrays(2, 300, (4, 2), 128)
    options = dict(sequence_ids=sequence_ids, scale=0.09)
    found = errors(attend(bounds), data, segment_ids, **options)
    assert max(found.values()) < 1e-5, found


def test_short_segments_and_prompts_skip_blocks():
    """Keys beyond the longest prompt are cut off, and keys beyond the longest segment skipped."""
    segment_ids, sequence_ids = shared(1024, [100, 200, 200], [90, 10, 20])
    query, key, value, _ = arrays(2, 1024, (2, 1), 128)
    bounds = RowBounds(3, longest=200, prompt=100)

    def run(*qkv):
        return attend(bounds)(*qkv, segment_ids, sequence_ids, scale=0.1)

    text = str(jax.make_jaxpr(run)(query, key, value))
    assert "f32[2,512,128]" in text.replace(" ", "")  # heads first: [B N] K H of the prompt's keys
    expected = attend()(query, key, value, segment_ids, sequence_ids, scale=0.1)
    held = np.asarray(segment_ids) > 0
    found = np.asarray(run(query, key, value))
    np.testing.assert_allclose(found[held], np.asarray(expected)[held], atol=2e-5)


@pytest.mark.parametrize("bounds", [RowBounds(4, longest=89), RowBounds(4, prompt=59)])
def test_rows_that_break_their_bounds_are_not_a_number(bounds):
    segment_ids, sequence_ids = shared(256, [60, 90, 30, 70], [1, 2, 0, 4])
    query, key, value, _ = arrays(2, 256, (2, 1), 128)
    out = np.asarray(attend(bounds)(query, key, value, segment_ids, sequence_ids, scale=0.1))
    assert np.isnan(out[0]).all()
    assert not np.isnan(out[1]).any()


def test_a_kernel_that_is_not_known_is_used_by_its_public_interface(monkeypatch):
    monkeypatch.setattr(splash, "_FORWARD", ())
    ids = packed(256, [100, 100], [50, 60])
    found = errors(attend(), arrays(2, 256, (4, 2), 128), ids, scale=0.09)
    assert max(found.values()) < 1e-5, found
    heads = jnp.zeros((1, 128, 1, 128))
    with pytest.raises(ValueError, match=r"set rollout\.share_prompt=false"):
        attend()(heads, heads, heads, ids[:1, :128], ids[:1, :128], scale=1.0)


@pytest.mark.parametrize("length,padded", [(1, 128), (129, 256), (512, 512), (513, 1024)])
def test_rows_are_whole_blocks(length, padded):
    assert splash.padded_length(length) == padded


def test_the_kernel_inside_jax_is_the_known_one():
    assert splash.is_known()
