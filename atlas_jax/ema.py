"""An exponential moving average of the weights, kept in the optimizer's state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from atlas_jax.types import Params


class WeightAverage(NamedTuple):
    """State of `weight_average`."""

    average: Params  # float32, placed as the other parts of the optimizer's state


def weight_average(decay: float) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that keeps the exponential moving average of the parameters.

    After each update it is `decay * average + (1 - decay) * (params + updates)`, beginning with the
    first parameters (arXiv:1806.09594, section 3.2). It changes no update, and comes last in a
    chain. Parameters in bfloat16 enter it before they are rounded.
    """

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        def moved(average: jax.Array, param: jax.Array, step: jax.Array) -> jax.Array:
            return decay * average + (1 - decay) * (param + step)

        return updates, WeightAverage(jax.tree.map(moved, state.average, params, updates))

    return optax.GradientTransformationExtraArgs(WeightAverage, update)


def averaged(opt_state: optax.OptState) -> Params:
    """Returns the average of the weights in an optimizer's state, which must have one."""

    def is_average(state: Any) -> bool:
        return isinstance(state, WeightAverage)

    leaves = jax.tree.leaves(opt_state, is_leaf=is_average)
    [found] = filter(is_average, leaves)
    return found.average
