"""The programs of a run, built as the recipes build them, of shapes instead of arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from atlas_jax import step
from atlas_jax.data.loader import segment_bound
from atlas_jax.models import cache as kv
from atlas_jax.models.config import ModelConfig
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.gkd import GKDConfig
from atlas_jax.options.grpo import GRPOConfig
from atlas_jax.options.train import TrainConfig
from atlas_jax.plan import flops
from atlas_jax.plan.pairs import RowContent, even
from atlas_jax.plan.targets import CompiledSharding, Target
from atlas_jax.recipes import gkd, grpo, sft
from atlas_jax.recipes.layout import longest_row
from atlas_jax.rollout import local
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.sharding import Sharding
from atlas_jax.startup.compute import Compute
from atlas_jax.types import Batch, PolicyBatch, RowBounds, TeacherBatch, TopTokens

_NUM_UPDATES = 1000
"""Length of the schedule, which changes no program."""


class Program(NamedTuple):
    """One compiled program of a run."""

    name: str
    function: Callable[..., Any]
    """A jitted function."""
    arguments: tuple[Any, ...]
    """Trees of `jax.ShapeDtypeStruct`."""
    model_flops: float
    """Floating-point operations that the model itself needs, over all devices; nothing twice."""
    times: int = 1
    """Number of times that a step runs it."""
    content: RowContent = RowContent(())
    """Texts of a row; none where a program has no rows, as in decoding."""


class PlannedRun(NamedTuple):
    """A run as far as the plan sees it."""

    config: TrainConfig
    decoder: Decoder
    mesh: Mesh | AbstractMesh
    state: step.TrainState
    """Shapes, dtypes and places."""
    programs: list[Program]
    resident: dict[str, Any]
    """Trees that stay beside the training state: what LoRA adapts, the reference, a student in this
    process."""
    num_tokens: int
    """Positions of rows in a step."""
    segments: int
    """Texts in a packed row."""

    def frozen(self, **others: Any) -> step.Frozen | None:
        """Returns the last argument of programs that train: what LoRA adapts, and other models."""
        number = jax.ShapeDtypeStruct((), jnp.int32)
        params = self.resident.get("base", {}) | others
        return step.Frozen(params, number, number) if params else None

    @property
    def whole(self) -> Any:
        """All parameters of the trained model."""
        return self.state._replace(frozen=self.resident.get("base")).whole

    def update_flops(self, forward: float, num_tokens: int) -> float:
        """Returns the operations that an update needs: those of three forward passes.

        Matrices that stay have no gradient, which would be a third of their operations.
        """
        saved = self.decoder.config.flops_per_token(0) / 3 if self.decoder.lora else 0.0
        return 3 * forward - num_tokens * saved


def build(
    config: TrainConfig,
    target: Target,
    devices: list[jax.Device],
    architecture: ModelConfig,
    student: ModelConfig | None,
    segments: int = 1,
) -> PlannedRun:
    """Returns the programs of a run on `devices`.

    Args:
        config: of the run.
        target: what to compile for.
        devices: the devices of the target.
        architecture: of the model that is trained.
        student: architecture of the frozen student, or of the teacher that is distilled; None if
            there is none.
        segments: texts of equal length in each packed row.

    Raises:
        ValueError: for a mesh, batch or model that the run itself would refuse, or for several
            segments in rows that are not packed.
    """
    # The classes of a run itself, so that the plan compiles the programs that the run will.
    compute = Compute.of(config, devices, CompiledSharding)
    if segments != 1 and not (config.may_pack and compute.packs(architecture)):
        raise ValueError(f"segments={segments} of rows that are not packed; set packing=true")
    decoder = compute.decoder(architecture)
    optimizer = compute.optimizer(decoder, _NUM_UPDATES)
    frozen = step.abstract(decoder.shapes, decoder.placements())
    run = PlannedRun(
        config=config,
        decoder=decoder,
        mesh=compute.sharding.mesh,
        state=compute.abstract_state(decoder, optimizer),
        programs=[],
        resident={"base": frozen} if decoder.lora else {},
        num_tokens=0,
        segments=segments,
    )
    recipes: dict[str, Callable[..., PlannedRun]] = {"sft": _sft, "grpo": _grpo, "gkd": _gkd}
    return recipes[config.algorithm](run, compute, config, optimizer, student, target)


def _sft(
    run: PlannedRun, compute: Compute, config: TrainConfig, optimizer: step.Optimizer, *_: Any
) -> PlannedRun:
    plan = compute.plan
    length = config.longest_sequence
    shape = plan.microbatches, plan.global_rows // plan.microbatches, length
    packs = compute.packs(run.decoder.config)
    bounds = RowBounds(segments=segment_bound(run.segments) if packs else 1)
    loss = sft.make_loss(run.decoder, config.loss_chunk_size, bounds)
    train = compute.train_step(loss, run.decoder, optimizer)
    num_tokens = plan.global_rows * length
    content = even(length, run.segments)
    forward = flops.forward(run.decoder.config, plan.global_rows, content)
    needed = run.update_flops(forward, num_tokens)
    program = Program(
        name="train",
        function=train.whole,
        arguments=(run.state, _batch(Batch, shape, compute.sharding), run.frozen()),
        model_flops=needed,
        content=content,
    )
    programs = [program]
    if plan.microbatches > 1 and not packs:
        programs = _in_parts(run, program, train, shape)
    return run._replace(programs=programs, num_tokens=num_tokens)


def _in_parts(
    run: PlannedRun, program: Program, train: step.TrainStep, shape: tuple[int, ...]
) -> list[Program]:
    """Returns the programs of a step whose microbatches differ in length, all of the longest."""
    state = run.state
    sharding = run.decoder.sharding
    times, *rows = shape
    batch = _batch(Batch, (1, *rows), sharding)
    _, metrics = jax.eval_shape(train.begin, state.params, batch, run.frozen())
    everywhere = jax.tree.map(lambda _: sharding.replicated, metrics)
    trained = run.decoder.trained
    grads = step.abstract_gradients(trained.shapes, trained.dims, sharding)
    sums = step.GradientSums(grads, step.abstract(metrics, everywhere))
    return [
        program._replace(
            name="microbatch",
            function=train.add,
            arguments=(state.params, sums, batch, run.frozen()),
            model_flops=program.model_flops / times,
            times=times,
        ),
        Program(name="update", function=train.update, arguments=(state, sums), model_flops=0.0),
    ]


def _grpo(
    run: PlannedRun,
    compute: Compute,
    config: GRPOConfig,
    optimizer: step.Optimizer,
    student: ModelConfig | None,
    target: Target,
) -> PlannedRun:
    decoder = run.decoder
    sharding = compute.sharding
    hosts = target.num_devices // target.devices_a_host
    plan = compute.plan
    layout = grpo.make_layout(config, plan, sharding.num_replicas)
    layout = grpo.fit_attention(layout, decoder)
    longest = longest_row(config, layout.per_row)
    # The longest row, because the plan must hold for every batch.
    length = min(b for b in layout.buckets if b >= longest)
    rows = plan.global_rows // layout.per_row // plan.microbatches
    batch = _batch(PolicyBatch, (plan.microbatches, rows, length), sharding)
    batch = batch._replace(ref_logprobs=batch.rollout_logprobs if config.beta else None)
    if config.updates_per_step > 1:
        batch = batch._replace(old_logprobs=batch.rollout_logprobs)
    num_tokens = plan.microbatches * rows * length
    content = _completions(config, layout.per_row)
    forward = flops.forward(decoder.config, plan.microbatches * rows, content)
    loss = grpo.make_loss(decoder, config, layout.per_row)
    train = compute.train_step(loss, decoder, optimizer)
    programs = [
        Program(
            name="update",
            function=train.whole,
            arguments=(run.state, batch, run.frozen()),
            model_flops=run.update_flops(forward, num_tokens) * config.num_iterations,
            content=content,
        )
    ]
    resident = dict(run.resident)
    score = grpo.make_logprobs_fn(decoder, config, layout.per_row)
    plain = batch._replace(ref_logprobs=None, old_logprobs=None)

    def scored(name: str, params: Any) -> Program:
        return Program(
            name=name,
            function=score,
            arguments=(params, plain),
            model_flops=forward,
            content=content,
        )

    if config.beta:
        if not decoder.lora:
            frozen = grpo.reference_decoder(config, decoder)
            resident["reference"] = step.abstract(frozen.shapes, frozen.placements())
        programs.append(scored("logprobs", resident["base" if decoder.lora else "reference"]))
    if config.updates_per_step > 1:
        programs.append(scored("old logprobs", run.whole))
    if config.rollout.backend == "local":
        policy = _Requests(
            name="",
            decoder=decoder,
            params=run.whole,
            prompts=layout.questions,
            samples=config.num_generations,
            prompt_tokens=config.max_prompt_length,
            new_tokens=config.max_new_tokens,
        )
        sampling = _sampling(config)
        max_rows = config.rollout.max_rows * hosts
        programs += _generation(policy, sampling, max_rows)
        if student is not None:
            frozen = compute.frozen_decoder(student)
            resident["student"] = step.abstract(frozen.shapes, frozen.placements())
            for asked in _student(config, frozen, resident["student"], layout.questions):
                programs += _generation(asked, sampling, max_rows)
    return run._replace(programs=programs, resident=resident, num_tokens=num_tokens)


def _sampling(config: GRPOConfig) -> Sampling:
    return Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
    )


def _gkd(
    run: PlannedRun,
    compute: Compute,
    config: GKDConfig,
    optimizer: step.Optimizer,
    teacher: ModelConfig | None,
    target: Target,
) -> PlannedRun:
    decoder = run.decoder
    plan = compute.plan
    shape = plan.microbatches, plan.global_rows // plan.microbatches, config.max_seq_length
    batch = _batch(TeacherBatch, shape, compute.sharding)
    frozen = None if config.servers_option else compute.frozen_decoder(teacher or decoder.config)
    others: dict[str, Any] = {}
    if frozen is None:
        batch = batch._replace(top=_top_tokens(config, shape, compute.sharding))
    else:
        if config.teacher_reads == "lesson":
            batch = batch._replace(
                teacher=_batch(Batch, shape, compute.sharding), sources=batch.positions
            )
        # What LoRA adapts may be the teacher too.
        is_base = not config.teacher and decoder.lora
        weights = step.abstract(frozen.shapes, frozen.placements())
        others["teacher"] = run.resident["base"] if is_base else weights
    content = even(config.max_seq_length, 1)
    models = [decoder, *([frozen] if frozen else [])]
    needed = [flops.forward(model.config, plan.global_rows, content) for model in models]
    train = compute.train_step(gkd.make_loss(decoder, frozen, config), decoder, optimizer)
    programs = [
        Program(
            name="train",
            function=train.whole,
            arguments=(run.state, batch, run.frozen(**others)),
            model_flops=run.update_flops(needed[0], math.prod(shape)) + sum(needed[1:]),
            content=content,
        )
    ]
    if config.lmbda:
        policy = _Requests(
            name="",
            decoder=decoder,
            params=run.whole,
            prompts=math.ceil(plan.global_rows * config.lmbda),
            samples=1,
            prompt_tokens=config.max_seq_length - config.max_new_tokens,
            new_tokens=config.max_new_tokens,
        )
        hosts = target.num_devices // target.devices_a_host
        sampling = Sampling(config.temperature)
        programs += _generation(policy, sampling, config.max_decode_rows * hosts)
    num_tokens = math.prod(shape)
    if others.get("teacher") is not run.resident.get("base"):
        run = run._replace(resident=run.resident | others)
    return run._replace(programs=programs, num_tokens=num_tokens)


def _batch(cls: type[Any], shape: tuple[int, ...], sharding: Sharding) -> Any:
    """Returns the shapes of a batch; fields that may be None are."""
    place = sharding.rows(None)

    def array(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    kinds = {"loss_mask": bool, "advantages": jnp.float32, "rollout_logprobs": jnp.float32}
    needed = [name for name in cls._fields if name not in cls._field_defaults]
    return cls(**{name: array(kinds.get(name, jnp.int32)) for name in needed})


def _top_tokens(config: GKDConfig, shape: tuple[int, ...], sharding: Sharding) -> TopTokens:
    """Returns the shapes of what a teacher's servers say of rows."""
    place = sharding.rows(None)
    count = config.scoring.top_tokens
    return TopTokens(
        ids=jax.ShapeDtypeStruct((*shape, count), jnp.int32, sharding=place),
        logprobs=jax.ShapeDtypeStruct((*shape, count + 1), jnp.float32, sharding=place),
    )


def _completions(config: GRPOConfig, per_row: int) -> RowContent:
    """Returns a row of the longest completions, with their shared prompt or with their own."""
    own = config.max_prompt_length + config.max_new_tokens
    if per_row == 1 or config.has_episodes:
        return RowContent((own,) * per_row)
    return RowContent((config.max_new_tokens,) * per_row, config.max_prompt_length)


class _Requests(NamedTuple):
    """One call of local generation."""

    name: str
    """Prefix of its programs' names."""
    decoder: Decoder
    params: Any
    prompts: int
    """Number of prompts, over all devices."""
    samples: int
    """Completions of each prompt."""
    prompt_tokens: int
    """Longest prompt."""
    new_tokens: int
    """Longest completion."""


def _student(config: GRPOConfig, decoder: Decoder, params: Any, questions: int) -> list[_Requests]:
    """Returns what the student is asked: questions alone and for an approach, and each lesson.

    A question is taken to be as long as the teacher's prompt may be, a lesson to come on top of it.
    """
    alone = _Requests(
        name="alone ",
        decoder=decoder,
        params=params,
        prompts=(config.rollout.num_baseline + 1) * questions,
        samples=1,
        prompt_tokens=config.max_prompt_length,
        new_tokens=max(config.answer_tokens, config.teaching.max_probe_tokens),
    )
    longest = decoder.config.max_positions - config.answer_tokens
    guided = alone._replace(
        name="guided ",
        prompts=questions * config.num_generations * config.rollout.num_guided,
        prompt_tokens=min(config.max_prompt_length + config.max_new_tokens, longest),
        new_tokens=config.answer_tokens,
    )
    return [alone, guided]


def _generation(asked: _Requests, sampling: Sampling, max_rows: int) -> list[Program]:
    """Returns the programs that run prompts, and that decode when the longest rows are full."""
    decoder = asked.decoder
    params = asked.params
    sharding = decoder.sharding
    samples = asked.samples
    parts = sharding.num_replicas
    share = max(max_rows // (samples * parts), 1)
    prompts = parts << (share.bit_length() - 1)
    prompts = min(prompts, parts * local.bucket(-(-asked.prompts // parts)))
    length = local.prompt_room(asked.prompt_tokens)
    static = decoder, (0,), sampling
    questions = local.GridPrompts(
        tokens=_rows((prompts, length), jnp.int32, sharding),
        lengths=_rows((prompts,), jnp.int32, sharding),
    )
    rows = local.GridRows(
        limits=_rows((prompts, samples), jnp.int32, sharding),
        seeds=_rows((prompts, samples), jnp.uint32, sharding),
        streams=_rows((prompts, samples), jnp.int32, sharding),
    )
    weights = kv.weight_shapes(decoder)
    inputs = params, weights, questions, rows
    held = local.last_room(asked.new_tokens)
    rooms = local.Room(prompt=local.cached_room(length), own=held)
    grid, _ = jax.eval_shape(functools.partial(local.start, *static, rooms), *inputs)
    places = local.placements(sharding)
    grid = jax.tree.map(step.abstract, grid, jax.tree.broadcast(places, grid))
    first = rooms._replace(own=local.first_room(asked.new_tokens))
    each = decoder.config.flops_per_token(2 * (local.cached_room(length) + held)) / 3
    until = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated)
    rounds = -(-asked.prompts // prompts)
    content = even(length, 1)
    return [
        Program(
            name=f"{asked.name}prefill",
            function=jax.jit(functools.partial(local.start, *static, first)),
            arguments=inputs,
            model_flops=flops.forward(decoder.config, prompts, content),
            times=rounds,
            content=content,
        ),
        Program(
            name=f"{asked.name}decode {local.CHUNK}",
            function=jax.jit(functools.partial(local.decode, *static), donate_argnums=1),
            arguments=(weights, grid, until),
            model_flops=local.CHUNK * prompts * samples * each,
            times=rounds * -(-asked.new_tokens // local.CHUNK),
        ),
    ]


def _rows(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows())
