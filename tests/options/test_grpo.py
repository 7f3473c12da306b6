"""Options of GRPO that contradict each other."""

import dataclasses

import pytest

from atlas_jax import config as config_lib
from atlas_jax.config import GRPOConfig, RewardConfig, RolloutConfig, TeachingConfig

BASE = GRPOConfig(
    model_name_or_path="m",
    student_model="s",
    output_dir="o",
    data=config_lib.DataConfig(dataset_path="d.jsonl"),
)


SERVED = RolloutConfig(backend="vllm", teacher_servers="http://a", student_servers="http://b")
AHEAD = dataclasses.replace(SERVED, max_staleness=1)


def test_the_base_of_the_refusals_is_accepted():
    config_lib.validate(BASE)
    config_lib.validate(dataclasses.replace(BASE, rollout=AHEAD))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_generations": 1}, "num_generations=1 must be 2 or more"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be above 0"),
        ({"packing": True}, "packing=True is for SFT"),
        ({"temperature": 0.0}, r"temperature=0\.0 must be above 0"),
        ({"student_model": ""}, "student_model is empty.*protocol=direct"),
        ({"sync_ref_model": True, "beta": 0.0}, "raise beta above 0"),
        ({"kl_estimator": "unbiased", "beta": 0.0}, "kl_estimator=unbiased without a reference; r"),
        (
            {"importance_sampling": "none", "importance_sampling_mode": "mask"},
            "mode=mask with importance_sampling=none, which has no weights; use token",
        ),
        ({"delta": 1.2}, r"delta=1.2 with epsilon_high=0.2 .* above 1 \+ epsilon_high"),
        ({"delta": 2.0, "loss_type": "cispo"}, "loss_type=cispo.*cispo leaves no ratio free"),
        ({"loss_divisor": "all", "loss_type": "dapo"}, "loss_divisor=all with loss_type=dapo"),
        (
            {"entropy_coef": 0.1, "loss_type": "examples.custom_loss:reinforce"},
            "entropy_coef=0.1 with loss_type=examples.custom_loss:reinforce, whose average is",
        ),
        (
            {"reward": RewardConfig(overlong_tokens=600)},
            "overlong_tokens=600 is more than max_new_tokens=512; use a part",
        ),
        (
            {"reward": RewardConfig(names=("exact_match",), weights=(1.0, 2.0))},
            "give one weight for each name",
        ),
        ({"reward": RewardConfig(names=())}, "one at least"),
        (
            {"rollout": RolloutConfig(protocol="direct")},
            r"teaching_gain.*no student; use reward.names=\('exact_match',\)",
        ),
        ({"rollout": RolloutConfig(max_staleness=1)}, "max_staleness=1 with.*local.*or 0"),
        ({"rollout": RolloutConfig(backend="vllm")}, "vllm without rollout.teacher_servers; give"),
        (
            {"rollout": RolloutConfig(backend="vllm", teacher_servers="http://a")},
            "vllm without rollout.student_servers; give",
        ),
        ({"rollout": SERVED, "min_p": 0.1}, r"min_p=0.1 with.*vllm.*use top_p or top_k"),
        ({"rollout": AHEAD, "importance_sampling": "none"}, "none leaves uncorrected; use token"),
        (
            {"rollout": dataclasses.replace(SERVED, weight_sync="adapter")},
            "adapter with model.lora.rank=0, which trains no adapter; raise the rank, or",
        ),
        (
            {"rollout": dataclasses.replace(AHEAD, weight_sync="restart")},
            "restart, which ends what is in flight",
        ),
        (
            {"rollout": RolloutConfig(student_temperature=-0.5)},
            r"student_temperature=-0.5 must be 0 or more, or -1",
        ),
        (
            {
                "rollout": RolloutConfig(protocol="direct", student_temperature=0.0),
                "reward": RewardConfig(names=("exact_match",)),
            },
            "student_temperature=0.0 with rollout.protocol=direct, which has no student",
        ),
        (
            {"rollout": RolloutConfig(num_guided=2, student_temperature=0.0)},
            "num_guided=2 and rollout.num_baseline=1 with.*writes the same answer each time; use 1",
        ),
        (
            {
                "reward": RewardConfig(missing_lesson_penalty=0.3),
                "teaching": TeachingConfig(missing_teaching="unscored"),
            },
            "missing_lesson_penalty=0.3 with teaching.missing_teaching=unscored.*use none",
        ),
        (
            {
                "rollout": RolloutConfig(protocol="direct"),
                "reward": RewardConfig(names=("exact_match",), missing_lesson_penalty=0.3),
            },
            "missing_lesson_penalty=0.3 with rollout.protocol=direct, which has no lessons",
        ),
        (
            {"rollout": RolloutConfig(difficulty=(0.9, 0.1))},
            r"difficulty=\(0.9, 0.1\) must be two shares, the lower one first",
        ),
        ({"rollout": RolloutConfig(difficulty=(0.5,))}, "must be two shares"),
        ({"rollout": RolloutConfig(difficulty=(0.1, 1.5))}, "difficulty=.*holds 1.5"),
        (
            {
                "rollout": RolloutConfig(protocol="direct", difficulty=(0.1, 0.9)),
                "reward": RewardConfig(names=("exact_match",)),
            },
            "difficulty=.* with rollout.protocol=direct, which has no student",
        ),
        (
            {"rollout": RolloutConfig(num_guided=2, num_baseline=3)},
            "num_guided=2 and rollout.num_baseline=3 cannot be paired evenly; let one be",
        ),
        (
            {
                "rollout": RolloutConfig(protocol="direct", num_baseline=2),
                "reward": RewardConfig(names=("exact_match",)),
            },
            "num_baseline=2 with rollout.protocol=direct, which has no student; leave it at 1",
        ),
    ],
)
def test_impossible_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_lib.validate(dataclasses.replace(BASE, **change))


@pytest.mark.parametrize(
    ("change", "idle"),
    [
        ({}, ""),
        ({"epsilon_high": 0.28, "delta": 2.0}, "epsilon_high=0.28, delta=2.0 cannot act: with"),
        ({"loss_type": "gspo"}, "loss_type=gspo cannot act"),
        ({"loss_type": "gspo", "num_iterations": 2}, ""),
        ({"loss_type": "cispo", "epsilon_high": 4.0, "steps_per_generation": 2}, ""),
    ],
)
def test_options_that_cannot_act_while_every_ratio_is_one_are_named(change, idle):
    config = dataclasses.replace(BASE, **change)
    config_lib.validate(config)
    assert config.idle.startswith(idle)
    assert bool(config.idle) == bool(idle)
