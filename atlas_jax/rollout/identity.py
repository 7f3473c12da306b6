"""Checks that a directory or a server has the same model as the trainer."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from atlas_jax.checkpoint import hf, writer
from atlas_jax.models.config import from_hf
from atlas_jax.models.transformer import Decoder
from atlas_jax.rollout.capabilities import ServerStart
from atlas_jax.wording import shorten


def check_manifest(directory: pathlib.Path, shapes: Mapping[str, Any], dtype: str) -> None:
    """Checks that a directory holds exactly the tensors that a server loaded at its start.

    vLLM silently keeps the old content of a tensor that is missing.

    Raises:
        ValueError: if tensors are missing, unknown, or of another shape or dtype; the message names
            them.
    """
    source = hf.SafetensorsSource(str(directory))
    different = _differences(source.shapes, shapes)
    stored = {name: found for name in source.shapes if (found := source.dtype(name)) != dtype}
    if different or stored:
        raise ValueError(f"{directory} does not fit the servers: {different or stored}")


def check_trained(url: str, start: ServerStart, decoder: Decoder) -> None:
    """Checks that a server was started with a model of the tensors that will be pushed to it.

    A model that this host cannot read is not checked.

    Raises:
        ValueError: if tensors differ; the message names them.
    """
    if not os.path.isdir(start.root):
        return
    loaded = hf.stored_shapes(hf.open_source(start.root), decoder.config.tie_embeddings)
    different = _differences(loaded, dict(writer.tensors(decoder)))
    if different:
        raise ValueError(
            f"the server {url} was started with {start.root}, whose tensors are not those of the "
            f"model that trains: {different}; start it with the same model"
        )


def check_frozen(url: str, start: ServerStart, name: str, source: hf.Source) -> None:
    """Checks that a server was started with the trainer's frozen model.

    The weights are compared if this host can read both models. Otherwise the last parts of their
    names must be equal.

    Args:
        url: the address of the server.
        start: the options of its start.
        name: the directory or hub id of the model.
        source: the model on disk.

    Raises:
        ValueError: if the models differ; the message names both.
    """
    if different := _unlike(url, start, name, source):
        raise ValueError(
            f"the student server {url} was started with {start.root}, and student_model={name} is "
            f"another model: {different}; start it with the student, or name its server in "
            "rollout.student_servers"
        )


def check_base(url: str, start: ServerStart, name: str, source: hf.Source) -> None:
    """Checks that a server was started with the model that an adapter belongs to.

    The models are compared as by `check_frozen`.

    Args:
        url: the address of the server.
        start: the options of its start.
        name: the directory or hub id of the model.
        source: the model on disk.

    Raises:
        ValueError: if the models differ; the message names both.
    """
    if different := _unlike(url, start, name, source):
        raise ValueError(
            f"the server {url} was started with {start.root}, and the adapter belongs to "
            f"model_name_or_path={name}, another model: {different}; start it with that model"
        )


def _unlike(url: str, start: ServerStart, name: str, source: hf.Source) -> str:
    """Returns the differences between a server's model and one on disk; "" if none."""
    path = source.path if isinstance(source, hf.SafetensorsSource) else pathlib.Path(name)
    if start.root == name or os.path.realpath(start.root) == os.path.realpath(path):
        return ""
    if os.path.isdir(start.root):
        return _other_model(hf.open_source(start.root), source)
    if os.path.basename(start.root) == os.path.basename(name.rstrip("/")):
        logging.warning("%s serves %s, which is taken for %s", url, start.root, name)
        return ""
    return "their names differ, and this host cannot read the server's"


def _other_model(served: hf.Source, wanted: hf.Source) -> str:
    """Returns the differences between two models on disk; "" if none."""
    ours = from_hf(wanted.config)
    theirs = from_hf(served.config)
    if ours != theirs:
        return "their config.json describe different architectures"
    shapes = [hf.stored_shapes(source, ours.tie_embeddings) for source in (served, wanted)]
    if different := _differences(*shapes):
        return different
    # Training changes every matrix, so comparing two of them is enough.
    matrices = sorted(name for name, shape in shapes[1].items() if len(shape) == 2)
    for name in (matrices[0], matrices[-1]):
        if not np.array_equal(served.read(name), wanted.read(name)):
            return f"their weights differ, for example {name}"
    return ""


def _differences(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Returns the names and shapes that differ, as a text; "" if none."""
    parts = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unknown": sorted(stored.keys() - expected.keys()),
        "of another shape": sorted(
            name for name in expected.keys() & stored.keys() if stored[name] != expected[name]
        ),
    }
    shown = {kind: ", ".join(shorten(names, 5)) for kind, names in parts.items() if names}
    return "; ".join(f"{kind} {names}" for kind, names in shown.items())
