"""GRPO of a teacher against a frozen student, with the values of the ATLAS guide.

python -m atlas_jax.train --config configs/run/teacher_rcl.py \
    --config.resume_from=checkpoints/sft --config.output_dir=checkpoints/grpo

`resume_from` takes the weights of an SFT run of the same model (teacher_sft.py:model=qwen3_8b).
32 lessons a question, 4 questions a step, on any number of devices that divides 128. They earn what
they change in the student's answers, which is compared with the ground truth, and what judges say:
helpfulness and process, as configs/rim_offline_config.py has it; `…/teacher_rcl.py:rim=rim_config`
takes all four. Sessions of the Atlas runtime (`data=runtime_pg`) need not have a ground truth:
there judges alone reward. The guide expects reward/mean to rise, teaching/non_degradation_rate
above 0.95 and a KL of 0.5 to 2.0.

Hardware, time and result: not run yet at this size. Planned by atlas-plan with Qwen3-8B: 51.0 GiB a
device on 4 H100 with everything local.
"""

from ml_collections import ConfigDict

from atlas_jax import config


def get_config(argument: str | None = None) -> ConfigDict:
    c = config.defaults(config.GRPOConfig)
    c.output_dir = "checkpoints/grpo"
    c.student_model = "Qwen/Qwen3-4B-Instruct-2507"
    c.learning_rate = 5e-7
    c.lr_scheduler_type = "constant"
    c.warmup_ratio = 0.1
    c.weight_decay = 0.01
    c.beta = 0.04
    c.temperature = 0.7
    c.top_p = 0.95
    c.num_generations = 32
    c.max_new_tokens = 512
    c.train_batch_size = 128
    c.per_device_train_batch_size = 4
    c.max_seq_length = 4096
    c.max_steps = 250
    c.save_steps = 10
    c.eval_steps = 10
    c = config.apply_parts(
        c, argument, model="qwen3_8b", data="arc_atlas_rl", rim="rim_offline_config"
    )
    c.reward.kind = "rim" if c.data.format == "session" else "mixed"
    return c
