"""Options of the model in memory, and of the devices and processes that hold it."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

from msgspec import Meta

from atlas_jax.options.fields import PositiveInt

AxisSize = Annotated[
    int, Meta(ge=-1, extra={"rule": "above 0, or -1 for all devices that are left"})
]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left."""

    data: AxisSize = 1
    """Number of replicas of the model. The rows of a batch are split over them."""
    fsdp: AxisSize = -1
    """Number of parts that parameters, gradients and optimizer state are split into. The rows of a
    batch are split over them too."""
    tensor: AxisSize = 1
    """Number of parts that attention heads, hidden units and the vocabulary are split into."""

    def check(self) -> None:
        """Checks the sizes together.

        Raises:
            ValueError: names the sizes.
        """
        sizes = (self.data, self.fsdp, self.tensor)
        if 0 in sizes or sizes.count(-1) > 1:
            raise ValueError(f"mesh sizes {sizes} must be positive, and one of them at most -1")

    def shape(self, num_devices: int) -> tuple[int, int, int]:
        """Returns the sizes of the axes `data`, `fsdp` and `tensor` over so many devices.

        Raises:
            ValueError: if they do not multiply to the number of devices.
        """
        sizes = (self.data, self.fsdp, self.tensor)
        fixed = math.prod(size for size in sizes if size != -1)
        if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
            raise ValueError(
                f"mesh data={self.data} x fsdp={self.fsdp} x tensor={self.tensor} does not use "
                f"{num_devices} devices exactly; set one size to -1 and let the others divide "
                f"{num_devices}"
            )
        data, fsdp, tensor = (num_devices // fixed if size == -1 else size for size in sizes)
        return data, fsdp, tensor


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Times for which the processes of a run wait for each other before they end with an error."""

    start_timeout_secs: PositiveInt = 300
    """Seconds that processes wait at the start until the last one is there."""
    heartbeat_timeout_secs: PositiveInt = 100
    """Seconds without a heartbeat after which a process counts as dead."""
    stall_timeout_secs: PositiveInt = 1800
    """Seconds that processes wait for a live one at a point that all must reach."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Number formats and files of the model; its `config.json` says what it is."""

    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the parameters between steps. `bfloat16` halves their memory; updates are still
    computed in float32 and added with stochastic rounding, and gradient sums, norms and the second
    moment stay float32."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of activations and of the weights in matrix products; `auto` is bfloat16 on
    accelerators and float32 on CPU. Norms, logits, losses and log-probabilities are float32.
    `float32` means full float32 products, not TF32 or bfloat16 passes."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which the gradients of layers are summed over devices. `bfloat16` halves the
    bytes that this sends, and rounds each device's gradient where `compute_dtype` is bfloat16.
    Microbatches are summed in float32 in any case."""
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights in `final/`; `auto` stores each tensor in the data type that it has
    in the files of `model_name_or_path`, whatever their `config.json` says."""
    max_shard_size: PositiveInt = 5_000_000_000
    """Bytes of a safetensors file above which an export is split over several files."""
