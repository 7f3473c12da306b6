"""The training step: gradients over microbatches and one update, in one compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from atlas_jax import optim
from atlas_jax.optim import is_masked
from atlas_jax.sharding import Sharding, fetch, in_host, platform
from atlas_jax.types import Array, LossSum, Metrics, Params

LossFn = Callable[[Params, Any], tuple[LossSum, Metrics]]
"""A loss: `(params, one microbatch) -> ((sum, weight), metrics)`."""


class TrainState(NamedTuple):
    """The arrays that a step changes and a checkpoint stores, and those that stay."""

    step: Array  # [] int32, completed updates
    params: Params  # those that are trained
    opt_state: optax.OptState
    frozen: Params | None = None
    """Parameters that no step changes and no checkpoint stores: what LoRA adapts, and under the key
    `teacher` another model. None if all are trained."""

    @property
    def whole(self) -> Params:
        """All parameters, as losses and the functions of the model take them."""
        return joined(self.frozen, self.params)


def joined(frozen: Params | None, trained: Params) -> Params:
    """Returns one tree with the leaves of both."""
    if frozen is None:
        return trained
    both = frozen | trained
    for name in frozen.keys() & trained.keys():
        both[name] = joined(frozen[name], trained[name])
    return both


class Frozen(NamedTuple):
    """Arrays that each microbatch reads whole and no step changes; they are not given away."""

    params: Params
    step: Array  # [] int32, the number of the update, for random numbers
    part: Array  # [] int32, the number of the microbatch


def _first(batch: Any) -> Any:
    """Returns the first microbatch."""
    return jax.tree.map(lambda x: x[0], batch)


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
        lambda own, place: own if is_masked(own) else place,
        state,
        places,
        transform_non_params=lambda _: sharding.replicated,
        is_leaf=is_masked,
    )
    return Optimizer(
        transform=optax.with_extra_args_support(transform),
        learning_rate=learning_rate,
        shapes=state,
        placement=placement,
    )


def init_state(
    params: Params, optimizer: Optimizer, sharding: Sharding, frozen: Params | None = None
) -> TrainState:
    """Returns the state of step 0 with `params`; optimizer moments are created on the mesh."""
    return TrainState(
        step=jax.device_put(jnp.int32(0), sharding.replicated),
        params=params,
        opt_state=jax.jit(optimizer.transform.init, out_shardings=optimizer.placement)(params),
        frozen=frozen,
    )


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

    whole: Callable[[TrainState, Any, Frozen | None], tuple[TrainState, Metrics]]
    """The step on a state and a batch `[microbatches, B, T]`; consumes the state."""
    begin: Callable[[Params, Any, Frozen | None], GradientSums]
    """Sums of 0 for parameters and batches like these."""
    add: Callable[[Params, GradientSums, Any, Frozen | None], GradientSums]
    """The sums of parameters, sums and a batch `[1, B, T]`; consumes the sums before."""
    update: Callable[[TrainState, GradientSums], tuple[TrainState, Metrics]]
    """The state after an update with the sums; consumes the state before."""

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Returns the state after a step and its metrics; consumes the state before.

        Args:
            state: the state.
            batch: the batch `[microbatches, B, T]`, or a list of batches `[1, B, T]`, with which
                one update is made.
        """
        frozen = state.frozen
        state = state._replace(frozen=None)
        state, metrics = self._step(state, batch, frozen)
        return state._replace(frozen=frozen), metrics

    def _step(
        self, state: TrainState, batch: Any, frozen: Params | None
    ) -> tuple[TrainState, Metrics]:
        def rest(step: Any, part: int = 0) -> Frozen | None:
            return None if frozen is None else Frozen(frozen, step, np.int32(part))

        if not isinstance(batch, list):
            # The state is given away, and has the step in it.
            return self.whole(state, batch, rest(np.int32(0)))
        sums = self.begin(state.params, batch[0], rest(state.step))
        for number, part in enumerate(batch):
            sums = self.add(state.params, sums, part, rest(state.step, number))
        return self.update(state, sums)


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """Gradients of a loss sum and its metrics, and their sums over microbatches."""

    loss_fn: LossFn
    dims: Params
    sharding: Sharding
    dropout_seed: int | None

    def sums(self, params: Params, batch: Any, frozen: Frozen | None) -> GradientSums:
        """Returns the sums over the leading dim of `batch`."""
        count = batch.tokens.shape[0]
        if count == 1:  # no accumulator, which would take memory
            return self.of(params, _first(batch), frozen)

        def add(sums: GradientSums, part: tuple[Any, Any]) -> tuple[GradientSums, None]:
            rows, number = part
            rest = frozen and frozen._replace(part=number)
            return self.add(params, sums, rows, rest), None

        numbers = frozen and jnp.arange(count, dtype=jnp.int32)
        return jax.lax.scan(add, self.zeros(params, _first(batch), frozen), (batch, numbers))[0]

    def of(self, params: Params, batch: Any, frozen: Frozen | None) -> GradientSums:
        """Returns gradients and metrics of one microbatch `[B, T]`."""
        grads, metrics = jax.grad(self._loss, has_aux=True)(params, batch, frozen)
        return GradientSums(_scatter(grads, self.dims, self.sharding), metrics)

    def zeros(self, params: Params, batch: Any, frozen: Frozen | None) -> GradientSums:
        """Returns sums of nothing for microbatches like this."""
        shapes = jax.eval_shape(self.of, params, batch, frozen)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        if platform(self.sharding.mesh) == "cpu":
            return zeros
        return zeros._replace(grads=_scatter(zeros.grads, self.dims, self.sharding))

    def add(
        self, params: Params, sums: GradientSums, batch: Any, frozen: Frozen | None
    ) -> GradientSums:
        """Returns the sums with those of one microbatch `[B, T]`.

        The backward pass adds each layer's gradient to its part of the sum, so there is no second
        tree of gradients. It can do so where a parameter has the sum's dtype and memory. A CPU adds
        whole trees: its memory is not the limit, and results keep their last bits.
        """
        leaves = jax.tree.leaves(params)
        apart = any(x.dtype != jnp.float32 or in_host(x) for x in leaves)
        if apart or platform(self.sharding.mesh) == "cpu":
            return jax.tree.map(jnp.add, sums, self.of(params, batch, frozen))
        total, pull_back, metrics = jax.vjp(
            lambda params: self._loss(params, batch, frozen), params, has_aux=True
        )
        refs = jax.tree.map(jax.new_ref, sums.grads)
        pull_back.with_refs(refs)(jnp.ones_like(total))  # type: ignore[attr-defined]
        grads = _scatter(jax.tree.map(jax.freeze, refs), self.dims, self.sharding)
        return GradientSums(grads, jax.tree.map(jnp.add, sums.metrics, metrics))

    def _loss(self, params: Params, batch: Any, frozen: Frozen | None) -> tuple[jax.Array, Metrics]:
        if frozen is not None:
            params = joined(frozen.params, params)
            if self.dropout_seed is not None:
                key = jax.random.fold_in(jax.random.key(self.dropout_seed), frozen.step)
                params |= {"dropout": jax.random.fold_in(key, frozen.part)}
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
    dropout: bool = False,
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
        dropout: whether inputs of factors drop out. The random numbers depend on the seed, the
            update and the microbatch.
        num_parts: number of equal parts of a batch's microbatches, each of which is the batch of
            one update in turn; divides `num_updates`.
    """
    gradients = _Gradients(
        loss_fn=loss_fn, dims=dims, sharding=sharding, dropout_seed=seed if dropout else None
    )

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
        return TrainState(step=state.step, params=params, opt_state=opt_state), metrics

    def update(
        state: TrainState, batch: Any, frozen: Frozen | None, number: Any
    ) -> tuple[TrainState, Metrics]:
        part = _part(batch, number % num_parts, num_parts)
        rest = frozen and frozen._replace(step=state.step * num_updates + number)
        return changed(state, gradients.sums(state.params, part, rest), number)

    placements = _state_places(optimizer, dims, sharding)
    # The state is donated: parameters and moments are updated in their own buffers. Without equal
    # shardings of input and output XLA could not reuse them.
    whole = jax.jit(
        _step(update, num_updates),
        donate_argnums=0,
        in_shardings=(placements, None, None),
        out_shardings=(placements, None),
    )
    begin, add, finish = _in_parts(gradients, changed, placements)
    return TrainStep(whole=whole, begin=begin, add=add, update=finish)


def _step(
    update: Callable[[TrainState, Any, Frozen | None, Any], tuple[TrainState, Metrics]],
    num_updates: int,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns a step of so many updates, with the sums of their metrics."""

    def step(state: TrainState, batch: Any, frozen: Frozen | None) -> tuple[TrainState, Metrics]:
        state, metrics = update(state, batch, frozen, 0)
        # Scanned, so that compile time does not grow with the number of updates.
        if num_updates > 1:
            state, more = jax.lax.scan(
                lambda state, number: update(state, batch, frozen, number),
                state,
                jnp.arange(1, num_updates),
            )
            metrics = jax.tree.map(lambda first, rest: first + rest.sum(), metrics, more)
        return state._replace(step=state.step + 1), metrics

    return step


def _state_places(optimizer: Optimizer, dims: Params, sharding: Sharding) -> TrainState:
    """Returns the placement of the arrays of a state."""
    params = jax.tree.map(
        lambda d: sharding.params(d), dims, is_leaf=lambda d: isinstance(d, tuple)
    )
    return TrainState(step=sharding.replicated, params=params, opt_state=optimizer.placement)


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

    def begin(params: Params, batch: Any, frozen: Frozen | None) -> GradientSums:
        return gradients.zeros(params, _first(batch), frozen)

    def add(params: Params, sums: GradientSums, batch: Any, frozen: Frozen | None) -> GradientSums:
        return gradients.add(params, sums, _first(batch), frozen)

    def update(state: TrainState, sums: GradientSums) -> tuple[TrainState, Metrics]:
        state, metrics = changed(state, sums, 0)
        return state._replace(step=state.step + 1), metrics

    return (
        jax.jit(begin, in_shardings=(placements.params, None, None), out_shardings=sums),
        jax.jit(
            add,
            donate_argnums=1,
            in_shardings=(placements.params, sums, None, None),
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
        def one(rows: Any) -> Metrics:
            loss, metrics = loss_fn(params, rows)
            return metrics | {"loss/total": loss}

        return jax.tree.map(jnp.sum, jax.lax.map(one, batch))

    return jax.jit(step)
