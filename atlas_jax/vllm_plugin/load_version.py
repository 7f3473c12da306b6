"""An extension of vLLM's workers, by which what a reload wrote is what the model computes with.

vLLM (0.32) leaves out the output table that a model shares with its embedding: on a CPU a layer
computes with a packed copy of its weights, and only layers that the checkpoint names are packed
again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead


class LoadVersion:
    """Is mixed into the class of the workers; `/collective_rpc` calls its methods."""

    reload_weights: Callable[..., None]
    get_model: Callable[[], torch.nn.Module]

    def load_version(self, weights_path: str) -> None:
        """Reloads all weights in place from a directory in HF layout."""
        self.reload_weights(weights_path=weights_path)
        for layer in self.get_model().modules():
            if isinstance(layer, ParallelLMHead) and layer.weight.device == torch.device("cpu"):
                layer.quant_method.process_weights_after_loading(layer)
