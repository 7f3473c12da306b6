"""Extension of vLLM's workers: reloading of weights in place, and checksums of the weights.

vLLM (0.32) does not repack the output table that a model shares with its embedding: on a CPU a
layer computes with a packed copy of its weights, and only layers that the checkpoint names are
packed again.

vLLM's own `/weight_checker` is not used. It copies every parameter to the host and takes its
SHA-256, which costs seconds for each update of a large model; and on a CPU it sees nothing of the
linear layers, whose parameters are empty once they have been packed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

_CHUNK = 1 << 24
"""Numbers that are summed at one time on a device; their copies in 64 bits take 128 MiB."""


class LoadVersion:
    """Mixin for the class of the workers; `/collective_rpc` calls its methods."""

    reload_weights: Callable[..., None]
    get_model: Callable[[], torch.nn.Module]
    add_lora: Callable[[LoRARequest], bool]
    list_loras: Callable[[], set[int]]

    def load_version(self, weights_path: str) -> None:
        """Reloads all weights in place from a directory in HF layout."""
        model: Any = self.get_model()
        loaded: dict[str, str] = {}
        load = model.load_weights
        on_cpu = next(model.parameters()).device == torch.device("cpu")
        if on_cpu:
            # On a CPU packed copies replace the parameters, so the tensors are noted on their way
            # in.
            model.load_weights = lambda weights: load(_noted(weights, loaded))
        try:
            self.reload_weights(weights_path=weights_path)
        finally:
            if on_cpu:
                del model.load_weights  # uncovers the method of the class
        self.loaded_checksums = loaded
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead) and layer.weight.device == torch.device("cpu"):
                # See above: a shared output table is not packed again by vLLM.
                layer.quant_method.process_weights_after_loading(layer)

    def adapter_numbers(self) -> list[int]:
        """Returns the numbers of the LoRA adapters of this worker."""
        return sorted(self.list_loras())

    def load_adapter(self, number: int, path: str) -> None:
        """Replaces the tensors of a LoRA adapter in place by those of a directory."""
        self.add_lora(LoRARequest(f"version of {number}", number, path, load_inplace=True))
        self.adapter_number = number

    def nccl_version(self) -> str:
        """Returns the version of NCCL with which this worker takes weights from the trainer."""
        if not torch.cuda.is_available():
            return "none"
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        return NCCLLibrary().ncclGetVersion()

    def weight_checksums(self) -> dict[str, str]:
        """Returns the checksums of this worker's tensors by name.

        On a CPU, where packed copies cannot be read, they include the tensors that the last
        `load_version` passed to the model. After a `load_adapter` they include those of the
        adapter.
        """
        loaded = {
            name: checksum(parameter.detach())
            for name, parameter in self.get_model().named_parameters()
            if parameter.numel()
        }
        return loaded | getattr(self, "loaded_checksums", {}) | self._adapter_checksums()

    def _adapter_checksums(self) -> dict[str, str]:
        """Returns the checksums of the adapter's tensors, where the layers compute with them."""
        if not hasattr(self, "adapter_number"):
            return {}
        manager: Any = self.get_model().lora_manager
        place = manager.lora_index_to_id.index(self.adapter_number)
        return {
            f"{name}.{part}.{i}": checksum(stacked[place])
            for name, layer in manager.modules.items()
            for part in ("lora_a_stacked", "lora_b_stacked")
            for i, stacked in enumerate(_stacks(getattr(layer, part)))
        }


def _stacks(stacked: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Returns the tensors of a layer, of which a fused one has several."""
    return (stacked,) if isinstance(stacked, torch.Tensor) else stacked


def _noted(
    weights: Iterable[tuple[str, torch.Tensor]], checksums: dict[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors unchanged, and adds the checksum of each to `checksums`."""
    for name, tensor in weights:
        checksums[f"loaded:{name}"] = checksum(tensor)
        yield name, tensor


def checksum(tensor: torch.Tensor) -> str:
    """Returns a checksum of the bytes of a tensor.

    It is CRC-32 on a CPU, where it runs at memory speed. On other devices it is the sum, and the
    sum of squares, of the bytes read as 16-bit numbers, which is independent of the order of
    summation and copies nothing to the host.
    """
    flat = tensor.contiguous().view(-1)
    if flat.device.type == "cpu":
        return f"{zlib.crc32(flat.view(torch.uint8).numpy().data):08x}"
    numbers = flat.view(torch.int16 if flat.element_size() % 2 == 0 else torch.int8)
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for start in range(0, numbers.numel(), _CHUNK):
        part = numbers[start : start + _CHUNK].to(torch.int64)
        total[0] += part.sum()
        total[1] += (part * part).sum()
    plain, squares = total.tolist()
    return f"{plain}:{squares}"
