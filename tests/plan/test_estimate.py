"""The plan of real recipes, compiled for the devices of this machine, against numbers by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from atlas_jax.config import GRPOConfig, MeshConfig, RolloutConfig, SFTConfig
from atlas_jax.models import attention
from atlas_jax.models.config import ModelConfig, Rope
from atlas_jax.plan import estimate, flops, hlo, programs, report, search
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


def plan(config, target=EIGHT, student=None):
    run = programs.build(config, target, jax.devices()[: target.num_devices], MODEL, student)
    return report.Plan(target, run, [estimate.measure(run, p, target) for p in run.programs])


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
    assert sft.programs[0].cost.flops * 8 == 6 * tokens * weights + attention + head


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
    assert names == ["update", "logprobs", "prefill", "decode 32 tokens"]
    update, logprobs, _, decode = found.programs
    assert decode.times == 1
    weights = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 512 * 64
    least = 32 * (32 / 8) * 2 * weights  # 32 tokens of a device's four rows, without attention
    assert least < decode.cost.flops < 1.3 * least
    assert decode.cost.traffic_bytes > 32 * 4 * weights
    assert logprobs.memory.resident == 2 * logprobs.memory.params  # reference and student
    assert update.cost.flops > 3 * logprobs.cost.flops
    values = report.as_json(found, config)
    assert values["vllm"]["kv_bytes_per_sequence"] == 2 * 2 * 4 * 2 * 16 * 96
    params = sum(math.prod(s.shape) for s in jax.tree.leaves(found.run.decoder.shapes))
    assert values["checkpoint_bytes"] == pytest.approx(3 * 4 * params, abs=64)


def test_scans_count_as_often_as_they_run():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    arguments = (
        jax.ShapeDtypeStruct((8, 16), "float32"),
        jax.ShapeDtypeStruct((5, 16, 16), "float32"),
    )
    assert flops.count(jax.make_jaxpr(layers)(*arguments).jaxpr) == 5 * 2 * 8 * 16 * 16


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
    assert flops.count(jax.make_jaxpr(product)(*arguments).jaxpr) == 7 * 2 * 8 * 16 * 16
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
    by_hand = (2 + 3 + 4) * 2 * rows * heads * length * length * size / 2
    assert flops.count(traced.jaxpr) == pytest.approx(by_hand, rel=0.01)
