"""Reading a compiled program: groups, loops, slices, and what is sent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from atlas_jax.config import MeshConfig
from atlas_jax.plan import estimate, hlo, traffic
from atlas_jax.sharding import make_mesh

LOOP = """\
HloModule written_by_hand

%body (p: (s32[], f32[6,8], f32[2,8])) -> (s32[], f32[6,8], f32[2,8]) {
  %p = (s32[], f32[6,8]{1,0}, f32[2,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %all = f32[6,8]{1,0} get-tuple-element(%p), index=1
  %one = f32[2,8]{1,0} fusion(%all, %i), kind=kLoop, calls=%slice
  %sum = f32[2,8]{1,0} all-reduce(%one), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %out = (s32[], f32[6,8]{1,0}, f32[2,8]{1,0}) tuple(%i, %all, %sum)
}

%slice (a: f32[6,8], i: s32[]) -> f32[2,8] {
  %a = f32[6,8]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %b = f32[6,8]{1,0} bitcast(%a)
  %zero = s32[] constant(0)
  ROOT %s = f32[2,8]{1,0} dynamic-slice(%b, %i.1, %zero), dynamic_slice_sizes={2,8}
}

%condition (p: (s32[], f32[6,8], f32[2,8])) -> pred[] {
  %p.1 = (s32[], f32[6,8]{1,0}, f32[2,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (x: (s32[], f32[6,8], f32[2,8])) -> (s32[], f32[6,8], f32[2,8]) {
  %x = (s32[], f32[6,8]{1,0}, f32[2,8]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[6,8]{1,0}, f32[2,8]{1,0}) while(%x), condition=%condition, body=%body
}
"""


def test_what_a_loop_sends_counts_as_often_as_it_runs():
    (found,) = hlo.collectives(hlo.parse(LOOP))
    assert found.opcode == "all-reduce" and found.runs == 3
    assert found.group == (0, 2, 4, 6)
    assert found.wire_bytes == 3 * 2 * 64 * 3 / 4  # 2 x 8 float32, a ring of four


def test_a_slice_of_a_stacked_array_is_all_that_a_loop_reads():
    each = (64 + 4 + 64) + (64 + 64)  # the fusion: slice, index, result; the sum: in and out
    assert traffic.memory_traffic(hlo.parse(LOOP)) == 3 * each


FUSIONS = """\
HloModule written_by_hand, is_scheduled=true

%update (all.1: f32[100,8], i.1: s32[], one.1: f32[1,8]) -> f32[100,8] {
  %all.1 = f32[100,8]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %one.1 = f32[1,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[100,8]{1,0} dynamic-update-slice(%all.1, %one.1, %i.1, %zero)
}

%some (table.1: f32[100,8], ids.1: s32[5,1]) -> bf16[5,8] {
  %table.1 = f32[100,8]{1,0} parameter(0)
  %ids.1 = s32[5,1]{1,0} parameter(1)
  %half = bf16[100,8]{1,0} convert(%table.1)
  ROOT %rows = bf16[5,8]{1,0} gather(%half, %ids.1), offset_dims={1}
}

%part (table.2: f32[100,8]) -> f32[10,8] {
  %table.2 = f32[100,8]{1,0} parameter(0)
  %first = f32[10,8]{1,0} slice(%table.2), slice={[0:10], [0:8]}
  ROOT %twice = f32[10,8]{1,0} add(%first, %first)
}

%scattered (table.3: f32[100,8], ids.3: s32[5,1], more.3: f32[5,8]) -> f32[100,8] {
  %table.3 = f32[100,8]{1,0} parameter(0)
  %ids.3 = s32[5,1]{1,0} parameter(1)
  %more.3 = f32[5,8]{1,0} parameter(2)
  ROOT %sum = f32[100,8]{1,0} scatter(%table.3, %ids.3, %more.3), to_apply=%add
}

ENTRY %main (all: f32[100,8], i: s32[], one: f32[1,8], ids: s32[5,1], more: f32[5,8]) -> (f32[100,8], bf16[5,8]) {
  %all = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,8]{1,0} parameter(2)
  %ids = s32[5,1]{1,0} parameter(3)
  %more = f32[5,8]{1,0} parameter(4)
  %begin = ((f32[100,8]{1,0}, s32[], f32[1,8]{1,0}), f32[100,8]{1,0}, u32[]) fusion-start(%all, %i, %one), kind=kLoop, calls=%update
  %taken = bf16[5,8]{1,0} fusion(%all, %ids), kind=kLoop, calls=%some
  %sliced = f32[10,8]{1,0} fusion(%all), kind=kLoop, calls=%part
  %end = f32[100,8]{1,0} fusion-done(%begin)
  %added = f32[100,8]{1,0} fusion(%end, %ids, %more), kind=kInput, calls=%scattered
  %copying = (f32[10,8]{1,0}, f32[10,8]{1,0}, u32[]) copy-start(%sliced)
  %copied = f32[10,8]{1,0} copy-done(%copying)
  ROOT %out = (f32[100,8]{1,0}, bf16[5,8]{1,0}) tuple(%added, %taken)
}
"""  # noqa: E501  (a line is an instruction)


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("begin", 32 + 4 + 32 + 32),  # the slice is read, its index, its new value, and written
        ("taken", 5 * 8 * 4 + 5 * 4 + 5 * 8 * 2),  # rows of float32, their ids, rows of bfloat16
        ("sliced", 320 + 320),
        ("added", 2 * 160 + 20 + 160 + 160),  # rows read and written, ids, what is added
        ("copying", 320 + 320),
        ("end", 0),
        ("copied", 0),
    ],
)
def test_what_a_fusion_touches_of_an_array_is_all_that_counts(name, moved):
    module = hlo.parse(FUSIONS)
    body = module.computations["main"]
    one = body[name]
    assert traffic.is_kernel(one) == bool(moved)
    if moved:
        assert traffic.of(module, body, one) == moved


def test_fusions_that_are_started_and_ended_count_once():
    module = hlo.parse(FUSIONS)
    each = [100, 160 + 20 + 80, 640, 660, 640]
    assert traffic.memory_traffic(module) == sum(each)
    assert traffic.num_kernels(module) == 5


def test_the_largest_temporary_is_no_result():
    assert traffic.largest_temporary(hlo.parse(FUSIONS)) == ("f32[100,8]", 3200.0)  # of the update
    without = FUSIONS.replace("fusion(%end,", "fusion(%all,").replace("tuple(%added", "tuple(%end")
    swapped = without.replace(
        "f32[100,8]{1,0} fusion(%all, %ids, %more)", "f32[9,8]{1,0} fusion(%all, %ids, %more)"
    )
    assert traffic.largest_temporary(hlo.parse(swapped)) == ("f32[10,8]", 320.0)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,1},{2,3}}, x", (0, 1)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
        ("replica_groups=mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'a'}, d", tuple(range(8))),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("source_target_pairs={{0,2},{2,0}}", (0, 2)),
    ],
)
def test_groups_are_read_in_every_form(text, group):
    assert hlo.first_group(text) == group


def test_groups_are_named_after_the_mesh_axes_they_run_along():
    assert estimate.axes_of((0, 1), (2, 2, 2)) == "tensor"
    assert estimate.axes_of((0, 2), (2, 2, 2)) == "fsdp"
    assert estimate.axes_of((0, 2, 4, 6), (2, 2, 2)) == "data+fsdp"


def test_gathering_a_weight_sends_seven_eighths_of_it():
    mesh = make_mesh(MeshConfig(fsdp=8))
    split = NamedSharding(mesh, PartitionSpec("fsdp", None))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=rows)
    weight = jax.ShapeDtypeStruct((128, 256), jnp.float32, sharding=split)

    def layer(x, weight):
        return x @ jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, PartitionSpec()))

    program = jax.jit(layer, out_shardings=rows).lower(x, weight).compile()
    (found,) = hlo.collectives(hlo.parse(program.as_text()))
    assert found.opcode == "all-gather" and len(found.group) == 8
    np.testing.assert_allclose(found.wire_bytes, 128 * 256 * 4 * 7 / 8)
