"""Targets of compilation that need not be present, such as `h100:8` or `v5e:4x4`.

Sizes and speeds come from the manufacturers' data sheets (NVIDIA H100, H200 and A100; Google Cloud
TPU v5e, v5p, v6e), for matrix products in bfloat16 without sparsity. Link speeds count one
direction: of NVLink and of a network card for each GPU, of both neighbours in one dim of the torus
for a TPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies
from jax.sharding import NamedSharding

from atlas_jax.sharding import Sharding

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of device."""

    platform: str
    memory_bytes: float
    """Bytes of memory that the device has for programs."""
    peak_flops: float
    """FLOPs a second in bfloat16."""
    memory_bandwidth: float
    """Bytes a second of device memory."""
    link_bandwidth: float
    """Bytes a second to devices of the same host, or of the same slice for a TPU."""
    network_bandwidth: float
    """Bytes a second to devices of other hosts."""
    compiled_as: str
    """Compiler's name of a TPU, or the properties of a GPU on which compilation depends."""


_HOPPER = (
    "core_count: 132 fpus_per_core: 128 l2_cache_size: 52428800 clock_rate_ghz: 1.98 "
    "shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 "
    "cuda_compute_capability { major: 9 }"
)
_AMPERE = (
    "core_count: 108 fpus_per_core: 64 l2_cache_size: 41943040 clock_rate_ghz: 1.41 "
    "shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 "
    "cuda_compute_capability { major: 8 }"
)

_SHEET = (
    # name, platform, GiB, TFLOP/s, TB/s of memory, GB/s of links, GB/s of the network, compiled as
    ("h100", "gpu", 79.1, 989, 3.35, 450, 50, _HOPPER),
    ("h200", "gpu", 139.8, 989, 4.8, 450, 50, _HOPPER),
    ("a100-80g", "gpu", 79.1, 312, 2.04, 300, 25, _AMPERE),
    ("a100-40g", "gpu", 39.4, 312, 1.56, 300, 25, _AMPERE),
    ("v5e", "tpu", 15.75, 197, 0.82, 90, 90, "v5e"),
    ("v5p", "tpu", 95.0, 459, 2.77, 180, 180, "v5p"),
    ("v6e", "tpu", 31.25, 918, 1.64, 180, 180, "v6e"),
)
DEVICES = {
    name: Device(
        platform=platform,
        memory_bytes=gib * _GIB,
        peak_flops=teraflops * 1e12,
        memory_bandwidth=terabytes * 1e12,
        link_bandwidth=link * 1e9,
        network_bandwidth=network * 1e9,
        compiled_as=compiled_as,
    )
    for name, platform, gib, teraflops, terabytes, link, network, compiled_as in _SHEET
}

GPUS_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices of one kind; `name` is the user's spelling."""

    name: str
    device: Device
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        return math.prod(self.shape)

    @property
    def usable_bytes(self) -> float:
        """Bytes of a device that JAX takes: of a GPU the share that the environment says.

        Raises:
            ValueError: for a share that JAX would refuse.
        """
        gpu = self.device.platform == "gpu"
        return self.device.memory_bytes * (memory_share(os.environ) if gpu else 1.0)

    @property
    def devices_a_host(self) -> int:
        """Number of devices connected at `link_bandwidth`; for a TPU, all of the slice."""
        gpu = self.device.platform == "gpu"
        return min(GPUS_A_HOST, self.num_devices) if gpu else self.num_devices


_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_DEFAULT_SHARE = 0.75


def memory_share(environment: Mapping[str, str]) -> float:
    """Returns the share of a GPU's memory that JAX takes in an environment.

    Raises:
        ValueError: for a share that is no number above 0, or that is given twice.
    """
    given = {name: environment[name] for name in _SHARES if environment.get(name)}
    if len(given) == 2:
        raise ValueError(f"{' and '.join(_SHARES)} are both set; unset the latter, a former name")
    for name, text in given.items():
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise ValueError(f"{name}={text} is no share of the memory; write one such as 0.92")
        return share
    return _DEFAULT_SHARE


@contextlib.contextmanager
def as_if_present(target: Target) -> Iterator[None]:
    """Lets JAX trace attention for a GPU that is not there.

    Its check of what cuDNN can do asks the GPU of this process for its compute capability. Where
    there is none, heads above 128 and packed rows would be refused. JAX has no parameter for it, so
    its function is replaced, for as long as the program is traced.
    """
    if target.device.platform != "gpu":
        yield
        return
    major = re.search(r"major: (\d+)", target.device.compiled_as)
    assert major
    capability = (int(major[1]), 0)

    def has(wanted: str) -> bool:
        return capability >= tuple(int(n) for n in wanted.split("."))

    original = fused_attention_stablehlo.check_compute_capability
    fused_attention_stablehlo.check_compute_capability = has
    try:
        yield
    finally:
        fused_attention_stablehlo.check_compute_capability = original


def parse(name: str) -> Target:
    """Returns the target with a name of the form `KIND:COUNT` (GPU) or `KIND:AxB[xC]` (TPU).

    Raises:
        ValueError: if the kind is unknown, or the size does not exist.
    """
    kind, _, size = name.partition(":")
    if kind not in DEVICES:
        raise ValueError(
            f"target {name!r} is none of {', '.join(DEVICES)}; write h100:8 or v5e:4x4"
        )
    device = DEVICES[kind]
    pattern = (
        r"\d+" if device.platform == "gpu" else r"\d+x\d+x\d+" if kind == "v5p" else r"\d+x\d+"
    )
    if not re.fullmatch(pattern, size):
        example = {"gpu": f"{kind}:8", "tpu": f"{kind}:4x4" + "x4" * (kind == "v5p")}
        raise ValueError(f"target {name!r} has size {size!r}; write {example[device.platform]}")
    target = Target(name, device, tuple(int(n) for n in size.split("x")))
    count = target.num_devices
    if not count or (device.platform == "gpu" and count > GPUS_A_HOST and count % GPUS_A_HOST):
        raise ValueError(f"target {name!r}: use 1 to {GPUS_A_HOST} GPUs, or whole hosts of them")
    return target


def devices(target: Target) -> list[jax.Device]:
    """Returns the target's devices, to compile for.

    Raises:
        ValueError: if the compiler is not installed or has no such topology.
    """
    try:
        if target.device.platform == "gpu":
            return _gpus(target)
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        name = target.device.compiled_as + ":" + "x".join(map(str, target.shape))
        return topologies.get_topology_desc(name, "tpu").devices
    except (RuntimeError, FileNotFoundError, ModuleNotFoundError) as error:
        raise ValueError(
            f"cannot compile for {target.name}: {str(error).splitlines()[0]}; install the "
            'compilers with pip install -e ".[plan]", and give a topology that exists'
        ) from None


def _gpus(target: Target) -> list[jax.Device]:
    device = target.device
    hosts = target.num_devices // target.devices_a_host
    description = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
          threads_per_core_limit: 2048 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
          block_dim_limit_z: 65535 registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: {int(device.memory_bandwidth)}
          device_memory_size: {int(device.memory_bytes)}
          {device.compiled_as}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 8 }}
        runtime_version {{ major: 13 }}
        device_description_str: "{target.name.partition(":")[0]}" """
    shape = f"1x{hosts}x{target.devices_a_host}"
    return topologies.get_topology_desc(
        platform="cuda", topology=shape, target_config=description
    ).devices


class CompiledSharding(Sharding):
    """A sharding over compile-only devices, which have no list of their memories."""

    def in_host(self, sharding: NamedSharding) -> NamedSharding:
        """Returns `sharding` in host memory, over an abstract mesh, which JAX does not check."""
        assert isinstance(self.mesh, jax.sharding.Mesh)
        shape: Any = self.mesh.abstract_mesh
        return NamedSharding(shape, sharding.spec, memory_kind="pinned_host")
