"""Logits processor of vLLM's V2 model runner, which does what `whole_vocabulary` does for V1.

The V2 sampler calls processors before the temperature (vLLM 0.33.0,
`v1/worker/gpu/sample/sampler.py:244-265`). The processor therefore subtracts the log-partition
function at the temperature of each request, multiplied by that temperature. Division by the
temperature, which comes next, then gives `log softmax(logits / temperature)`, and `--logprobs-mode
processed_logits` reports it for the sampled token, which top_k and top_p have kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState


class WholeVocabularyV2(LogitsProcessor):
    """Logits processor that makes logits log-probabilities once they are divided, in place."""

    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState) -> None:
        """Makes room for the temperature of each slot of a request."""
        self._staged = torch.ones(req_states.max_num_reqs, dtype=torch.float32)
        self._temperatures = self._staged.to(req_states.device)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Notes the temperature of a request; vLLM divides by none for a greedy one (0)."""
        self._staged[req_idx] = sampling_params.temperature or 1.0
        return True

    def apply_staged_writes(self) -> None:
        """Copies the temperatures to the device."""
        self._temperatures.copy_(self._staged)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Returns `temperature * log softmax(logits / temperature)` of each row."""
        temperatures = self._temperatures[ctx.expanded_idx_mapping].unsqueeze(-1)
        partition = (logits / temperatures).logsumexp(dim=-1, keepdim=True)
        return logits.sub_(temperatures * partition)
