"""What `--target` may be, and models that are not here."""

import pathlib
import re
import subprocess
import sys

import pytest
from jax._src.cudnn import fused_attention_stablehlo

from atlas_jax.config import SFTConfig
from atlas_jax.models.config import ModelConfig, Rope
from atlas_jax.plan import architectures, estimate, programs, targets
from tests.compilers import needs


def test_targets_are_devices_and_hosts():
    assert (
        targets.parse("h100:64").num_devices == 64 and targets.parse("h100:64").devices_a_host == 8
    )
    assert targets.parse("a100-40g:4").devices_a_host == 4
    assert targets.parse("v5e:4x4").devices_a_host == targets.parse("v5p:2x2x4").num_devices == 16


@pytest.mark.parametrize(
    ("name", "says"),
    [("b300:8", "none of h100"), ("h100", "write h100:8"), ("h100:12", "whole hosts"),
     ("v5e:16", "v5e:4x4"), ("v5p:4x4", "v5p:4x4x4")],
)  # fmt: skip
def test_a_wrong_target_is_answered_with_a_right_one(name, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        targets.parse(name)


@pytest.mark.parametrize(
    ("environment", "share"),
    [({}, 0.75), ({"XLA_CLIENT_MEM_FRACTION": "0.92"}, 0.92),
     ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, 0.5), ({"XLA_CLIENT_MEM_FRACTION": ""}, 0.75)],
)  # fmt: skip
def test_jax_takes_the_share_of_a_gpu_that_the_environment_says(environment, share):
    assert targets.memory_share(environment) == share


@pytest.mark.parametrize("text", ["0", "1.5", "much"])
def test_a_share_that_jax_cannot_take_is_refused(text):
    with pytest.raises(ValueError, match=r"XLA_CLIENT_MEM_FRACTION=[^ ]+ is no share"):
        targets.memory_share({"XLA_CLIENT_MEM_FRACTION": text})
    both = {"XLA_CLIENT_MEM_FRACTION": "0.9", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    with pytest.raises(ValueError, match="both set"):
        targets.memory_share(both)


def test_the_share_counts_for_gpus_alone(monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    assert targets.parse("h100:8").usable_bytes == 79.1 * 2**30 / 2
    assert targets.parse("v5e:4x4").usable_bytes == 15.75 * 2**30


@pytest.mark.parametrize(("name", "packed"), [("h100:1", True), ("a100-40g:1", False)])
def test_jax_traces_attention_as_on_the_target(name, packed):
    check = fused_attention_stablehlo.check_compute_capability
    with targets.as_if_present(targets.parse(name)):
        assert fused_attention_stablehlo.check_compute_capability("9.0") is packed
        assert fused_attention_stablehlo.check_compute_capability("8.0")
    assert fused_attention_stablehlo.check_compute_capability is check


@needs("gpu")
@pytest.mark.parametrize("packing", [True, False])
def test_a_head_of_256_compiles_for_a_gpu(packing):
    """Gemma 3's size of heads and its windows, in a small model."""
    small = ModelConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_layers=2, num_heads=4,
        num_kv_heads=1, head_dim=256, max_positions=1024, norm_eps=1e-5, tie_embeddings=True,
        rope=Rope(), window=128, local_layers=(True, False),
    )  # fmt: skip
    config = SFTConfig(
        model_name_or_path="m", per_device_train_batch_size=1, max_seq_length=512, packing=packing
    )
    target = targets.parse("h100:1")
    run = programs.build(config, target, targets.devices(target), small, None)
    cost = estimate.measure(run, run.programs[0], target).cost
    assert cost.attention_pairs > 1 and any(
        kind.endswith("attention_forward") and secs > 0 for kind, secs in cost.secs_by_kind.items()
    )


def test_every_large_model_of_the_configs_is_known():
    for path in pathlib.Path("configs/model").glob("*.py"):
        name = re.search(r'model_name_or_path = "(.*)"', path.read_text())[1]
        if "SmolLM2" not in name:
            assert architectures.find(name).num_layers >= 28


def test_parameters_of_known_models_are_those_of_their_model_cards():
    c = architectures.find("Qwen/Qwen3-8B")
    layer = 2 * c.hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads)
    layer += 3 * c.hidden_size * c.intermediate_size
    total = c.num_layers * layer + 2 * c.vocab_size * c.hidden_size
    assert abs(total / 8.2e9 - 1) < 0.01


def test_the_command_refuses_a_wrong_target_before_anything_is_compiled():
    command = [sys.executable, "tools/plan.py", "--config", "configs/run/teacher_sft.py"]
    found = subprocess.run([*command, "--target", "h100:12"], capture_output=True, text=True)
    assert found.returncode == 1 and "whole hosts" in found.stderr


def test_the_command_takes_a_table_or_a_config():
    command = [sys.executable, "tools/plan.py", "--table", "--target", "h100:1"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2 and "--table has its own configs" in found.stderr
