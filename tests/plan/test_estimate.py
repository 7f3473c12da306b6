"""The plan of real recipes, compiled for the devices of this machine, against numbers by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from atlas_jax.config import GKDConfig, GRPOConfig, MeshConfig, RolloutConfig, SFTConfig
from atlas_jax.models import attention
from atlas_jax.models.config import ModelConfig, Rope
from atlas_jax.options.train import LoraOptions, ModelOptions
from atlas_jax.plan import estimate, flops, hlo, pairs, programs, rates, report, search
from atlas_jax.plan.targets import Device, Target
from atlas_jax.sharding import make_mesh

MODEL = ModelConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=4, num_heads=4,
    num_kv_heads=2, head_dim=16, max_positions=512, norm_eps=1e-5, tie_embeddings=False,
    rope=Rope(),
)  # fmt: skip
EIGHT = Target("cpu:8", Device("cpu", 1e9, 1e12, 1e11, 1e10, 1e9, ""), (8,))
SFT = SFTConfig(
    model_name_or_path="m", output_dir="o", max_seq_length=128, per_device_train_batch_size=1,
    gradient_checkpointing="none", loss_chunk_size=64,
)  # fmt: skip


def plan(config, target=EIGHT, student=None, segments=1):
    devices = jax.devices()[: target.num_devices]
    run = programs.build(config, target, devices, MODEL, student, segments)
    speeds = rates.published(target.device)
    measured = [estimate.measure(run, p, target, speeds) for p in run.programs]
    return report.Plan(target, run, measured, speeds)


@pytest.fixture(scope="module")
def sft():
    return plan(SFT)


def test_parameters_and_moments_are_split_over_the_mesh(sft):
    whole = 4 * report.num_params(sft.run)
    memory = sft.programs[0].memory
    norms = 4 * (4 * 2 * 64 + 64)  # not split
    assert memory.params == (whole - norms) / 8 + norms
    assert memory.optimizer == 2 * memory.params + 8  # and two counts
    assert memory.gradients == memory.params
    assert memory.total >= memory.params * 4


def test_operations_are_counted_by_hand(sft):
    tokens, length, d, h, layers = 8 * 128, 128, 64, 64, 4
    weights = layers * (2 * d * h + 2 * d * 32 + 3 * d * 128)
    attention = 12 * layers * tokens * length * h  # scores and values; plain XLA skips nothing
    head = 6 * tokens * 512 * d
    cost = sft.programs[0].cost
    assert cost.flops * 8 == 6 * tokens * weights + attention + head
    seen = 8 * (128 * 129 / 2)
    needed = 6 * tokens * weights + 12 * layers * h * seen + head
    assert cost.flops_needed * 8 == sft.programs[0].model_flops == needed
    assert cost.attention_pairs == 128**2 / (128 * 129 / 2)


def test_needed_operations_follow_the_texts_of_packed_rows():
    packed = dataclasses.replace(SFT, packing=True)
    one, four = (plan(packed, segments=n).programs[0].cost for n in (1, 4))
    fewer = 12 * 4 * 64 * (128 * 129 / 2 - 4 * 32 * 33 / 2)  # L, N H, pairs of a row
    assert one.flops_needed - four.flops_needed == fewer
    assert one.flops == four.flops
    assert four.attention_pairs == 128**2 / (4 * 32 * 33 / 2)
    with pytest.raises(ValueError, match="packing=true"):
        plan(SFT, segments=4)


def test_microbatches_of_rows_that_are_not_packed_are_programs_of_their_own():
    four = dataclasses.replace(SFT, gradient_accumulation_steps=4)
    one, update = plan(four).programs
    [whole] = plan(dataclasses.replace(four, packing=True)).programs
    assert (one.name, one.times, update.name, update.times) == ("microbatch", 4, "update", 1)
    assert one.times * one.model_flops == whole.model_flops
    # Between the programs the sums stay beside the parameters and moments.
    assert one.memory.gradients == update.memory.gradients == whole.memory.gradients
    assert one.memory.gradients == one.memory.params
    assert one.memory.total <= 1.02 * whole.memory.total


def test_needed_operations_of_windows_are_those_of_their_pairs():
    window = dataclasses.replace(MODEL, window=32, local_layers=(True, False, True, True))
    content = pairs.even(128, 1)
    whole, near = (flops.forward(m, 3, content) for m in (MODEL, window))
    seen = sum(min(t + 1, 32) for t in range(128))
    assert whole - near == 3 * 4 * 64 * 3 * (128 * 129 / 2 - seen)


def test_full_checkpointing_computes_the_forward_pass_again(sft):
    again = plan(dataclasses.replace(SFT, gradient_checkpointing="full"))
    whole, more = sft.programs[0].cost.flops, again.programs[0].cost.flops
    assert 1.1 < more / whole < 4 / 3


def test_each_layer_is_gathered_for_both_passes_and_its_gradient_scattered(sft):
    layers = 4 * 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    tables = 4 * 2 * 512 * 64
    sent = sft.programs[0].cost.wire_bytes["fsdp"]
    least = 7 / 8 * (2 * layers + tables)  # gathers alone
    assert least < sent < 7 / 8 * (6 * layers + 8 * tables)


def test_the_step_takes_as_long_as_its_slowest_part(sft):
    cost = sft.programs[0].cost
    assert sft.step_secs == max(cost.compute_secs, cost.memory_secs, cost.network_secs)
    assert cost.compute_secs == cost.flops / 1e12
    assert cost.network_secs == pytest.approx(sum(cost.wire_bytes.values()) / 1e10)


def test_offloaded_state_counts_for_the_host():
    memory = plan(dataclasses.replace(SFT, offload="optimizer")).programs[0].memory
    assert memory.optimizer <= 8  # the counts
    assert memory.host >= 2 * memory.params


def test_lora_needs_no_gradient_and_no_moments_of_the_model(sft):
    options = ModelOptions(lora=LoraOptions(rank=4), compute_dtype="float32")
    found = plan(dataclasses.replace(SFT, model=options))
    [whole], [part] = sft.programs, found.programs
    factors = sum(math.prod(s.shape) for s in jax.tree.leaves(found.run.decoder.trained.shapes))
    layer = 4 * (64 + 64) + 2 * 4 * (64 + 32) + 4 * (64 + 64) + 3 * 4 * (64 + 128)
    assert factors == 4 * layer
    assert part.memory.resident == whole.memory.params
    assert part.memory.optimizer < 2 * 4 * factors + 64
    assert part.memory.gradients < 4 * factors + 64
    assert part.cost.flops < 0.9 * whole.cost.flops
    assert report.as_json(found, SFT)["checkpoint_bytes"] == pytest.approx(12 * factors, abs=64)


def test_a_run_that_is_too_large_gets_changes_that_make_it_fit():
    config = dataclasses.replace(SFT, per_device_train_batch_size=4)
    small = dataclasses.replace(EIGHT.device, memory_bytes=4e6)
    target = dataclasses.replace(EIGHT, device=small)
    first = plan(config, target)
    assert not first.fits and "does not fit" in report.table(first, config)
    found = list(search.nearest(config, 8, lambda c: plan(c, target)))
    sizes = [f.plan.peak_bytes for f in found]
    assert found[0].changes == "gradient_checkpointing=full" and sizes[-1] < first.peak_bytes


def test_grpo_has_its_update_its_reference_and_its_generation():
    config = GRPOConfig(
        model_name_or_path="m", student_model="s", output_dir="o", num_generations=4,
        max_prompt_length=64, max_new_tokens=32, max_seq_length=128, train_batch_size=32,
        per_device_train_batch_size=4, rollout=RolloutConfig(protocol="teaching"),
    )  # fmt: skip
    found = plan(config, student=MODEL)
    names = [p.name for p in found.programs]
    own = ["update", "logprobs", "prefill", "decode 32"]
    student = ["alone prefill", "alone decode 32", "guided prefill", "guided decode 32"]
    assert names == own + student
    update, logprobs, _, decode, _, alone, _, guided = found.programs
    assert decode.times == 1
    weights = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 512 * 64
    least = 32 * (32 / 8) * 2 * weights  # 32 tokens of a device's four rows, without attention
    assert least < decode.cost.flops < 1.3 * least
    assert decode.cost.traffic_bytes > 32 * 4 * weights
    assert logprobs.memory.resident == 2 * logprobs.memory.params  # reference and student
    assert update.cost.flops > 3 * logprobs.cost.flops
    assert guided.times == 1 and guided.cost.flops > least  # as many rows, longer prompts
    assert alone.times == 500 // 32 + 1  # the approach may take longer than the answer
    # A row of 128: a prompt of 64 and two completions of 32, which see it and themselves.
    seen = 64 * 65 / 2 + 2 * (32 * 64 + 32 * 33 / 2)
    assert logprobs.model_flops == 16 * (2 * 128 * weights + 4 * 4 * 64 * seen)
    assert logprobs.cost.attention_pairs == 128**2 / seen
    values = report.as_json(found, config)
    assert values["vllm"]["kv_bytes_per_sequence"] == 2 * 2 * 4 * 2 * 16 * 96
    params = sum(math.prod(s.shape) for s in jax.tree.leaves(found.run.decoder.shapes))
    assert values["checkpoint_bytes"] == pytest.approx(3 * 4 * params, abs=64)


def test_distillation_has_the_teacher_beside_the_state_and_its_forward_pass():
    config = GKDConfig(
        model_name_or_path="m", teacher_model_name_or_path="t", output_dir="o", max_seq_length=128,
        max_new_tokens=32, per_device_train_batch_size=1, gradient_checkpointing="none",
        loss_chunk_size=64,
    )  # fmt: skip
    teacher = dataclasses.replace(MODEL, num_layers=8)
    found = plan(config, student=teacher)
    train = found.programs[0]
    assert [p.name for p in found.programs] == ["train", "prefill", "decode 32"]
    assert train.memory.resident > 1.3 * train.memory.params  # both float32 here
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    head = 512 * 64
    # Per token: the policy forward and backward, and the teacher, twice as deep, forward alone.
    weights = 3 * (4 * layer + head) + 8 * layer + head
    seen = (3 * 4 + 8) * 4 * 64 * 129 / 2
    assert train.model_flops == pytest.approx(8 * 128 * (2 * weights + seen), rel=1e-6)
    assert train.cost.flops * 8 > 0.99 * train.model_flops
    lessons = plan(dataclasses.replace(config, teacher_reads="lesson", lmbda=0.0))
    assert [p.name for p in lessons.programs] == ["train"]
    own = lessons.programs[0]
    assert own.memory.resident == own.memory.params
    deeper = plan(dataclasses.replace(config, teacher_reads="lesson", lmbda=0.0), student=teacher)
    more = deeper.programs[0].memory
    # Four more layers in float32 over 8 devices, and their norms on each.
    assert more.resident - own.memory.resident == pytest.approx(4 * layer * 4 / 8, rel=0.05)


def test_scans_count_as_often_as_they_run():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    arguments = (
        jax.ShapeDtypeStruct((8, 16), "float32"),
        jax.ShapeDtypeStruct((5, 16, 16), "float32"),
    )
    assert flops.work(jax.make_jaxpr(layers)(*arguments).jaxpr, 1)[0] == 5 * 2 * 8 * 16 * 16


def test_a_loop_that_depends_on_data_counts_as_often_as_it_may_run():
    def product(x, weights, count):
        def more(carry):
            return (carry[0] < 7) & (carry[0] < count)

        return jax.lax.while_loop(more, lambda c: (c[0] + 1, c[1] @ weights), (0, x))[1]

    arguments = (
        jax.ShapeDtypeStruct((8, 16), "float32"),
        jax.ShapeDtypeStruct((16, 16), "float32"),
        jax.ShapeDtypeStruct((), "int32"),
    )
    assert flops.work(jax.make_jaxpr(product)(*arguments).jaxpr, 1)[0] == 7 * 2 * 8 * 16 * 16
    module = hlo.parse(jax.jit(product).lower(*arguments).compile().as_text())
    assert max(times for _, times, _ in hlo.executed(module)) == 7


@pytest.mark.parametrize("rows", [1, 2])
def test_kernels_of_tpu_attention_count_as_their_products(rows):
    """Two products forward, three for the query's gradient, four for the key's and the value's."""
    length, heads, size = 256, 4, 128
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    query = jax.ShapeDtypeStruct((rows, length, heads, size), "float32")
    key = jax.ShapeDtypeStruct((rows, length, 2, size), "float32")

    def total(query, key, value):
        ids = jnp.ones((rows, length), jnp.int32)
        return attention.Splash(mesh)(query, key, value, ids, scale=1.0).sum()

    traced = jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(query, key, key)
    content = pairs.even(length, 1)
    products, calls = flops.work(traced.jaxpr, 1)
    counted = sum(times * pairs.operations(call, content, 1) for call, times in calls)
    by_hand = (2 + 3 + 4) * 2 * rows * heads * (length * (length + 1) / 2) * size
    assert counted == by_hand
    assert products == 2 * rows * heads * length * size  # of output and gradient, in the backward
    assert [call.kind for call, _ in calls].count("attention_backward") == 2
    # 512 positions in blocks of 512, or 256 in blocks of 256: the kernel computes the whole square.
    assert all(pairs.computed_by(c, content) == rows * heads * length**2 for c, _ in calls)


def test_a_window_of_tpu_attention_saves_the_blocks_that_it_does_not_touch():
    length = 2048
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    query = jax.ShapeDtypeStruct((1, length, 2, 128), "float32")

    def attend(query, key, value):
        ids = jnp.ones((1, length), jnp.int32)
        return attention.Splash(mesh)(query, key, value, ids, scale=1.0, window=600)

    _, [(call, times)] = flops.work(jax.make_jaxpr(attend)(query, query, query).jaxpr, 1)
    seen = 1 + 2 + 3 + 3  # blocks of keys that hold one of the last 600 of each block's queries
    assert times == 1 and pairs.computed_by(call, pairs.even(length, 1)) == 2 * seen * 512**2
