"""Distillation of Qwen3-8B into Qwen3-0.6B on teaching demonstrations, half on its own completions.

    launch/launch.sh 8 configs/run/teacher_gkd.py output_dir=checkpoints/gkd \
        teacher_model_name_or_path=checkpoints/grpo/final

A teacher that was trained with SFT and GRPO writes its lessons in a model that is cheaper to ask.
Both models must have one vocabulary. A step has 128 rows on any number of devices that divides 128.

Hardware, time and result: not run yet.
"""

from ml_collections import ConfigDict

from atlas_jax import config


def get_config(argument: str | None = None) -> ConfigDict:
    c = config.defaults(config.GKDConfig)
    c.output_dir = "checkpoints/gkd"
    c.teacher_model_name_or_path = "Qwen/Qwen3-8B"
    c.lmbda = 0.5
    c.beta = 0.5
    c.temperature = 0.9
    c.max_new_tokens = 512
    c.learning_rate = 2e-5
    c.num_train_epochs = 1.0
    c.train_batch_size = 128
    c.per_device_train_batch_size = 2
    c.warmup_ratio = 0.1
    return config.apply_parts(c, argument, model="qwen3_0_6b", data="arc_atlas_sft")
