"""Memory of a step of several microbatches, however parameters are split over devices."""

import pytest

from atlas_jax.config import SFTConfig
from atlas_jax.models.config import ModelConfig, Rope
from atlas_jax.plan import estimate, programs, targets
from tests.compilers import needs

MODEL = ModelConfig(
    vocab_size=512, hidden_size=1024, intermediate_size=4096, num_layers=8, num_heads=8,
    num_kv_heads=8, head_dim=128, max_positions=1024, norm_eps=1e-5, tie_embeddings=True,
    rope=Rope(),
)  # fmt: skip
"""Its parameters are most of its memory."""


def temporaries(target, **options):
    """Returns the temporary bytes of a step of four microbatches, and those of all parameters."""
    config = SFTConfig(
        model_name_or_path="m", per_device_train_batch_size=1, max_seq_length=512, packing=True,
        gradient_accumulation_steps=4, gradient_checkpointing="full", **options,
    )  # fmt: skip
    target = targets.parse(target)
    run = programs.build(config, target, targets.devices(target), MODEL, None)
    measured = estimate.measure(run, run.programs[0], target)
    return measured.memory.temporaries, measured.memory.params


@needs("tpu")
@pytest.mark.parametrize(("layout", "most"), [("fsdp", 3.0), ("zero1", 1.3), ("replicated", 1.6)])
def test_a_step_of_microbatches_compiles_for_a_tpu_and_keeps_its_memory(layout, most):
    """Temporaries as parts of a device's parameters; one more tree of gradients would pass them.

    Gathered layers of this small model are most of them under `fsdp`. In the other layouts the
    weights in bfloat16, made once for all microbatches, are 0.5.
    """
    found, params = temporaries("v5e:4x4", sharding=layout)
    assert found < most * params
