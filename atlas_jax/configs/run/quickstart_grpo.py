"""GRPO of SmolLM2-135M on the shipped problems, in minutes on two CPU cores.

bash launch/quickstart.sh

Hardware: two CPU cores. Time: 10 minutes for the whole quickstart (SFT, GRPO, evaluation), without
the installation. Result: of 24 held-out questions the student answers 0.125 right alone and 0.375
with the lessons of this teacher, as with those of the SFT teacher: four steps change nothing that
shows.
"""

from ml_collections import ConfigDict

from atlas_jax import config


def get_config(argument: str | None = None) -> ConfigDict:
    c = config.defaults(config.GRPOConfig)
    c.output_dir = "outputs/quickstart/grpo"
    c.student_model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    c.learning_rate = 5e-6
    c.lr_scheduler_type = "constant"
    c.warmup_ratio = 0.0
    c.max_steps = 4
    c.num_generations = 4
    c.per_device_train_batch_size = 4
    c.gradient_accumulation_steps = 4
    c.gradient_checkpointing = "none"
    c.top_p = 1.0
    c.max_prompt_length = 256
    c.max_new_tokens = 96
    c.teaching.max_probe_tokens = 60
    c.teaching.max_answer_tokens = 48
    c.max_seq_length = 640
    c.data.length_buckets = (512,)  # one compilation
    c.save_steps = 2
    c.save_total_limit = 1
    c.rollout.eval_limit = 16
    return config.apply_parts(c, argument, model="smollm2_135m", data="quickstart_rl", rim="")
