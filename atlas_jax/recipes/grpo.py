"""GRPO (arXiv:2402.03300): groups of completions, each rewarded against the mean of its group.

A step asks new questions, lets the current policy write a group for each, scores the samples,
and makes `num_iterations` passes of `steps_per_generation` updates over them. The policy is a
teacher whose lessons help a frozen student, or, with `protocol=direct`, a model that answers by
itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging

from atlas_jax import distributed, logprobs, losses, metrics, policy_logprobs, step
from atlas_jax.data import questions as asked
from atlas_jax.data import sources
from atlas_jax.models import attention
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.grpo import GRPOConfig
from atlas_jax.recipes import chat_models
from atlas_jax.recipes.feed import Feed, Parts
from atlas_jax.recipes.layout import Layout, make_layout, row_bounds
from atlas_jax.recipes.scoring import labels, make_reward
from atlas_jax.rollout import record
from atlas_jax.rollout.engine import Backend
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.student_cache import StudentCache
from atlas_jax.run import Run, Training
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.model import Model, open_frozen
from atlas_jax.types import NOTHING_GIVEN, Given, LossSum, Metrics, Params, PolicyBatch, Question


def run(config: GRPOConfig, given: Given = NOTHING_GIVEN) -> bool:
    """Trains a policy and writes `final/`; see configs/run/teacher_rcl.py for an example.

    Returns:
        Whether the run came to its end; false if a signal stopped it before.
    """
    # 1. Options that contradict each other: an error must come before the directory is touched.
    compute = Compute.of(config)
    layout = make_layout(config, compute.plan, compute.sharding.num_replicas)
    protocol = chat_models.make_protocol(config, config.num_generations)
    if config.idle and distributed.is_main():
        logging.warning("%s", config.idle)
    with Run.open(config) as run, contextlib.ExitStack() as stack:
        # 2. The questions and the student. What a row can hold depends on the model's attention,
        #    so the layout is settled before the loss and the log-probabilities are built for it.
        train, held_out = _questions(config, given)
        student = None
        if config.student:
            student = open_student(config, run.compute)
        if student and config.rollout.difficulty:
            from atlas_jax.recipes import difficulty  # only this option measures it

            train = difficulty.of_run(config, train, student)
        layout = fit_attention(layout, run.decoder)
        sees_rows = bool(given.rewards or config.reward_functions or config.has_episodes)
        order = asked.QuestionOrder(train, config.seed, config.data.shuffle, sees_rows)
        distributed.check_same(order.fingerprint, "its questions differ from those of process 0")
        num_steps = config.max_steps
        if num_steps == -1:
            num_steps = math.ceil(config.num_train_epochs * len(train) / layout.questions)
        run.check_evaluates(held_out)
        # 3. The weights, the reference, and the position where an earlier command stopped.
        training = run.begin(num_steps, order.fingerprint, student)
        reference = _reference(config, training)
        # 4. Nothing can refuse the run any more: samples of steps that are done again go.
        writer = training.committed()
        stack.callback(writer.close)
        if distributed.is_main():
            record.drop_after(config.output_dir, training.first_step)
        # 5. The backend. Closed in reverse: the feed, which asks it, then the rewards, the backend,
        #    what the feed was still making, and the writer.
        last = stack.enter_context(contextlib.ExitStack())
        backend = _make_backend(config, run.model, student)
        stack.callback(backend.close)
        parts = Parts(
            config=config,
            layout=layout,
            order=order,
            backend=backend,
            protocol=protocol,
            reward=make_reward(config, stack, given.rewards),
            logprobs_fn=make_logprobs_fn(run.decoder, config, layout.per_row),
            sharding=run.compute.sharding,
            writer=writer,
            student_cache=StudentCache(config.rollout.cache_student),
            given_labels=labels(config, given.rewards) if given.rewards else (),
            num_steps=num_steps,
        )
        feed = Feed(parts, reference)
        last.callback(feed.join)
        stack.callback(feed.close)
        if training.position:
            feed.set_state(training.position, allow_other_data=config.data.refresh)
        # 6. Training, and its end: everything that generates is closed before the export.
        outcome = training.train(
            make_loss(run.decoder, config, layout.per_row),
            feed,
            writer,
            make_evaluate(parts, held_out) if held_out else None,
        )
        stack.close()
        if not outcome.stopped:
            directory = run.export(outcome.state)
            done = int(outcome.state.step)
            epoch = len(train) / layout.questions
            metrics.write_trainer_state(config, directory, done, num_steps, epoch)
    return not outcome.stopped


def fit_attention(layout: Layout, decoder: Decoder) -> Layout:
    """Returns the layout with a prompt for each completion where attention cannot share one.

    Some implementations cannot, and a window that is shorter than a row would count the places of
    other completions.
    """
    config = decoder.config
    window = config.window if any(config.local_layers) else 0
    shares = attention.shares_prompts(decoder.attention)
    if layout.per_row == 1 or (shares and not 0 < window < layout.buckets[-1]):
        return layout
    logging.info("each completion gets a row with its prompt: its attention cannot share one")
    return layout._replace(per_row=1)


def make_loss(decoder: Decoder, config: GRPOConfig, per_row: int) -> step.LossFn:
    """Returns the policy loss of a batch as a function of the parameters."""
    options = losses.PolicyOptions.of(config, config.max_new_tokens, per_row)
    policy_loss = losses.resolve(config.loss_type)

    def loss(params: Params, batch: PolicyBatch) -> tuple[LossSum, Metrics]:
        found, entropy = _logprobs(decoder, config, per_row, params, batch, with_entropy=True)
        total, values = policy_loss(found, batch, options)
        if options.entropy_coef:
            total = losses.with_entropy(total, entropy, batch, options)
        weight = jnp.sum(batch.loss_mask).astype(jnp.float32)
        return total, values | {"policy/entropy": (jnp.sum(entropy), weight)}

    return loss


def make_logprobs_fn(
    decoder: Decoder, config: GRPOConfig, per_row: int
) -> Callable[[Params, PolicyBatch], jax.Array]:
    """Returns the compiled `(params, batch [microbatches, B, T]) -> log-probabilities`."""

    def compute(params: Params, batch: PolicyBatch) -> jax.Array:
        def one(batch: PolicyBatch) -> jax.Array:
            return _logprobs(decoder, config, per_row, params, batch)[0]

        return jax.lax.map(one, batch)

    return jax.jit(compute)


def _logprobs(
    decoder: Decoder,
    config: GRPOConfig,
    per_row: int,
    params: Params,
    batch: PolicyBatch,
    with_entropy: bool = False,
) -> tuple[jax.Array, jax.Array]:
    shared = batch.sequence_ids if per_row > 1 else None
    rows = batch.tokens, batch.positions, batch.segment_ids, shared
    hidden = decoder.hidden(params, *rows, row_bounds(config, per_row))
    head = logprobs.Head(
        sharding=decoder.sharding,
        chunk_size=config.loss_chunk_size,
        temperature=config.temperature,
        with_entropy=with_entropy,
        trains_entropy=with_entropy and config.entropy_coef > 0,
    )
    return policy_logprobs.policy_logprobs(hidden, decoder.output_table(params), batch, head)


def reference_decoder(config: GRPOConfig, decoder: Decoder) -> Decoder:
    """Returns the decoder of the frozen reference: its dtype, and the memory that it rests in."""
    dtype = decoder.param_dtype if config.sync_ref_model else decoder.compute_dtype
    in_host = "params" if "reference" in config.offload else "none"
    sharding = dataclasses.replace(decoder.sharding, offload=in_host)
    return dataclasses.replace(decoder, param_dtype=dtype, sharding=sharding)


def _reference(config: GRPOConfig, training: Training) -> Params | None:
    """Returns the policy that the run began with, or what has become of it by syncing.

    Raises:
        ValueError: if its weights cannot be loaded.
    """
    if not config.beta:
        return None
    try:
        return training.reference(reference_decoder(config, training.run.decoder))
    except ValueError as error:
        raise ValueError(
            f"beta={config.beta} needs the reference model, whose weights are not at hand: "
            f"{error}; restore them, or set beta=0"
        ) from None


def _make_backend(config: GRPOConfig, model: Model, student: Model | None) -> Backend:
    if config.rollout.backend == "vllm":
        from atlas_jax.recipes import vllm_backend  # local generation needs no HTTP client

        logprobs_fn = make_logprobs_fn(model.decoder, config, per_row=1)
        return vllm_backend.make_vllm_backend(config, model, student, logprobs_fn)
    from atlas_jax.recipes import local_backend  # servers need no programs that generate

    return local_backend.make_local_backend(config, model, student)


def open_student(config: GRPOConfig, compute: Compute) -> Model:
    """Opens the frozen student.

    Raises:
        ValueError: if it cannot be opened.
    """
    options = config.teaching.student_chat_template_kwargs
    return open_frozen(compute, config.student_model, options)


def _questions(
    config: GRPOConfig, given: Given = NOTHING_GIVEN
) -> tuple[list[Question], list[Question] | None]:
    rows, held_out = sources.load_rows(
        config.data, config.seed, config.output_dir, distributed.is_main(), given
    )
    max_rejected = config.data.max_rejected_frac
    needs_truth = config.reward.needs_truth(given.rewards)
    fields = config.rollout.question_fields
    columns = vars(config.data.columns)
    train = asked.parse_questions(rows, max_rejected, needs_truth, fields, columns)
    logging.info("%d questions; the first: %s", len(train), train[0].text)
    if needs_truth:
        from atlas_jax.rewards.truths import check_truths  # compares as the rewards do

        check_truths(train)
    if held_out is None:
        return train, None
    questions = asked.parse_questions(held_out, max_rejected, needs_truth, fields, columns)
    return train, questions[: config.rollout.eval_limit or None]


def make_evaluate(
    parts: Parts, questions: list[Question]
) -> Callable[[step.TrainState], dict[str, float]]:
    """Returns the metrics of greedy answers to held-out questions as a function of the state."""
    from atlas_jax.rollout import evaluation  # a run without held-out questions needs none

    def run_evaluation(state: step.TrainState) -> dict[str, float]:
        policy = parts.backend.publish(state.whole, int(state.step))
        protocol = parts.protocol._replace(num_generations=1)
        own = questions[jax.process_index() :: jax.process_count()]
        student = parts.backend.student
        cache = parts.student_cache
        samples = evaluation.ask(own, policy, student, protocol, Sampling(0.0), cache)
        values = evaluation.summary(samples, taught=student is not None)
        return {f"eval/{k}": v for k, v in values.items()}

    return run_evaluation
