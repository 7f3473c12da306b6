"""The training step: gradients over microbatches and one update, in one compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from atlas_jax import optim
from atlas_jax.sharding import Sharding, fetch, in_host, platform
from atlas_jax.types import Array, LossSum, Metrics, Params

LossFn = Callable[[Params, Any], tuple[LossSum, Metrics]]
"""A loss: `(params, one microbatch) -> ((sum, weight), metrics)`."""


class TrainState(NamedTuple):
    """The arrays that a step changes and a checkpoint stores."""

    step: Array  # [] int32, completed updates
    params: Params
    opt_state: optax.OptState


class Optimizer(NamedTuple):
    """An optax transformation, its schedule, and the placement of its state."""

    transform: optax.GradientTransformationExtraArgs
    learning_rate: optax.Schedule
    shapes: Any  # tree of jax.ShapeDtypeStruct
    placement: Any  # tree of NamedSharding


def place_optimizer(
    transform: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    shapes: Params,
    dims: Params,
    sharding: Sharding,
) -> Optimizer:
    """Returns the optimizer with a placement on the mesh for each array of its state."""
    state = jax.eval_shape(transform.init, shapes)
    places = jax.tree.map(lambda _, d: sharding.optimizer(d), shapes, dims)
    placement = optax.tree_map_params(
        transform,
        lambda _, place: place,
        state,
        places,
        transform_non_params=lambda _: sharding.replicated,
    )
    return Optimizer(
        transform=optax.with_extra_args_support(transform),
        learning_rate=learning_rate,
        shapes=state,
        placement=placement,
    )


def init_state(params: Params, optimizer: Optimizer, sharding: Sharding) -> TrainState:
    """Returns the state of step 0 with `params`; optimizer moments are created on the mesh."""
    opt_state = jax.jit(optimizer.transform.init, out_shardings=optimizer.placement)(params)
    return TrainState(jax.device_put(jnp.int32(0), sharding.replicated), params, opt_state)


def abstract(shapes: Any, placements: Any) -> Any:
    """Returns abstract arrays of these shapes and placements, to restore a checkpoint into."""
    return jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placements
    )


def abstract_state(
    shapes: Params, placements: Params, optimizer: Optimizer, sharding: Sharding
) -> TrainState:
    """Returns the shapes, dtypes and placements of a `TrainState`."""
    everywhere = sharding.replicated
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        params=abstract(shapes, placements),
        opt_state=abstract(optimizer.shapes, optimizer.placement),
    )


def abstract_gradients(shapes: Params, dims: Params, sharding: Sharding) -> Params:
    """Returns the shapes, dtypes and placements of accumulated gradients."""
    return jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=p),
        shapes,
        _gradient_places(dims, sharding),
    )


def _gradient_places(dims: Params, sharding: Sharding) -> Any:
    return jax.tree.map(
        lambda d: sharding.optimizer(d, memory=False), dims, is_leaf=lambda d: isinstance(d, tuple)
    )


class GradientSums(NamedTuple):
    """Sums over the microbatches that a step has done."""

    grads: Params  # float32, placed as the optimizer state
    metrics: Metrics


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The compiled programs of a step.

    A batch whose microbatches have one shape is one program. Where each has a shape of its own, as
    sorted rows do, each shape has a program that adds to the sums, and another one updates.
    """

    whole: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    """The step on a batch `[microbatches, B, T]`; consumes the state."""
    begin: Callable[[Params, Any], GradientSums]
    """Sums of 0 for batches like this one."""
    add: Callable[[Params, GradientSums, Any], GradientSums]
    """The sums with those of a batch `[1, B, T]`; consumes the sums before."""
    update: Callable[[TrainState, GradientSums], tuple[TrainState, Metrics]]
    """The state after an update with the sums; consumes the state before."""

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Returns the state after a step and its metrics; consumes the state before.

        Args:
            state: the state.
            batch: the batch `[microbatches, B, T]`, or a list of batches `[1, B, T]`, with which
                one update is made.
        """
        if not isinstance(batch, list):
            return self.whole(state, batch)
        sums = self.begin(state.params, batch[0])
        for part in batch:
            sums = self.add(state.params, sums, part)
        return self.update(state, sums)


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """Gradients of a loss sum and its metrics, and their sums over microbatches."""

    loss_fn: LossFn
    dims: Params
    sharding: Sharding

    def sums(self, params: Params, batch: Any) -> GradientSums:
        """Returns the sums over the leading dim of `batch`."""
        first = jax.tree.map(lambda x: x[0], batch)
        if batch.tokens.shape[0] == 1:  # no accumulator, which would take memory
            return self.of(params, first)

        def add(sums: GradientSums, rows: Any) -> tuple[GradientSums, None]:
            return self.add(params, sums, rows), None

        return jax.lax.scan(add, self.zeros(params, first), batch)[0]

    def of(self, params: Params, batch: Any) -> GradientSums:
        """Returns gradients and metrics of one microbatch `[B, T]`."""
        grads, metrics = jax.grad(self._loss, has_aux=True)(params, batch)
        return GradientSums(_scatter(grads, self.dims, self.sharding), metrics)

    def zeros(self, params: Params, batch: Any) -> GradientSums:
        """Returns sums of nothing for microbatches like this."""
        shapes = jax.eval_shape(self.of, params, batch)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        if platform(self.sharding.mesh) == "cpu":
            return zeros
        return zeros._replace(grads=_scatter(zeros.grads, self.dims, self.sharding))

    def add(self, params: Params, sums: GradientSums, batch: Any) -> GradientSums:
        """Returns the sums with those of one microbatch `[B, T]`.

        The backward pass adds each layer's gradient to its part of the sum, so there is no second
        tree of gradients. It can do so where a parameter has the sum's dtype and memory. A CPU adds
        whole trees: its memory is not the limit, and results keep their last bits.
        """
        leaves = jax.tree.leaves(params)
        apart = any(x.dtype != jnp.float32 or in_host(x) for x in leaves)
        if apart or platform(self.sharding.mesh) == "cpu":
            return jax.tree.map(jnp.add, sums, self.of(params, batch))
        total, pull_back, metrics = jax.vjp(
            lambda params: self._loss(params, batch), params, has_aux=True
        )
        refs = jax.tree.map(jax.new_ref, sums.grads)
        pull_back.with_refs(refs)(jnp.ones_like(total))  # type: ignore[attr-defined]
        grads = _scatter(jax.tree.map(jax.freeze, refs), self.dims, self.sharding)
        return GradientSums(grads, jax.tree.map(jnp.add, sums.metrics, metrics))

    def _loss(self, params: Params, batch: Any) -> tuple[jax.Array, Metrics]:
        (total, weight), metrics = self.loss_fn(params, batch)
        return total, metrics | {"loss/total": (total, weight)}


def _scatter(grads: Params, dims: Params, sharding: Sharding) -> Params:
    """Returns the gradients in float32, reduce-scattered as the optimizer state is split.

    This is done in every microbatch, so that no device holds the whole accumulator.
    """

    def scatter(gradient: jax.Array, names: Any) -> jax.Array:
        placement = sharding.optimizer(names, memory=False)
        return jax.lax.with_sharding_constraint(fetch(gradient).astype(jnp.float32), placement)

    return jax.tree.map(scatter, grads, dims)


def make_train_step(
    loss_fn: LossFn,
    optimizer: Optimizer,
    dims: Params,
    sharding: Sharding,
    num_updates: int = 1,
    seed: int = 0,
    num_parts: int = 1,
) -> TrainStep:
    """Returns the compiled `(state, batch) -> (state, metrics)`, which consumes the state.

    The batch is `[microbatches, B, T]` (`sharding.to_global`), or a list of such, see `TrainStep`.
    Gradients of the microbatches' loss sums are accumulated in float32, sharded as the optimizer
    state is, and divided once by the sum of the weights.

    Args:
        loss_fn: the loss sum of one microbatch, its weight, and metrics.
        optimizer: from `place_optimizer`.
        dims: names of the parameters' dims.
        sharding: placement of all arrays.
        num_updates: number of updates on each batch, over which metrics are summed.
        seed: seed of the random numbers that round bfloat16 parameters. The numbers of an update
            depend on the seed and the update's index only, so a resumed run draws the same.
        num_parts: number of equal parts of a batch's microbatches, each of which is the batch of
            one update in turn; divides `num_updates`.
    """
    gradients = _Gradients(loss_fn, dims, sharding)

    def changed(state: TrainState, sums: Any, number: Any) -> tuple[TrainState, Metrics]:
        grads, metrics = sums
        # The weight is global: it is summed over devices by GSPMD and over microbatches by
        # `_Gradients`. A batch without trained tokens has gradients of 0, not 0 / 0.
        weight = jnp.maximum(metrics["loss/total"][1], 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        # The norm is taken before any parameter changes, because `offload` sees one
        # parameter at a time.
        norm = optax.tree.norm(grads)
        count = state.step * num_updates + number
        key = jax.random.fold_in(jax.random.key(seed), count)
        params, opt_state = _changed(optimizer.transform, grads, state, norm, key)
        metrics |= {
            "optim/grad_norm": (norm, jnp.float32(1)),
            "optim/learning_rate": (optimizer.learning_rate(count), jnp.float32(1)),
        }
        return TrainState(state.step, params, opt_state), metrics

    def update(state: TrainState, batch: Any, number: Any) -> tuple[TrainState, Metrics]:
        part = _part(batch, number % num_parts, num_parts)
        return changed(state, gradients.sums(state.params, part), number)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        state, metrics = update(state, batch, 0)
        # Scanned, so that compile time does not grow with the number of updates.
        if num_updates > 1:
            state, more = jax.lax.scan(
                lambda state, number: update(state, batch, number),
                state,
                jnp.arange(1, num_updates),
            )
            metrics = jax.tree.map(lambda first, rest: first + rest.sum(), metrics, more)
        return state._replace(step=state.step + 1), metrics

    placements = TrainState(
        sharding.replicated,
        jax.tree.map(lambda d: sharding.params(d), dims, is_leaf=lambda d: isinstance(d, tuple)),
        optimizer.placement,
    )
    # The state is donated: parameters and moments are updated in their own buffers. Without equal
    # shardings of input and output XLA could not reuse them.
    whole = jax.jit(
        step, donate_argnums=0, in_shardings=(placements, None), out_shardings=(placements, None)
    )
    return TrainStep(whole, *_in_parts(gradients, changed, placements))


def _part(batch: Any, number: Any, num_parts: int) -> Any:
    """Returns one of equal parts of the microbatches: every `num_parts`-th one.

    Neighbouring rows are on one device, so that the parts do not depend on the number of devices.
    """
    if num_parts == 1:
        return batch

    def take(x: jax.Array) -> jax.Array:
        apart = x.reshape(-1, num_parts, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(apart, number, axis=1, keepdims=False)

    return jax.tree.map(take, batch)


def _in_parts(
    gradients: _Gradients,
    changed: Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]],
    placements: TrainState,
) -> tuple[Any, Any, Any]:
    """Returns the programs `begin`, `add` and `update` of a `TrainStep`."""
    places = _gradient_places(gradients.dims, gradients.sharding)
    sums = GradientSums(places, metrics=None)  # type: ignore[arg-type]

    def first(batch: Any) -> Any:
        return jax.tree.map(lambda x: x[0], batch)

    def begin(params: Params, batch: Any) -> GradientSums:
        return gradients.zeros(params, first(batch))

    def add(params: Params, sums: GradientSums, batch: Any) -> GradientSums:
        return gradients.add(params, sums, first(batch))

    def update(state: TrainState, sums: GradientSums) -> tuple[TrainState, Metrics]:
        state, metrics = changed(state, sums, 0)
        return state._replace(step=state.step + 1), metrics

    return (
        jax.jit(begin, in_shardings=(placements.params, None), out_shardings=sums),
        jax.jit(
            add,
            donate_argnums=1,
            in_shardings=(placements.params, sums, None),
            out_shardings=sums,
        ),
        jax.jit(
            update,
            donate_argnums=0,
            in_shardings=(placements, sums),
            out_shardings=(placements, None),
        ),
    )


def _changed(
    transform: optax.GradientTransformationExtraArgs,
    grads: Params,
    state: TrainState,
    norm: jax.Array,
    key: jax.Array,
) -> tuple[Params, optax.OptState]:
    """Returns the updated parameters and optimizer state, wherever those rest between steps."""
    if any(in_host(x) for x in jax.tree.leaves(state)):
        from atlas_jax import offload  # only the option `offload` needs it

        return offload.by_leaf(transform, grads, state, norm, key)
    updates, opt_state = transform.update(grads, state.opt_state, state.params, norm=norm)
    return optim.apply_updates(state.params, updates, key), opt_state


def make_eval_step(loss_fn: LossFn) -> Callable[[Params, Any], Metrics]:
    """Returns the compiled `(params, batch [microbatches, B, T]) -> metrics`."""

    def step(params: Params, batch: Any) -> Metrics:
        def one(batch: Any) -> Metrics:
            loss, metrics = loss_fn(params, batch)
            return metrics | {"loss/total": loss}

        return jax.tree.map(jnp.sum, jax.lax.map(one, batch))

    return jax.jit(step)
