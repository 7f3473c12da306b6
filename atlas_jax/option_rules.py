"""What values options may have. Imports no JAX."""

from __future__ import annotations

from atlas_jax.options import SFTConfig, TrainConfig
from atlas_jax.options_grpo import GRPOConfig

ALGORITHMS: dict[str, type[TrainConfig]] = {"sft": SFTConfig, "grpo": GRPOConfig}

REWARDS = ("teaching_gain", "exact_match")

CHOICES = {
    "lr_scheduler_type": ("constant", "linear", "cosine"),
    "gradient_checkpointing": ("none", "dots", "full"),
    "attn_implementation": ("auto", "xla", "cudnn", "splash"),
    "sharding": ("fsdp", "zero1", "replicated"),
    "adam_mu_dtype": ("auto", "float32", "bfloat16"),
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"),
    "scale_rewards": ("none", "group", "batch"),
    "importance_sampling": ("none", "token", "sequence"),
    "reward.kind": ("rule", "rim", "mixed"),
    "reward.rim.small_model.response_format": ("auto", "json_schema", "json_object", "none"),
    "reward.rim.large_model.response_format": ("auto", "json_schema", "json_object", "none"),
    "rollout.protocol": ("teaching", "direct"),
    "rollout.missing_teaching": ("none", "whole", "unscored"),
    "rollout.backend": ("local", "vllm"),
    "rollout.sync_dtype": ("bfloat16", "float32"),
    "rollout.pause_mode": ("keep", "wait"),
    "rollout.weight_sync": ("reload", "restart"),
    "data.format": ("auto", "messages", "prompt_completion", "teaching", "session"),
    "data.turns": ("each", "history"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.compute_dtype": ("auto", "float32", "bfloat16"),
    "model.export_dtype": ("auto", "float32", "bfloat16", "float16"),
}

OFFLOADS = ("none", "optimizer", "params", "activations", "reference")
"""What `offload` may name, with commas."""

SYNONYMS = {
    ("gradient_checkpointing", "true"): "full",
    ("gradient_checkpointing", "false"): "none",
    ("attn_implementation", "flash_attention_2"): "auto",
}

EMPTIED = ("compilation_cache_dir", "reward.rim.cache_dir")
"""Options that `none` and `null` empty, beside those that are empty by default."""

POSITIVE = (
    "per_device_train_batch_size", "max_seq_length", "loss_chunk_size", "logging_steps",
    "num_train_epochs", "learning_rate", "adam_epsilon", "model.max_shard_size", "data.num_workers",
    "data.statement_timeout_secs",
    "max_prompt_length", "max_new_tokens", "max_probe_tokens", "num_iterations", "rollout.max_rows",
    "epsilon_low", "epsilon_high", "importance_sampling_cap", "ref_model_sync_steps", "temperature",
    "rollout.max_in_flight", "rollout.request_timeout_secs", "rollout.sync_timeout_secs",
    "rollout.probe_tolerance",
    "reward.rim.small_model.max_tokens", "reward.rim.large_model.max_tokens",
    "reward.rim.prompt.max_chars", "reward.rim.limits.max_in_flight",
    "reward.rim.limits.timeout_secs", "reward.rim.limits.max_tries",
    "reward.timeout_secs", "reward.num_workers",
    "hosts.start_timeout_secs", "hosts.heartbeat_timeout_secs", "hosts.stall_timeout_secs",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "gradient_accumulation_steps", "train_batch_size", "save_steps", "save_total_limit",
    "eval_steps", "weight_decay", "max_grad_norm", "data.dataset_max_samples", "top_k", "beta",
    "rollout.max_answer_tokens", "rollout.refill_rounds", "rollout.eval_limit",
    "rollout.max_staleness", "data.max_sessions",
    "reward.efficiency_weight", "reward.degradation_penalty", "reward.answer_leak_penalty",
    "reward.rim.variance_threshold", "reward.rim.arbiter_temperature",
    "reward.rim.limits.requests_per_minute", "reward.rim.limits.tokens_per_minute",
    "reward.rim.limits.max_calls", "reward.rim.limits.max_cost", "reward.rim.cache_max_bytes",
)  # fmt: skip
FRACTIONS = (
    "warmup_ratio",
    "adam_beta1",
    "adam_beta2",
    "data.eval_split_ratio",
    "data.max_rejected_frac",
    "min_p",
    "reward.max_failed_frac",
)
SHARES = (
    "reward.rim.uncertainty_threshold", "reward.rim.anti_gaming.max_repeated_frac",
    "reward.rim.consistency_rules.process_over_accuracy",
    "reward.rim.consistency_rules.process_for_helpfulness",
    "reward.rim.consistency_rules.helpfulness_over_diagnostic",
)  # fmt: skip
