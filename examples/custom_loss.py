"""A policy loss of one's own: `loss_type=examples.custom_loss:reinforce`.

    atlas-train --config rlvr_gsm8k --config.loss_type=examples.custom_loss:reinforce

The module is imported before JAX starts: it must compute nothing at its import.
"""

import jax.numpy as jnp


def reinforce(logprobs, batch, options):
    """REINFORCE with a bonus for the distance to the reference: no ratio, no clip.

    Args:
        logprobs: [B, T] in nats, of the policy in training; 0 where nothing is trained.
        batch: arrays [B, T]: `loss_mask` (true where a token is trained), `advantages`,
            `old_logprobs`, `rollout_logprobs`, `ref_logprobs` (None with beta=0), `sequence_ids`.
        options: `beta`, `epsilon_low`, `epsilon_high`, `max_new_tokens` and so on.

    Returns:
        ((sum, weight), {metric: (sum, weight)}). Sums and weights of all microbatches, devices and
        hosts are added up and divided once.
    """
    mask = batch.loss_mask
    num_tokens = jnp.sum(mask).astype(jnp.float32)
    terms = -batch.advantages * logprobs
    if options.beta:
        terms += options.beta * (logprobs - batch.ref_logprobs) ** 2 / 2
    total = jnp.sum(jnp.where(mask, terms, 0.0))
    return (total, num_tokens), {
        "policy/mean_logprob": (jnp.sum(jnp.where(mask, logprobs, 0.0)), num_tokens)
    }
