"""Updates of parameters and optimizer state in host memory, one parameter at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from atlas_jax import optim
from atlas_jax.sharding import fetch, put_back

Changed = tuple[Any, Any]
"""New parameters and new optimizer state."""


def by_leaf(
    transform: optax.GradientTransformationExtraArgs,
    grads: Any,
    state: Any,
    norm: jax.Array,
    key: jax.Array,
) -> Changed:
    """Returns the update of all parameters, with one parameter's state on the device at a time.

    XLA's scheduler would fetch all state before the forward pass, which takes more memory than no
    offload at all. Each parameter is therefore updated inside a `while_loop` that always runs
    exactly once. XLA cannot see the trip count, so it cannot move the transfers out of the loop,
    and it changes the host buffers in place.

    Args:
        transform: the optimizer, which treats each parameter separately given the global norm.
        grads: the gradients of the parameters.
        state: the `TrainState`.
        norm: the global norm of the gradients.
        key: the typed random key of this update.
    """
    leaves, structure = jax.tree.flatten(grads)
    numbers = jax.tree.unflatten(structure, range(len(leaves)))
    # Always 1, but computed from data, so that XLA cannot replace the loop by its body.
    once = jnp.minimum(state.step + 1, 1)

    def change(number: int) -> Changed:
        # The optimizer sees the tree of one parameter; optax skips masked nodes.
        def keep(x: Any, own: int) -> Any:
            return x if own == number else optax.MaskedNode()

        grad, params = (jax.tree.map(keep, tree, numbers) for tree in (grads, state.params))
        opt_state = optax.tree_map_params(
            transform, keep, state.opt_state, numbers, is_leaf=optim.is_masked
        )
        # The same key that `optim.apply_updates` uses for this parameter: offload changes no value.
        own_key = jax.random.fold_in(key, number)
        return _one(transform, grad, params, opt_state, (norm, once, own_key))

    def merge(*leaves: Any) -> Any:
        found = (x for x in leaves if not optim.is_masked(x))
        return next(found, optax.MaskedNode())  # of a parameter that this part does not treat

    parts = [change(number) for number in range(len(leaves))]
    return jax.tree.map(merge, *parts, is_leaf=optim.is_masked)


def _one(
    transform: optax.GradientTransformationExtraArgs,
    grads: Any,
    params: Any,
    opt_state: Any,
    shared: tuple[jax.Array, jax.Array, jax.Array],
) -> Changed:
    norm, once, key = shared

    def body(carry: Any) -> Any:
        count, held = carry
        params, opt_state = jax.tree.map(fetch, held)
        updates, opt_state = transform.update(grads, opt_state, params, norm=norm)
        added = jax.tree.map(lambda p, u: optim.add_update(p, u, key), params, updates)
        changed = added, opt_state
        return count + 1, jax.tree.map(put_back, changed, held)

    start = jnp.int32(0), (params, opt_state)
    return jax.lax.while_loop(lambda carry: carry[0] < once, body, start)[1]
