"""What can only be learnt from the reward is learnt: an answer, and what helps a student."""

import json

import jax
import numpy as np
import pytest

from atlas_jax import config, loop, metrics, step
from atlas_jax.checkpoint import hf
from atlas_jax.checkpoint.manager import Checkpoints
from atlas_jax.data import questions as asked
from atlas_jax.data.packing import collate
from atlas_jax.recipes import grpo, setup, sft, speakers
from atlas_jax.recipes.feed import Feed, Parts
from atlas_jax.sharding import Sharding, make_mesh, to_global
from atlas_jax.types import Example, Question
from tests import words

SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2)))
QUESTIONS = tuple(f"q{i}" for i in range(8))
TRUTHS = "39420571"
ANSWERS = tuple(f"<answer>{digit}</answer>" for digit in words.DIGITS)
"""Marked, as an answer that its limit of one token cuts must be."""
HINTS = ("red", "blue", "green", "black", "white", "pink", "brown", "grey", "gold", "teal")
"""What a student takes for each digit. The answer itself would be a leak, which does not pay."""
WORDS = (*QUESTIONS, *ANSWERS, *HINTS, "answer", "hint", "plan")
LENGTH = 40
"""Of a row: a question and the words of a group."""


def options(model, output, **changes):
    """The options of a run on questions of one word that are answered by one."""
    plain = {
        "algorithm": "grpo", "model_name_or_path": str(model), "output_dir": str(output),
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
        "weight_decay": 0.0, "beta": 0.04, "temperature": 1.0, "top_p": 1.0,
        "num_generations": 32, "per_device_train_batch_size": 256, "max_prompt_length": 8,
        "max_new_tokens": 1, "max_probe_tokens": 1, "max_seq_length": LENGTH, "save_steps": 0,
        "gradient_checkpointing": "none", "data.length_buckets": (LENGTH,),
        "data.dataset_path": "in memory", "rollout.max_answer_tokens": 1,
        "rollout.protocol": "direct", "rollout.direct_template": "{question} answer",
        "reward.names": ("exact_match",),
    }  # fmt: skip
    draft = config.defaults(config.GRPOConfig)
    draft.update_from_flattened_dict(plain | changes)
    frozen = config.freeze(draft)
    config.validate(frozen)
    return frozen


def one_device():
    return Sharding(make_mesh(config.MeshConfig(), jax.devices()[:1]), "fsdp", "none")


def train(options, num_steps):
    """Runs the recipe's own pieces on one device; returns the lines of `metrics.jsonl`.

    Every step asks the same questions, as many as it has groups.
    """
    sharding = one_device()
    layout = grpo.make_layout(options, config.batch_plan(options, 1), 1)
    pairs = zip(QUESTIONS, TRUTHS, strict=True)
    questions = [Question(q, q, truth, {}) for q, truth in pairs][: layout.questions]
    model = setup.open_model(options, sharding, LENGTH)
    optimizer = setup.make_optimizer(options, model.decoder, num_steps)
    checkpoints = Checkpoints(options.output_dir)
    state = setup.begin(options, model, optimizer, checkpoints).state
    writer = metrics.MetricWriter(options.output_dir, 0)
    parts = Parts(
        config=options,
        layout=layout,
        order=asked.QuestionOrder(questions, options.seed, True),
        policy=speakers.local(model, "", options.rollout.max_rows),
        student=grpo.open_student(options, sharding),
        protocol=speakers.protocol(options, options.num_generations),
        reward=grpo.make_reward(options),
        score=grpo.make_score(model.decoder, options, layout.per_row),
        sharding=sharding,
        writer=writer,
    )
    loss = grpo.make_loss(model.decoder, options, layout.per_row)
    job = loop.Job(
        config=options,
        num_steps=num_steps,
        flops_per_token=model.decoder.config.flops_per_token,
        train_step=step.make_train_step(loss, optimizer, model.decoder.dims, sharding),
        evaluate=grpo.make_evaluate(parts, questions),
        writer=writer,
        checkpoints=checkpoints,
    )
    loop.run(job, state, Feed(parts, hf.load(model.source, model.decoder)))
    writer.close()
    with open(f"{options.output_dir}/metrics.jsonl") as lines:
        return [json.loads(line) for line in lines]


def column(found, name):
    return np.asarray([line[name] for line in found if name in line])


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A model of random weights, which knows nothing."""
    return words.save(tmp_path_factory.mktemp("fresh"), WORDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_policy_learns_what_only_its_reward_says(fresh, tmp_path, seed):
    found = train(options(fresh, tmp_path, seed=seed), 40)
    rewards = column(found, "reward/mean")
    assert rewards[:5].mean() < 0.3
    assert rewards[-5:].mean() > 0.8
    assert found[-1]["eval/accuracy"] > 0.8


@pytest.fixture(scope="module")
def student(fresh, tmp_path_factory):
    """A student that answers with the digit that its hint means, and without one at random."""
    output = tmp_path_factory.mktemp("student")
    frozen = options(fresh, output, learning_rate=5e-3)
    model = setup.open_model(frozen, one_device(), LENGTH)
    tokenizer, sharding = model.files.tokenizer, model.decoder.sharding
    rng = np.random.default_rng(0)

    def example():
        question, digit, other = rng.choice(QUESTIONS), rng.choice(10), rng.choice(WORDS)
        prompt = rng.choice(["answer", f"hint {HINTS[digit]} answer", f"hint {other} answer"])
        text = f"{question} {prompt} {ANSWERS[digit]}"
        tokens = np.asarray(tokenizer(text).input_ids, np.int32)
        return Example(tokens, np.arange(len(tokens)) == len(tokens) - 1)

    optimizer = setup.make_optimizer(frozen, model.decoder, 100)
    params = hf.load(model.source, model.decoder)
    state = step.init_state(params, optimizer, sharding)
    loss = sft.make_loss(model.decoder, LENGTH)
    train_step = step.make_train_step(loss, optimizer, model.decoder.dims, sharding)
    for _ in range(100):
        rows = collate([[example()] for _ in range(128)], 8)
        state, _ = train_step(state, to_global(rows, sharding, 1))
    return setup.export(frozen, model, state.params)


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_a_teacher_learns_what_helps_a_student(fresh, student, tmp_path, seed):
    taught = {
        "rollout.protocol": "teaching", "student_model": student,
        "data.teacher_template": "{question} plan {approach}",
        "rollout.student_baseline_template": "{question} answer",
        "rollout.student_diagnostic_template": "{question} plan",
        "rollout.student_with_teaching_template": "{question} hint {teaching} answer",
        "rollout.missing_teaching": "whole", "reward.names": ("teaching_gain",),
        "per_device_train_batch_size": 128,
    }  # fmt: skip
    found = train(options(fresh, tmp_path, seed=seed, **taught), 60)
    alone = column(found, "teaching/baseline_accuracy")
    helped = column(found, "teaching/student_accuracy")
    assert helped[:5].mean() < 0.3
    assert helped[-5:].mean() > alone.mean() + 0.5
    assert found[-1]["eval/student_accuracy"] > found[-1]["eval/baseline_accuracy"]
