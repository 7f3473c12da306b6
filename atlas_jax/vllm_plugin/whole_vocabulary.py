"""Logits processor of vLLM that makes it report the log-probabilities that the trainer computes.

vLLM calls it after the temperature and before top_k and top_p. It subtracts the log-partition
function from the logits, which changes no probability. The logit of a token is then its
`log softmax(logits / temperature)` over the whole vocabulary, and `--logprobs-mode
processed_logits` reports it for each sampled token. vLLM's other modes report log-probabilities
without the temperature (`raw_logprobs`), or over the tokens that top_k and top_p leave
(`processed_logprobs`).
"""

from __future__ import annotations

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor


class WholeVocabulary(LogitsProcessor):
    """Logits processor that turns logits into log-probabilities, in place."""

    def __init__(self, vllm_config: object, device: torch.device, is_pin_memory: bool) -> None:
        """Ignores its arguments."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns `log softmax` of each row."""
        return logits.sub_(logits.logsumexp(dim=-1, keepdim=True))

    def is_argmax_invariant(self) -> bool:
        """Returns true, which makes vLLM skip greedy requests and call it after the temperature."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Does nothing, since the processor has no state."""
