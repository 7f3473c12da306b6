"""Devices of a server, against sizes that were computed by hand."""

import json

import pytest
import safetensors.numpy

from atlas_jax.plan import serving
from atlas_jax.plan.serving import ModelSize
from tests import words

GIB = 2**30
LLAMA_8B = ModelSize(8_030_261_248, 32, 8)
QWEN_32B = ModelSize(32_763_876_352, 64, 8)
LLAMA_70B = ModelSize(70_553_706_496, 64, 8)
SMOL = ModelSize(134_515_008, 9, 3)


@pytest.mark.parametrize(
    ("sizes", "devices", "gib", "number"),
    [
        ([LLAMA_8B], 8, 79.1, 1),  # 15 GiB of 35.6
        ([LLAMA_8B], 8, 23.6, 2),  # an L4: 10.6 GiB hold no 15
        ([QWEN_32B], 8, 79.1, 2),  # 61 GiB of 71
        ([QWEN_32B], 8, 139.8, 1),
        ([LLAMA_70B], 8, 79.1, 4),  # 131 GiB of 142
        ([LLAMA_70B], 8, 23.6, 8),  # too small, and no more devices
        ([LLAMA_70B, LLAMA_8B], 8, 79.1, 4),
        ([QWEN_32B], 3, 79.1, 1),  # 64 heads do not split over 3
        ([SMOL], 8, 0.1, 1),  # nor 9 over 2, 4 or 8
        (
            [ModelSize(10**9, 12, 3)],
            6,
            1.0,
            6,
        ),  # 1.9 GiB of 2.7; vLLM copies each of 3 heads of keys
    ],
)
def test_devices_are_as_few_as_leave_room_for_keys_and_values(sizes, devices, gib, number):
    assert serving.devices_per_server(sizes, devices, gib * GIB) == number


def test_the_size_is_that_of_the_files(tmp_path):
    path = words.save(tmp_path / "model", ("a", "b"), hidden_size=64)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    tensors = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    assert serving.model_size(path) == ModelSize(
        sum(tensor.size for tensor in tensors.values()),
        config["num_attention_heads"],
        config["num_key_value_heads"],
    )
