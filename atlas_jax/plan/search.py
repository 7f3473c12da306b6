"""Changes of a config that make it fit, the cheapest first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from atlas_jax.options.train import TrainConfig, batch_plan
from atlas_jax.plan.report import Plan


class Found(NamedTuple):
    """A config that was tried."""

    changes: str
    plan: Plan


def nearest(
    config: TrainConfig, num_replicas: int, attempt: Callable[[TrainConfig], Plan]
) -> Iterator[Found]:
    """Yields what was tried, each change on top of those before, until one fits.

    Args:
        config: that does not fit.
        num_replicas: parts that its rows are split in.
        attempt: makes the plan of a config.
    """
    said: list[str] = []
    for text, changed in _changes(config, num_replicas):
        said.append(text)
        config = dataclasses.replace(config, **changed)
        plan = attempt(config)
        yield Found(" ".join(said), plan)
        if plan.fits:
            return


def _changes(config: TrainConfig, num_replicas: int) -> Iterator[tuple[str, dict[str, Any]]]:
    batch = batch_plan(config, num_replicas)
    if config.gradient_checkpointing != "full":
        yield "gradient_checkpointing=full", {"gradient_checkpointing": "full"}
    if batch.device_rows > 1:
        steps = batch.global_rows // num_replicas
        yield (
            f"per_device_train_batch_size=1 gradient_accumulation_steps={steps}",
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps},
        )
    offloads = [] if config.offload == "none" else config.offload.split(",")
    possible = ["optimizer", "activations"]
    if config.has_reference and not config.model.lora.rank:  # LoRA has no second copy
        possible.insert(1, "reference")
    if not config.generates_locally:  # then `TrainConfig.check` refuses it
        possible.append("params")
    for part in possible:
        if part not in offloads:
            offloads.append(part)
            value = ",".join(offloads)
            yield f"offload={value}", {"offload": value}
    if config.loss_chunk_size > 256:
        yield "loss_chunk_size=256", {"loss_chunk_size": 256}
