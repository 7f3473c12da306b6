"""What can only be learnt from the reward is learnt: an answer, and what helps a student."""

import contextlib
import json

import jax
import numpy as np
import pytest

from atlas_jax import config
from atlas_jax.checkpoint import hf
from atlas_jax.data import questions as asked
from atlas_jax.data.packing import collate
from atlas_jax.recipes import chat_models, grpo, local_backend, sft
from atlas_jax.recipes.feed import Feed, Parts
from atlas_jax.rollout.student_cache import StudentCache
from atlas_jax.run import Run
from atlas_jax.sharding import to_global
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.model import export, open_model
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
ONE = jax.devices()[:1]
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


def train(options, num_steps):
    """Runs the recipe's own pieces on one device; returns the lines of `metrics.jsonl`.

    Every step asks the same questions, as many as it has groups.
    """
    with Run.open(options, ONE) as run:
        layout = grpo.make_layout(options, run.compute.plan, 1)
        pairs = zip(QUESTIONS, TRUTHS, strict=True)
        questions = [Question(q, q, truth, {}) for q, truth in pairs][: layout.questions]
        training = run.begin(num_steps, "in memory")
        student = None
        if options.student_model:
            student = local_backend.load_student(options, grpo.open_student(options, run.compute))
        writer = training.committed()
        parts = Parts(
            config=options,
            layout=layout,
            order=asked.QuestionOrder(questions, options.seed, True),
            backend=local_backend.LocalBackend(
                chat_models.local(run.model, "", options.rollout.max_rows), student
            ),
            protocol=chat_models.make_protocol(options, options.num_generations),
            reward=grpo.make_reward(options, contextlib.ExitStack()),
            logprobs_fn=grpo.make_logprobs_fn(run.decoder, options, layout.per_row),
            sharding=run.compute.sharding,
            writer=writer,
            student_cache=StudentCache(options.rollout.cache_student),
        )
        feed = Feed(parts, training.reference(run.decoder))
        loss = grpo.make_loss(run.decoder, options, layout.per_row)
        training.train(loss, feed, writer, grpo.make_evaluate(parts, questions))
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


def test_a_policy_learns_with_a_loss_of_the_users_own(fresh, tmp_path):
    """The loss of examples/custom_loss.py, as its docstring names it."""
    loss = "examples.custom_loss:reinforce"
    found = train(options(fresh, tmp_path, loss_type=loss, beta=0.04), 40)
    rewards = column(found, "reward/mean")
    assert rewards[:5].mean() < 0.3
    assert rewards[-5:].mean() > 0.8
    assert (column(found, "policy/mean_logprob") < 0).all()
    assert np.isfinite(column(found, "policy/kl")).all()


@pytest.fixture(scope="module")
def student(fresh, tmp_path_factory):
    """A student that answers with the digit that its hint means, and without one at random."""
    output = tmp_path_factory.mktemp("student")
    frozen = options(fresh, output, learning_rate=5e-3)
    compute = Compute.of(frozen, ONE)
    model = open_model(compute)
    tokenizer = model.files.tokenizer
    rng = np.random.default_rng(0)

    def example():
        question, digit, other = rng.choice(QUESTIONS), rng.choice(10), rng.choice(WORDS)
        prompt = rng.choice(["answer", f"hint {HINTS[digit]} answer", f"hint {other} answer"])
        text = f"{question} {prompt} {ANSWERS[digit]}"
        tokens = np.asarray(tokenizer(text).input_ids, np.int32)
        return Example(tokens, np.arange(len(tokens)) == len(tokens) - 1)

    optimizer = compute.optimizer(model.decoder, 100)
    state = compute.state(hf.load(model.source, model.decoder), optimizer)
    loss = sft.make_loss(model.decoder, LENGTH)
    train_step = compute.train_step(loss, model.decoder, optimizer)
    for _ in range(100):
        rows = collate([[example()] for _ in range(128)], 8)
        state, _ = train_step(state, to_global(rows, compute.sharding, 1))
    return export(frozen, model, state.params)


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
