"""What is asked of cuDNN, and what is made of its answers, computes attention by a mask.

The kernels themselves need an NVIDIA GPU; here they are replaced by what they are documented to
compute (`cudnn_stand_in`). The interface inside JAX is compared with the one that this was written
for.
"""

import inspect

import jax
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from atlas_jax.config import MeshConfig
from atlas_jax.models import cudnn
from atlas_jax.sharding import make_mesh
from atlas_jax.types import RowBounds
from tests.models import cudnn_stand_in
from tests.models.attention_cases import arrays, errors, shared
from tests.models.test_attention import ROWS, SHARED, assert_exact

ONE = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
TWO = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    cudnn_stand_in.register()


def attend(bounds, mesh=ONE):
    def run(query, key, value, segment_ids, sequence_ids=None, *, scale, window=0):
        rows = cudnn.layout(segment_ids, sequence_ids, bounds, mesh)
        options = dict(scale=scale, window=window, bounds=bounds, mesh=mesh)
        return cudnn.attend(query, key, value, rows, **options)

    return run


@pytest.mark.parametrize("mesh,window", [(TWO, 0), (ONE, 33)], ids=["two devices", "window"])
@pytest.mark.parametrize("rows", ROWS)
def test_offsets_of_packed_rows_equal_a_mask(rows, window, mesh):
    most = int(ROWS[rows].max())
    data = arrays(2, 200, (4, 2), 64)
    found = errors(attend(RowBounds(most), mesh), data, ROWS[rows], scale=0.125, window=window)
    assert_exact(found)


@pytest.mark.parametrize("mesh,prompt", [(TWO, 0), (ONE, 60)], ids=["two devices", "bound"])
@pytest.mark.parametrize("rows", SHARED)
def test_two_calls_of_shared_prompts_equal_a_mask(rows, prompt, mesh):
    segment_ids, sequence_ids = SHARED[rows]
    bounds = RowBounds(int(sequence_ids.max()) + 1, prompt=prompt)
    if rows == "no completion":
        bounds = bounds._replace(prompt=0)
    data = arrays(2, 200, (4, 2), 64)
    options = dict(sequence_ids=sequence_ids, scale=0.125)
    assert_exact(errors(attend(bounds, mesh), data, segment_ids, **options))


def test_rows_of_one_segment_need_no_offsets():
    def causal(query, key, value, segment_ids, *, scale, window):
        options = dict(scale=scale, window=window, bounds=RowBounds(), mesh=ONE)
        return cudnn.attend(query, key, value, None, **options)

    for window in (0, 33):
        data = arrays(2, 200, (4, 1), 256)
        found = errors(causal, data, ROWS["one segment"], scale=0.06, window=window)
        assert_exact(found)


@pytest.mark.parametrize("bounds", [RowBounds(2), RowBounds(3, prompt=128)])
def test_rows_that_break_their_bounds_are_not_a_number(bounds):
    """A row of more segments than were promised, or with a longer prompt, must end the run."""
    segment_ids, sequence_ids = shared(200, [150, 20, 20])
    query, key, value, _ = arrays(1, 200, (4, 2), 64)
    out = attend(bounds)(query, key, value, segment_ids, sequence_ids, scale=0.125)
    assert np.isnan(np.asarray(out)[0, 170:190]).all()


@pytest.mark.compiler
def test_the_interface_inside_jax_is_the_known_one():
    """If this fails, a run falls back to a mask and says so; see `cudnn._SIGNATURES`."""
    if jax.__version_info__ < (0, 11, 1):
        pytest.skip(f"jax {jax.__version__}: the interface of jax 0.11 and 0.12 is checked")
    assert cudnn.settings() is not None
    lowering = fused._dot_product_attention_fwd_cuda_lowering
    assert list(inspect.signature(lowering).parameters)[1:4] == ["query", "key", "value"]


def forward_of_jax_0_11_2(
    ctx, query, key, value, bias, q_seqlen, kv_seqlen, q_offsets, kv_offsets, page_table_k,
    page_table_v, scale, seed, dropout_rate, variadic_args, mask_type, layout,
    sliding_window_length, is_training,
): ...  # fmt: skip


def backward_of_jax_0_11_2(
    ctx, query, key, value, bias, q_seqlen, kv_seqlen, q_offsets, kv_offsets, page_table_k,
    page_table_v, activation, fwd_output, grad_output, scale, seed, dropout_rate, variadic_args,
    mask_type, layout, sliding_window_length,
): ...  # fmt: skip


def forward_of_jax_0_12_0_1(
    ctx, query, key, value, bias, q_seqlen, kv_seqlen, q_offsets, kv_offsets, page_table_k,
    page_table_v, *score_mod_args, scale, seed, dropout_rate, variadic_args, mask_type, layout,
    sliding_window_length, score_mod_name, score_mod_jaxpr, is_training,
): ...  # fmt: skip


def backward_of_jax_0_12_0_1(
    ctx, query, key, value, bias, q_seqlen, kv_seqlen, q_offsets, kv_offsets, page_table_k,
    page_table_v, activation, fwd_output, grad_output, *score_mod_args, scale, seed, dropout_rate,
    variadic_args, mask_type, layout, sliding_window_length, score_mod_name, score_mod_jaxpr,
): ...  # fmt: skip


@pytest.mark.parametrize(
    ("forward", "backward", "more"),
    [
        (forward_of_jax_0_11_2, backward_of_jax_0_11_2, {}),
        (forward_of_jax_0_12_0_1, backward_of_jax_0_12_0_1,
         {"score_mod_name": None, "score_mod_jaxpr": None}),
        (forward_of_jax_0_11_2, backward_of_jax_0_12_0_1, None),
    ],
)  # fmt: skip
def test_the_interfaces_of_two_versions_of_jax_are_known(monkeypatch, forward, backward, more):
    """The parameters are copied from these versions' sources, of which one at most is installed."""
    monkeypatch.setattr(fused, "_dot_product_attention_fwd_cuda_lowering", forward)
    monkeypatch.setattr(fused, "_dot_product_attention_bwd_cuda_lowering", backward)
    assert cudnn.settings() == more


def test_an_unknown_interface_is_named(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.setattr(cudnn, "_SIGNATURES", {})
    assert "does not know" in cudnn.obstacle(ONE, 128, 0)


def test_an_old_jax_is_named(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert "older than 0.11.1" in cudnn.obstacle(ONE, 128, 0)


def test_devices_before_hopper_are_named(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.setattr(cudnn, "settings", dict)
    assert "older than Hopper" in cudnn.obstacle(ONE, 128, 0)
