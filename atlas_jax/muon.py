"""Muon for the matrices of layers, AdamW for all other parameters."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from atlas_jax.options.train import TrainConfig
from atlas_jax.types import Params

_UPDATE_SIZE = 0.2
"""Root mean square of an update, about that of AdamW's (arXiv:2502.16982, eq. 4)."""


def scale_by_muon(config: TrainConfig, mu_dtype: str, dims: Params) -> optax.GradientTransformation:
    """Returns Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) as optax has it.

    It gives directions; weight decay and the learning rate follow as they do with AdamW.

    Args:
        config: options of the optimizer.
        mu_dtype: dtype of the momentum.
        dims: names of the parameters' dims.
    """
    numbers = _dimension_numbers(dims)

    # By path: optax and `offload` give trees in which some parameters are masked.
    def numbers_of(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: numbers[_name(path)], params)

    def kinds(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: "matrix" if _name(path) in numbers else "other", params
        )

    def sized(updates: Any, params: Any) -> Any:
        del params

        def scale(update: jax.Array, axes: MuonDimensionNumbers) -> jax.Array:
            sides = (math.prod(update.shape[axis] for axis in side) for side in axes)
            return _UPDATE_SIZE * math.sqrt(max(sides)) * update

        return jax.tree.map(scale, updates, numbers_of(updates))

    directions = optax.contrib.scale_by_muon(
        beta=config.muon_momentum,
        eps=config.adam_epsilon,
        mu_dtype=mu_dtype,
        weight_dimension_numbers=numbers_of,
    )
    others = optax.scale_by_adam(
        config.adam_beta1, config.adam_beta2, config.adam_epsilon, mu_dtype=mu_dtype
    )
    matrices = optax.chain(directions, optax.stateless(sized))
    return optax.partition({"matrix": matrices, "other": others}, kinds)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path)


def _dimension_numbers(dims: Params) -> dict[str, MuonDimensionNumbers]:
    """Returns which dims of each layer's matrices are its rows and columns, by parameter.

    Dim 0 counts the layers. Of the others `embed` is one side, and heads with their size, or hidden
    units, are the other.
    """
    found = {}
    for path, names in jax.tree.leaves_with_path(dims, is_leaf=lambda x: isinstance(x, tuple)):
        if path[-1].key != "kernel":
            continue
        axes = tuple(range(1, len(names)))
        if names[1] == "embed":
            found[_name(path)] = MuonDimensionNumbers(axes[:1], axes[1:])
        elif names[-1] == "embed":
            found[_name(path)] = MuonDimensionNumbers(axes[:-1], axes[-1:])
    return found
