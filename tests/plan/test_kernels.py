"""Kernels of a GPU: kind, operations, bytes and time, in programs that are written by hand."""

import json

import jax
import jax.numpy as jnp
import pytest

from atlas_jax.plan import flops, hlo, kernels, pairs, traffic
from atlas_jax.plan.pairs import RowContent, even
from atlas_jax.plan.rates import Rates


def config(dims, mask="CAUSAL", segments=1, window=0):
    inner = {
        "intermediate_tensor_shape": {"dimensions": [str(n) for n in dims]},
        "mask_type": mask, "sliding_window_length": window, "max_seg_per_batch": segments,
    }  # fmt: skip
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": inner})


ATTENTION = f"""\
HloModule by_hand, is_scheduled=true

ENTRY %main (q: bf16[2,256,4,64], k: bf16[2,256,2,64], bias: bf16[2,1,256,256]) -> bf16[2,4,256,64] {{
  %q = bf16[2,256,4,64]{{3,2,1,0}} parameter(0)
  %k = bf16[2,256,2,64]{{3,2,1,0}} parameter(1)
  %bias = bf16[2,1,256,256]{{3,2,1,0}} parameter(2)
  %lengths = s32[8]{{0}} constant({{...}})
  %plain = (bf16[2,4,256,64]{{3,1,2,0}}, f32[2,4,256]{{2,1,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={config((2, 4, 256, 256))}
  %masked = (bf16[2,4,256,64]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %k, %k, %bias), custom_call_target="__cudnn$fmhaScaleBiasSoftmax", backend_config={config((2, 4, 256, 256))}
  %packed = (bf16[2,4,256,64]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %k, %k, %lengths), custom_call_target="__cudnn$fmhaSoftmax", backend_config={config((2, 4, 256, 256), "PADDING_CAUSAL", 4)}
  %window = (bf16[2,4,256,64]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={config((2, 4, 256, 256), window=32)}
  %back = (bf16[2,4,256,64]{{3,1,2,0}}, bf16[2,2,256,64]{{3,1,2,0}}, bf16[2,2,256,64]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %k, %k, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={config((2, 4, 256, 256))}
  ROOT %out = bf16[2,4,256,64]{{3,1,2,0}} get-tuple-element(%plain), index=0
}}
"""  # noqa: E501  (a line is an instruction)


def rates(**changes):
    kinds = ("products", "attention_forward", "attention_backward", "masked_attention_forward",
             "packed_attention_forward")  # fmt: skip
    values = {
        "source": "hand", "flops": dict.fromkeys(kinds, 1e9), "memory": 1e6, "link": 1e3,
        "network": 1e3, "launch_secs": 1e-9,
    }  # fmt: skip
    return Rates(**values | changes)


def test_attention_of_each_kind_counts_its_own_pairs():
    content = even(256, 4)
    _, calls = kernels.work(hlo.parse(ATTENTION), content)
    assert [call.kind for call, _ in calls] == [
        "attention_forward", "masked_attention_forward", "packed_attention_forward",
        "attention_forward", "attention_backward",
    ]  # fmt: skip
    whole = 256 * 257 / 2
    own = 4 * 64 * 65 / 2
    near = sum(min(t + 1, 32) for t in range(256))
    expected = [(2, whole), (2, whole), (2, own), (2, near), (5, whole)]
    for (call, times), (products, seen) in zip(calls, expected, strict=True):
        assert times == 1
        assert pairs.operations(call, content, 1) == products * 2 * 64 * 2 * 4 * seen


def test_attention_reads_its_operands_and_its_mask():
    module = hlo.parse(ATTENTION)
    body = module.computations["main"]
    query, key, mask = (2 * 2 * 256 * n for n in (4 * 64, 2 * 64, 256))
    assert traffic.of(module, body, body["masked"]) == query + 2 * key + mask + query


PRODUCTS = """\
HloModule by_hand, is_scheduled=true

%gemm (a: bf16[16,32], b: bf16[32,64]) -> bf16[16,64] {
  %a = bf16[16,32]{1,0} parameter(0)
  %b = bf16[32,64]{1,0} parameter(1)
  ROOT %dot = bf16[16,64]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%outer (a.1: bf16[16,32], b.1: bf16[32,64]) -> bf16[16,64] {
  %a.1 = bf16[16,32]{1,0} parameter(0)
  %b.1 = bf16[32,64]{1,0} parameter(1)
  ROOT %nested = bf16[16,64]{1,0} fusion(%a.1, %b.1), kind=kCustom, calls=%gemm
}

%body (p: (s32[], bf16[16,32], bf16[32,64])) -> (s32[], bf16[16,32], bf16[32,64]) {
  %p = (s32[], bf16[16,32]{1,0}, bf16[32,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[16,32]{1,0} get-tuple-element(%p), index=1
  %w = bf16[32,64]{1,0} get-tuple-element(%p), index=2
  %start = (bf16[16,32]{1,0}, bf16[32,32]{1,0}) all-gather-start(%x), replica_groups=[1,2]<=[2]
  %y = bf16[16,64]{1,0} fusion(%x, %w), kind=kCustom, calls=%outer
  %z = (bf16[16,64]{1,0}, s8[4]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %done = bf16[32,32]{1,0} all-gather-done(%start)
  ROOT %out = (s32[], bf16[16,32]{1,0}, bf16[32,64]{1,0}) tuple(%i, %x, %w)
}

%condition (p.1: (s32[], bf16[16,32], bf16[32,64])) -> pred[] {
  %p.1 = (s32[], bf16[16,32]{1,0}, bf16[32,64]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (t: (s32[], bf16[16,32], bf16[32,64])) -> (s32[], bf16[16,32], bf16[32,64]) {
  %t = (s32[], bf16[16,32]{1,0}, bf16[32,64]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[16,32]{1,0}, bf16[32,64]{1,0}) while(%t), condition=%condition, body=%body
}
"""  # noqa: E501
FLOPS = 2 * 16 * 32 * 64
MOVED = 2 * (16 * 32 + 32 * 64 + 16 * 64)
NONE = RowContent(())


def test_products_in_fusions_and_of_libraries_count_in_loops():
    products, calls = kernels.work(hlo.parse(PRODUCTS), NONE)
    assert products == 3 * 2 * FLOPS and not calls


def test_kernels_add_up_and_hide_communication_that_runs_beside_them():
    module = hlo.parse(PRODUCTS)
    # A product takes as long as its bytes; the library's also writes a workspace of 4 bytes.
    by_bytes = kernels.run(module, NONE, rates(), lambda group: 1e12)
    assert by_bytes.total == pytest.approx(3 * (2 * MOVED + 4) / 1e6)
    assert by_bytes.num_kernels == 9 and by_bytes.by_kind["communication"] == 0
    # With slower arithmetic it takes as long as its operations.
    slow = rates(flops={"products": 1e6})
    by_flops = kernels.run(module, NONE, slow, lambda group: 1e12)
    assert by_flops.total == pytest.approx(3 * 2 * FLOPS / 1e6)
    # The gather of 1,024 bytes begins before them and ends after them.
    exposed = kernels.run(module, NONE, slow, lambda group: 1e3)
    assert exposed.total == pytest.approx(3 * 1024 / 1e3)
    assert exposed.by_kind["communication"] == pytest.approx(3 * (1.024 - 2 * FLOPS / 1e6))
    # No kernel is shorter than its start.
    assert kernels.run(module, NONE, rates(launch_secs=2.0), lambda group: 1e12).total == 12


def test_products_of_a_compiled_gradient_are_those_of_the_traced_one():
    def loss(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, weights)[0].sum()

    weights = jax.ShapeDtypeStruct((3, 64, 64), "float32")
    x = jax.ShapeDtypeStruct((128, 64), "float32")
    traced = jax.jit(jax.grad(loss)).trace(weights, x)
    compiled = hlo.parse(traced.lower().compile().as_text())
    by_hand = 3 * 3 * 2 * 128 * 64 * 64  # three products in each of three layers
    assert kernels.work(compiled, NONE) == flops.work(traced.jaxpr.jaxpr, 1) == (by_hand, [])
