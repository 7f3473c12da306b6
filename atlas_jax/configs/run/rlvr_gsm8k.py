"""Plain GRPO on GSM8K with an exact-match reward: no teacher, no student.

python -m atlas_jax.train --config configs/run/rlvr_gsm8k.py --config.output_dir=checkpoints/gsm8k

8 answers a question, 32 questions a step, on any number of devices that divides 256.

Hardware, time and result: not run yet.
"""

from ml_collections import ConfigDict

from atlas_jax import config


def get_config(argument: str | None = None) -> ConfigDict:
    c = config.defaults(config.GRPOConfig)
    c.output_dir = "checkpoints/rlvr_gsm8k"
    c.rollout.protocol = "direct"
    c.reward.names = ("exact_match",)
    c.learning_rate = 5e-7
    c.warmup_ratio = 0.03
    c.weight_decay = 0.0
    c.temperature = 0.9
    c.top_p = 1.0
    c.max_prompt_length = 512
    c.max_new_tokens = 768
    c.train_batch_size = 256
    c.per_device_train_batch_size = 4
    c.max_steps = 500
    c.save_steps = 50
    c.eval_steps = 50
    return config.apply_parts(c, argument, model="qwen25_7b", data="gsm8k")
