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
    "offload": ("none", "optimizer"),
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"),
    "scale_rewards": ("none", "group", "batch"),
    "importance_sampling": ("none", "token", "sequence"),
    "rollout.protocol": ("teaching", "direct"),
    "rollout.missing_teaching": ("none", "whole", "unscored"),
    "data.format": ("auto", "messages", "prompt_completion", "teaching"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.compute_dtype": ("auto", "float32", "bfloat16"),
    "model.export_dtype": ("auto", "float32", "bfloat16", "float16"),
}

SYNONYMS = {
    ("gradient_checkpointing", "true"): "full",
    ("gradient_checkpointing", "false"): "none",
    ("attn_implementation", "flash_attention_2"): "auto",
}

POSITIVE = (
    "per_device_train_batch_size", "max_seq_length", "loss_chunk_size", "logging_steps",
    "num_train_epochs", "learning_rate", "adam_epsilon", "model.max_shard_size", "data.num_workers",
    "max_prompt_length", "max_new_tokens", "max_probe_tokens", "num_iterations", "rollout.max_rows",
    "epsilon_low", "epsilon_high", "importance_sampling_cap", "ref_model_sync_steps", "temperature",
    "hosts.start_timeout_secs", "hosts.heartbeat_timeout_secs", "hosts.stall_timeout_secs",
)  # fmt: skip
NOT_NEGATIVE = (
    "gradient_accumulation_steps", "train_batch_size", "save_steps", "save_total_limit",
    "eval_steps", "weight_decay", "max_grad_norm", "data.dataset_max_samples", "top_k", "beta",
    "rollout.max_answer_tokens", "rollout.refill_rounds", "rollout.eval_limit",
    "reward.efficiency_weight", "reward.degradation_penalty", "reward.answer_leak_penalty",
)  # fmt: skip
FRACTIONS = (
    "warmup_ratio", "data.eval_split_ratio", "data.max_rejected_frac", "min_p",
    "reward.max_failed_frac",
)  # fmt: skip
