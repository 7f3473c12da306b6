"""A config on devices: its mesh, decoders, optimizer and training step, with arrays or without.

Runs, the plan for devices that are not there, benchmarks and tests build their programs with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from atlas_jax import optim, step
from atlas_jax.models import attention
from atlas_jax.models.config import ModelConfig
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.train import BatchPlan, TrainConfig, batch_plan
from atlas_jax.sharding import Sharding, make_mesh, platform
from atlas_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Compute:
    """The way in which a config is computed on devices; it holds no parameters."""

    config: TrainConfig
    sharding: Sharding

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        devices: Sequence[jax.Device] | None = None,
        kind: type[Sharding] = Sharding,
    ) -> Compute:
        """Returns the computation on a mesh over the devices.

        Args:
            config: options of the mesh, the model, the optimizer and the batch.
            devices: devices of the mesh; None takes all.
            kind: class of the sharding; the plan has its own, for devices that are not there.

        Raises:
            ValueError: if the mesh does not fit the devices.
        """
        mesh = make_mesh(config.mesh, None if devices is None else list(devices))
        return cls(config, kind(mesh, config.sharding, config.offload))

    @property
    def plan(self) -> BatchPlan:
        """The rows of a step, divided over microbatches and devices.

        Raises:
            ValueError: if the batch sizes contradict each other or do not divide over the devices.
        """
        return batch_plan(self.config, self.sharding.num_replicas)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations that `model.compute_dtype` means on these devices."""
        on_cpu = platform(self.sharding.mesh) == "cpu"
        wanted = self.config.model.compute_dtype
        return jnp.dtype(("float32" if on_cpu else "bfloat16") if wanted == "auto" else wanted)

    def packs(self, architecture: ModelConfig) -> bool:
        """Returns whether rows hold several examples, which `packing=auto` leaves to the devices.

        Raises:
            ValueError: for attention that the devices do not have.
        """
        packing = self.config.packing
        if packing != "auto":
            return packing
        packed = self._attention(architecture, packed=True)
        return self.config.may_pack and attention.skips_segments(packed)

    def decoder(self, architecture: ModelConfig) -> Decoder:
        """Returns the decoder of the model that is trained.

        Raises:
            ValueError: for attention that the devices do not have, or parameters that do not divide
                over them.
        """
        dtype = jnp.dtype(self.config.model.param_dtype)
        options = self.config.model.lora
        if not options.rank:
            return self._decoder(architecture, self.sharding, dtype)
        from atlas_jax.checkpoint import adapters  # most runs train whole models

        decoder = self._decoder(architecture, self.sharding, self.dtype)
        decoder = dataclasses.replace(decoder, lora=adapters.factors(options, architecture, dtype))
        _ = decoder.trained  # raises for factors that do not divide
        return decoder

    def frozen_decoder(self, architecture: ModelConfig) -> Decoder:
        """Returns the decoder of a model that is not trained; raises as `decoder` does.

        Its parameters rest in the compute dtype and on the devices: generation would fetch what
        rests in host memory again for every token.
        """
        sharding = dataclasses.replace(self.sharding, offload="none")
        return self._decoder(architecture, sharding, self.dtype)

    def _decoder(
        self, architecture: ModelConfig, sharding: Sharding, param_dtype: jnp.dtype
    ) -> Decoder:
        config = self.config
        dtype = self.dtype
        # For float32 operands JAX's default is TF32 on NVIDIA GPUs and one bfloat16 pass on TPUs.
        precision = "highest" if dtype == jnp.float32 else None
        jax.config.update("jax_default_matmul_precision", precision)
        decoder = Decoder(
            architecture,
            sharding,
            self._attention(architecture, self.packs(architecture)),
            param_dtype=param_dtype,
            compute_dtype=dtype,
            gradient_dtype=jnp.promote_types(dtype, config.model.gradient_dtype),
            remat=config.gradient_checkpointing,
        )
        decoder.placements()  # raises for parameters that do not divide
        return decoder

    def _attention(self, architecture: ModelConfig, packed: bool) -> attention.AttentionFn:
        return attention.select(
            self.config.attn_implementation,
            self.sharding.mesh,
            packed,
            self.dtype,
            architecture.head_dim,
            architecture.window,
        )

    def optimizer(self, decoder: Decoder, num_steps: int) -> step.Optimizer:
        """Returns the optimizer with the schedule of a run of so many steps, by update."""
        learning_rate = optim.schedule(self.config, num_steps * self.config.updates_per_step)
        trained = decoder.trained
        transform = optim.make(self.config, learning_rate, trained.dims)
        return step.place_optimizer(
            transform, learning_rate, trained.shapes, trained.dims, decoder.sharding
        )

    def train_step(
        self,
        loss: step.LossFn,
        decoder: Decoder,
        optimizer: step.Optimizer,
    ) -> step.TrainStep:
        """Returns the compiled step, see `step.make_train_step`."""
        return step.make_train_step(
            loss,
            optimizer,
            decoder.trained.dims,
            decoder.sharding,
            num_updates=self.config.updates_per_step,
            seed=self.config.seed,
            dropout=decoder.lora is not None and decoder.lora.dropout > 0,
            num_parts=self.config.updates_per_pass,
        )

    def state(
        self, params: Params, optimizer: step.Optimizer, frozen: Params | None = None
    ) -> step.TrainState:
        """Returns the state of step 0 around parameters that are trained, and others."""
        return step.init_state(params, optimizer, self.sharding, frozen)

    def abstract_state(self, decoder: Decoder, optimizer: step.Optimizer) -> step.TrainState:
        """Returns the shapes, dtypes and places of a state."""
        trained = decoder.trained
        return step.abstract_state(trained.shapes, trained.placements, optimizer, decoder.sharding)
