"""How metrics of several steps and processes become one number."""

import json

import jax

from atlas_jax import metrics


def test_means_are_weighted_and_the_most_is_the_most(tmp_path):
    total = {}
    for step in ({"a/mean": (6, 2), "a/lag_max": (1, 1)}, {"a/mean": (0, 1), "a/lag_max": (3, 1)}):
        total = metrics.add(total, step)
    total = metrics.add(total, {"a/lag_max": (2, 1), "a/none_max": (0, 0)})
    assert total == {"a/mean": (6, 3), "a/lag_max": (3, 1), "a/none_max": (0, 0)}
    writer = metrics.MetricWriter(str(tmp_path), 0)
    writer.write(1, metrics.means(total))
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1, "a/mean": 2.0, "a/lag_max": 3.0, "a/none_max": None
    }  # fmt: skip


def test_the_most_may_be_negative_and_what_has_no_weight_is_none():
    total = metrics.add({"a/b_max": (-5.0, 1)}, {"a/b_max": (-2.0, 1)})
    assert metrics.add(total, {"a/b_max": (0.0, 0)}) == {"a/b_max": (-2.0, 1)}
    assert metrics.sum_over_processes(total) == total


def test_the_most_memory_is_known_where_the_device_tells_it():
    device = jax.devices()[0]
    told = device.memory_stats()  # None on a CPU
    assert metrics.peak_bytes(device) == (told["peak_bytes_in_use"] if told else None)
