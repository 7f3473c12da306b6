"""GRPO of SmolLM2-135M as a teacher, long enough to learn, against itself as a greedy student.

bash launch/demo.sh

The reward is a function of the lesson alone, and neither a leak nor a text without a lesson or
without an end is ever the best choice.

Hardware: two CPU cores. Time: 30 minutes. Result: of 500 held-out questions the student answers
10 % right alone, 67 % with the SFT teacher and 73 % with this one; docs/results.md.
"""

from ml_collections import ConfigDict

from atlas_jax import config


def get_config(argument: str | None = None) -> ConfigDict:
    c = config.defaults(config.GRPOConfig)
    c.output_dir = "outputs/demo/grpo"
    c.student_model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    c.learning_rate = 2e-5
    c.lr_scheduler_type = "constant"
    c.warmup_ratio = 0.0
    c.beta = 0.0
    c.loss_type = "dr_grpo"  # of two failures the longer one costs no less
    c.max_steps = 25
    c.num_generations = 8
    c.per_device_train_batch_size = 8
    c.gradient_accumulation_steps = 8  # 8 questions of 8 lessons a step
    c.gradient_checkpointing = "none"
    c.temperature = 1.0
    c.top_p = 1.0
    c.max_prompt_length = 256
    c.max_new_tokens = 64
    c.teaching.max_probe_tokens = 60
    c.teaching.max_answer_tokens = 48
    c.max_seq_length = 768
    c.data.length_buckets = (512, 576, 640)
    c.save_steps = 8
    c.save_total_limit = 1
    c.rollout.student_temperature = 0.0
    c.rollout.eval_limit = 64
    c.reward.efficiency_weight = 0.3
    c.reward.answer_leak_penalty = 1.0
    c.reward.missing_lesson_penalty = 0.3
    return config.apply_parts(c, argument, model="smollm2_135m", data="demo_rl", rim="")
