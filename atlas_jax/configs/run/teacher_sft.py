"""SFT warm-up of an 8B teacher on teaching demonstrations, with the values of the ATLAS guide.

    launch/launch.sh 8 configs/run/teacher_sft.py output_dir=checkpoints/sft

A step has 128 rows on any number of devices that divides 128, at most 2 of them on a device at one
time.

Hardware, time and result: not run yet at this size. Planned by atlas-plan with Qwen3-8B and rows of
4,096 tokens: 20.2 GiB a device on 8 H100. The guide expects 4 to 6 hours on these, a loss below 1.5
and gradient norms below 5.
"""

from ml_collections import ConfigDict

from atlas_jax import config


def get_config(argument: str | None = None) -> ConfigDict:
    c = config.defaults(config.SFTConfig)
    c.output_dir = "checkpoints/sft"
    c.learning_rate = 2e-5
    c.num_train_epochs = 1.0
    c.train_batch_size = 128
    c.per_device_train_batch_size = 2
    c.warmup_ratio = 0.1
    c.packing = False  # the guide's steps are of 128 demonstrations, not of rows full of them
    return config.apply_parts(c, argument, model="llama3_8b", data="arc_atlas_sft")
