"""Rates of data sheets and of files."""

import json

import pytest

from atlas_jax.plan import rates, targets

H100 = targets.parse("h100:1").device


def test_published_rates_are_the_data_sheets():
    found = rates.published(H100)
    assert found.source == "published"
    assert set(found.flops.values()) == {989e12}
    assert (found.memory, found.link, found.network) == (3.35e12, 450e9, 50e9)


def test_a_file_says_where_its_rates_come_from_and_what_it_leaves_to_the_data_sheet(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"source": "measured on X", "attention_forward": 5e14,
                                "packed_attention_forward": 4e14, "memory": 2e12}))  # fmt: skip
    found = rates.read(str(path), H100)
    assert found.source == "measured on X; published: products"
    assert found.flops["products"] == 989e12 and found.memory == 2e12
    assert found.flops["packed_attention_forward"] == 4e14
    assert found.flops["masked_attention_forward"] == 5e14  # as plain attention
    assert found.flops["masked_attention_backward"] == 989e12
    assert found.launch_secs == 2e-6


@pytest.mark.parametrize("text", ["{", '{"memory": 1.0}', '{"source": "x", "speed": 3}',
                                  '{"source": "x", "memory": "fast"}'])  # fmt: skip
def test_another_file_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "rates.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"rates\.json is no file of rates .*device_check"
    ) as error:
        rates.read(str(path), H100)
    assert "\n" not in str(error.value)


def test_the_measured_rates_that_are_kept_can_be_read():
    found = rates.read("tools/device_check/rates_h200.json", targets.parse("h200:1").device)
    assert found.source.startswith("measured on NVIDIA H200")
    # docs/speed.md: 4 rows of 8,192, 16 heads of 128, forward 1.77 ms
    forward = 2 * 2 * 128 * 4 * 16 * (8192 * 8193 / 2) / 1.77e-3
    assert found.flops["attention_forward"] == pytest.approx(forward, rel=0.02)
