"""Check of JAX's devices against the host's, so that no run uses the CPU of a host with GPUs."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

import jax
from absl import logging

WANTED = "ATLAS_DEVICES"
"""Environment variable with the number of devices on this host that the launcher was asked for."""

_SECS = 60.0

_OLDEST_JAX = (0, 11, 1)
"""First JAX whose attention on GPUs is right with segments and makes no gradient of a mask."""


def check() -> None:
    """Checks the devices of this process, which starts JAX.

    Raises:
        ValueError: if the host has GPUs or TPUs and JAX runs on the CPU without JAX_PLATFORMS=cpu,
            or if JAX has another number of devices than the launcher was asked for.
    """
    platform = jax.default_backend()
    count = jax.local_device_count()
    chosen = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    if platform == "cpu" and "cpu" not in chosen:
        for extra, num_found in (("cuda", _count_gpus()), ("tpu", _count_tpus())):
            if num_found:
                kind = {"cuda": "GPUs", "tpu": "TPU chips"}[extra]
                driver = " and a driver of 580 or newer (nvidia-smi)" * (extra == "cuda")
                raise ValueError(
                    f"this host has {num_found} {kind}, and JAX runs on its CPU; JAX needs "
                    f'pip install -e ".[{extra}]"{driver} for them; or set JAX_PLATFORMS=cpu to '
                    "train on the CPU"
                )
    if problem := old_jax(platform):
        logging.warning("%s", problem)
    wanted = os.environ.get(WANTED, "")
    if wanted and wanted != str(count):
        raise ValueError(
            f"{wanted} devices were asked for, and JAX has {count} ({jax.local_devices()[0]}, …) "
            "on this host; ask for that many, or look at CUDA_VISIBLE_DEVICES and at what "
            "nvidia-smi lists"
        )


def old_jax(platform: str) -> str:
    """Returns what to say of a JAX that is too old for GPUs or TPUs; "" if it is not.

    Args:
        platform: kind of the devices: `cpu`, `gpu` or `tpu`.
    """
    if platform == "cpu" or jax.__version_info__ >= _OLDEST_JAX:
        return ""
    extra = {"gpu": "cuda"}.get(platform, platform)
    return (
        f"jax {jax.__version__} is slow on a {platform.upper()}: 0.11.1 is needed, and Python 3.12 "
        f'for it; make the environment anew with pip install -e ".[{extra}]"'
    )


def _count_gpus() -> int:
    """Returns the number of GPUs that `nvidia-smi` lists; 0 if CUDA_VISIBLE_DEVICES hides all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    program = shutil.which("nvidia-smi")
    if program is None or (visible is not None and visible.strip() in ("", "-1")):
        return 0
    try:
        result = subprocess.run(
            [program, "--list-gpus"], capture_output=True, text=True, check=False, timeout=_SECS
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    lines = result.stdout.splitlines() if result.returncode == 0 else []
    # Indented lines are parts of a GPU (MIG).
    return sum(bool(line) and not line[0].isspace() for line in lines)


def _count_tpus(root: str = "/") -> int:
    """Returns the number of TPU chips of the host, as JAX counts them.

    Args:
        root: the directory of `dev` and `sys`.
    """
    from jax._src import hardware_utils  # JAX has no public name for it

    files = list(pathlib.Path(root).glob("dev/accel[0-9]*"))
    return len(files) or hardware_utils.num_available_tpu_chips_and_device_id()[0]
