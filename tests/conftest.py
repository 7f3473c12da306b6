"""Eight CPU devices, so that every sharding is real; a persistent cache would hide recompiles."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest


def pytest_collection_modifyitems(items):
    """Keeps the tests of a file in one process, since they share compiled programs."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.path.name))
