"""Distillation of a student with lessons into the same student without them.

    python -m atlas_jax.train --config distil_taught_student \
        --config.data.dataset_path='outputs/demo/grpo/rollouts/*.jsonl' \
        --config.output_dir=outputs/demo/distilled

What teaching gives stays when the teacher is gone. The rows are the samples of a GRPO run with the
same student: its questions, the lessons of its teacher, and the student's answers. Those count
whose answer alone is wrong and whose answer with the lesson is right. The model reads the question
alone, and learns the distribution that the same weights have with the lesson in their prompt, half
on those right answers and half on what it writes itself.

Hardware, time and result: not run yet.
"""

from ml_collections import ConfigDict

from atlas_jax import config


def get_config(argument: str | None = None) -> ConfigDict:
    c = config.defaults(config.GKDConfig)
    c.output_dir = "outputs/demo/distilled"
    c.data.dataset_path = "outputs/demo/grpo/rollouts/*.jsonl"
    c.teacher_reads = "lesson"
    c.lmbda = 0.5
    c.beta = 0.5
    c.temperature = 1.0
    c.max_new_tokens = 48
    c.max_seq_length = 512
    c.learning_rate = 1e-5
    c.num_train_epochs = 2.0
    c.per_device_train_batch_size = 8
    c.gradient_accumulation_steps = 4
    c.gradient_checkpointing = "none"
    c.save_steps = 20
    c.save_total_limit = 1
    return config.apply_parts(c, argument, model="smollm2_135m", data="")
