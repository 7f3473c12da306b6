"""Learning-rate schedules, optimizers, and the addition of their updates to the parameters.

The arithmetic is float32 for parameters of any dtype: in bfloat16 the second moment would never
decay (0.999 rounds to 1). Most updates are smaller than half the distance between two neighbouring
bfloat16 values, so rounding to the nearest would undo them. Parameters in bfloat16 are therefore
rounded stochastically.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from atlas_jax.options.train import TrainConfig
from atlas_jax.types import Params


def schedule(config: TrainConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate by step: a linear rise over the warm-up, then the decay.

    As in transformers' `get_scheduler`, step s of the warm-up has `s / warmup` of the peak, so the
    first step has a rate of 0. What falls reaches `min_lr_ratio` of the peak at `num_steps`. `wsd`
    is arXiv:2404.06395, section 4.2, with transformers' decay by half a cosine.
    """
    peak = config.learning_rate
    floor = config.min_lr_ratio
    warmup = round(config.warmup_ratio * num_steps)
    rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
    kind = config.lr_scheduler_type
    if kind == "wsd":
        falling = max(round(config.lr_decay_ratio * num_steps), 1)
        fall = optax.cosine_decay_schedule(peak, falling, floor)
        top = optax.constant_schedule(peak)
        return optax.join_schedules([rise, top, fall], [warmup, max(num_steps - falling, warmup)])
    remaining = max(num_steps - warmup, 1)
    decay = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, floor * peak, remaining),
        "cosine": optax.cosine_decay_schedule(peak, remaining, floor),
    }[kind]
    return optax.join_schedules([rise, decay], [warmup])


def make(
    config: TrainConfig, learning_rate: optax.Schedule, dims: Params
) -> optax.GradientTransformation:
    """Returns clipping by global norm, the optimizer, and the average of the weights if chosen.

    Args:
        config: options of the optimizer.
        learning_rate: by update.
        dims: names of the parameters' dims.
    """
    parts: list[optax.GradientTransformation] = []
    if config.max_grad_norm:
        parts.append(clip_by_global_norm(config.max_grad_norm))
    if config.optim == "muon":
        parts.append(muon(config, learning_rate, dims))
    else:
        parts.append(adamw(config, learning_rate))
    if config.ema_decay:
        from atlas_jax import ema  # only this option keeps an average

        parts.append(ema.weight_average(config.ema_decay))
    return in_float32(optax.chain(*parts) if len(parts) > 1 else parts[0])


def adamw(config: TrainConfig, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Returns AdamW (arXiv:1711.05101) with weight decay of matrices only.

    The second moment is float32, the first one has `adam_mu_dtype`.
    """
    return optax.adamw(
        learning_rate,
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        mask=is_matrix,
        mu_dtype=_mu_dtype(config),
    )


def muon(
    config: TrainConfig, learning_rate: optax.Schedule, dims: Params
) -> optax.GradientTransformation:
    """Returns Muon for the matrices of layers and AdamW for the rest, with AdamW's weight decay."""
    from atlas_jax.muon import scale_by_muon  # AdamW's runs need none of it

    return optax.chain(
        scale_by_muon(config, _mu_dtype(config), dims),
        optax.add_decayed_weights(config.weight_decay, is_matrix),
        optax.scale_by_learning_rate(learning_rate),
    )


def _mu_dtype(config: TrainConfig) -> str:
    """Returns the dtype that `adam_mu_dtype` means."""
    return config.model.param_dtype if config.adam_mu_dtype == "auto" else config.adam_mu_dtype


def in_float32(
    transform: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns `transform` with float32 arithmetic and state for parameters of any dtype."""
    inner = optax.with_extra_args_support(transform)

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> Any:
        return inner.init(wide(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        # Weight decay is a product of parameters and learning rate, too small for bfloat16.
        wide_params = None if params is None else wide(params)
        return inner.update(wide(updates), state, wide_params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def apply_updates(params: Any, updates: Any, key: jax.Array) -> Any:
    """Returns `params + updates`, added in float32; bfloat16 parameters are rounded stochastically.

    Args:
        params: the parameters, a tree of arrays.
        updates: their updates, the same tree in float32.
        key: the typed random key of this update; float32 parameters do not use it.
    """
    leaves, structure = jax.tree.flatten(params)
    added = [
        add_update(param, update, jax.random.fold_in(key, number))
        for number, (param, update) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True))
    ]
    return jax.tree.unflatten(structure, added)


def add_update(param: jax.Array, update: jax.Array, key: jax.Array) -> jax.Array:
    """Returns one parameter plus its update, in the parameter's dtype; see `apply_updates`."""
    total = param.astype(jnp.float32) + update
    if param.dtype == jnp.bfloat16:
        return stochastic_round(total, key)
    return total.astype(param.dtype)


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Returns `x` in bfloat16, rounded up or down so that its expectation is `x`.

    The lower 16 bits of a float32, over 2**16, are the fraction at which `x` lies between two
    neighbouring bfloat16 values. A random number of 16 bits is added before these bits are cut
    off, so rounding away from zero has that fraction as its probability. Infinities and NaN are
    returned unchanged.

    Reference: Gupta et al., arXiv:1502.02551, section 3.

    Args:
        x: the float32 array.
        key: the typed random key.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Returns `optax.clip_by_global_norm` with the norm as an argument of `update`.

    It can therefore be applied to one parameter at a time (`offload.by_leaf`).
    """

    def update(updates: Any, state: Any, params: Any = None, *, norm: Any = None, **_: Any) -> Any:
        del params
        norm = optax.tree.norm(updates) if norm is None else norm

        def clip(x: jax.Array) -> jax.Array:
            return jnp.where(norm < max_norm, x, x / norm.astype(x.dtype) * max_norm)

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def is_masked(node: Any) -> bool:
    """Returns whether a node stands for a parameter that a part of an optimizer does not treat."""
    return isinstance(node, optax.MaskedNode)


def is_matrix(params: Params) -> Params:
    """Returns a tree that is true for kernels, factors and tables, false for norms and biases."""

    def decays(path: tuple[jax.tree_util.DictKey, ...], _: Any) -> bool:
        return path[-1].key in ("kernel", "embed", "head", "lora_a", "lora_b")

    return jax.tree.map_with_path(decays, params)
