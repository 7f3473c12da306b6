"""The installed commands: each runs a module as `python -m` does.

Modules listen for signals before their imports, which may take seconds; this one imports none.
"""

from __future__ import annotations

import os
import runpy
import sys


def train() -> None:
    """Runs `atlas-train`."""
    _run("atlas_jax.train")


def evaluate() -> None:
    """Runs `atlas-evaluate`."""
    _run("atlas_jax.evaluate")


def serve() -> None:
    """Runs `atlas-serve`."""
    _run("atlas_jax.serve")


def plan() -> None:
    """Runs `atlas-plan`."""
    _run("atlas_jax.plan.command")


def convert() -> None:
    """Runs `atlas-convert`."""
    _run("atlas_jax.convert")


def report() -> None:
    """Runs `atlas-report`."""
    _run("atlas_jax.report")


def _run(module: str) -> None:
    if not sys.flags.safe_path:
        sys.path.append(os.getcwd())  # last, so that no folder there hides a library
    runpy.run_module(module, run_name="__main__", alter_sys=True)
