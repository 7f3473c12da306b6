"""What `--target` may be, and models that are not here."""

import pathlib
import re
import subprocess
import sys

import pytest

from atlas_jax.plan import architectures, targets


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
