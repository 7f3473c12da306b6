"""SFT of SmolLM2-135M on the demonstrations of the demo: the form of a lesson, before GRPO.

bash launch/demo.sh

Hardware: two CPU cores. Time: 4 minutes. Result: loss 3.18 to 0.11; docs/results.md.
"""

from ml_collections import ConfigDict

from atlas_jax import config


def get_config(argument: str | None = None) -> ConfigDict:
    c = config.defaults(config.SFTConfig)
    c.output_dir = "outputs/demo/sft"
    c.learning_rate = 1e-4
    c.max_steps = 30  # each of the 240 demonstrations once
    c.per_device_train_batch_size = 8
    c.gradient_checkpointing = "none"
    c.max_seq_length = 512
    c.data.length_buckets = (264,)  # one compilation
    c.save_steps = 10
    c.save_total_limit = 1
    return config.apply_parts(c, argument, model="smollm2_135m", data="demo_sft")
