"""Compilers for devices that are not here, of the extra `plan`, for tests marked `compiler`."""

import importlib.metadata

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atlas_jax import sharding
from atlas_jax.plan import hlo, targets, traffic

_INSTALLED = {d.name for d in importlib.metadata.distributions()}
_NEEDED = {"gpu": "jax-cuda13-plugin", "tpu": "libtpu"}


def needs(platform):
    """Marks a test that compiles for `gpu` or `tpu`."""
    package = _NEEDED[platform]
    skip = pytest.mark.skipif(
        package not in _INSTALLED, reason=f"no compiler for {platform}: {package} is not installed"
    )
    return lambda test: pytest.mark.compiler(skip(test))


def mesh_of(target):
    """Returns a mesh of a target's devices, all of them on `fsdp`."""
    devices = np.asarray(targets.devices(targets.parse(target)))
    return Mesh(devices.reshape(1, -1, 1), sharding.AXES)


def kernels(function, *arguments, mesh):
    """Returns the kernels of a program of arrays of these shapes, as (result, bytes, times)."""
    place = NamedSharding(mesh, PartitionSpec())
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in arguments]
    module = hlo.parse(jax.jit(function).lower(*shapes).compile().as_text())
    found = []
    for name, times, fused in hlo.executed(module):
        body = {} if fused else module.computations[name]
        for op in filter(traffic.is_kernel, body.values()):
            found.append((op.shape, traffic.of(module, body, op), times))
    return found
