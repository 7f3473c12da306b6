"""Learning-rate schedules and the AdamW chain."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from atlas_jax.config import TrainConfig
from atlas_jax.types import Params


def schedule(config: TrainConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate by step: a linear rise over the warm-up, then the decay.

    As in transformers' `get_scheduler`, step s of the warm-up has `s / warmup` of the peak, so the
    first step has 0, and `linear` and `cosine` reach 0 at `num_steps`.
    """
    warmup = round(config.warmup_ratio * num_steps)
    peak, rest = config.learning_rate, max(num_steps - warmup, 1)
    decay = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.lr_scheduler_type]
    rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
    return optax.join_schedules([rise, decay], [warmup])


def adamw(config: TrainConfig, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Returns clipping by global norm, then AdamW (arXiv:1711.05101) with decay for matrices."""
    clip = clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else None
    update = optax.adamw(
        learning_rate,
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        mask=is_matrix,
        mu_dtype=None if config.adam_mu_dtype == "auto" else config.adam_mu_dtype,
    )
    return optax.chain(clip, update) if clip else update


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Returns `optax.clip_by_global_norm` that takes the norm, so that it may see a part alone."""

    def update(updates: Any, state: Any, params: Any = None, *, norm: Any = None, **_: Any) -> Any:
        del params
        norm = optax.tree.norm(updates) if norm is None else norm

        def clip(x: jax.Array) -> jax.Array:
            return jnp.where(norm < max_norm, x, x / norm.astype(x.dtype) * max_norm)

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def is_matrix(params: Params) -> Params:
    """Returns a tree that is true for kernels and embedding tables, false for norms and biases."""

    def decays(path: tuple[jax.tree_util.DictKey, ...], _: Any) -> bool:
        return path[-1].key in ("kernel", "embed", "head")

    return jax.tree.map_with_path(decays, params)
