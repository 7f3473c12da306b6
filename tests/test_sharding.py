"""In which order devices of several processes and slices become a mesh."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest

from atlas_jax import sharding
from atlas_jax.config import MeshConfig


def devices(*places):
    """Devices in `places`: (slice, process) of each."""
    return [
        SimpleNamespace(
            id=i, slice_index=part, process_index=process, platform="cpu", device_kind="cpu"
        )
        for i, (part, process) in enumerate(places)
    ]


def grid(shape, found):
    return inspect.unwrap(sharding._grid)(shape, found)


def of(grid, name):
    return np.vectorize(lambda device: getattr(device, name))(grid)


def test_data_goes_over_hosts_before_fsdp_and_tensor_never():
    hosts = devices(*[(0, process) for process in (0, 1) for _ in range(4)])
    found = of(grid((2, 2, 2), hosts), "process_index")
    assert found.tolist() == [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]
    assert of(grid((1, 4, 2), hosts), "process_index").ravel().tolist() == [0] * 4 + [1] * 4


def test_devices_in_another_order_are_put_in_one_where_tensor_stays_inside_a_process():
    mixed = devices(*[(0, process) for _ in range(4) for process in (0, 1)])
    found = of(grid((1, 2, 4), mixed), "process_index")
    assert found.tolist() == [[[0] * 4, [1] * 4]]


def test_between_slices_goes_data():
    pods = devices(*[(part, 2 * part + host) for part in (1, 0) for host in (0, 1) for _ in "ab"])
    found = grid((2, 2, 2), pods)
    assert of(found, "slice_index").tolist() == [[[0] * 2] * 2, [[1] * 2] * 2]
    assert all(len(set(row)) == 1 for row in of(found, "process_index").reshape(-1, 2))
    only_fsdp = of(grid((1, 8, 1), pods), "slice_index")
    assert only_fsdp.ravel().tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("shape", [(3, 1, 4), (1, 1, 12)])
def test_tensor_that_fits_in_no_process_is_refused(shape):
    hosts = devices(*[(0, process) for process in (0, 1) for _ in range(6)])
    with pytest.raises(ValueError, match=f"mesh.tensor={shape[2]} stays inside one process of 2"):
        grid(shape, hosts)


def test_the_mesh_of_one_process_uses_its_devices_once():
    mesh = sharding.make_mesh(MeshConfig(data=2, tensor=2))
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert len(set(mesh.devices.flat)) == 8
