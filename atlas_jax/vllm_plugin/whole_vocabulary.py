"""A logits processor of vLLM, by which its log-probabilities are those that the trainer compares.

vLLM calls it behind the temperature and before top_k and top_p. It subtracts the log-partition
function from the logits, which changes no probability, so that the logit of a token is its
`log softmax(logits / temperature)` over the whole vocabulary; `--logprobs-mode processed_logits`
then reports that of each sampled token. The modes of vLLM's own report it either without the
temperature (`raw_logprobs`) or within what top_k and top_p leave (`processed_logprobs`).
"""

from __future__ import annotations

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor


class WholeVocabulary(LogitsProcessor):
    """Turns logits into log-probabilities, in place."""

    def __init__(self, vllm_config: object, device: torch.device, is_pin_memory: bool) -> None:
        """Needs nothing of what vLLM offers."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns `log softmax` of each row."""
        return logits.sub_(logits.logsumexp(dim=-1, keepdim=True))

    def is_argmax_invariant(self) -> bool:
        """Returns true: it runs behind the temperature and skips greedy requests."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Has no state."""
