"""A step of a GRPO run once more, from what the run has stored, compared with its log.

`find` looks at the files alone, and `run` computes. Neither writes anything or asks a server.
Training goes on from the newest checkpoint before the step, with the loss, the batches and the
training step of `grpo.run`, over the stored samples of the steps between.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from atlas_jax import config as config_lib
from atlas_jax import metrics, saved_config, stopping, wording
from atlas_jax import step as training_step
from atlas_jax.checkpoint import hf, manager
from atlas_jax.checkpoint.manager import MODEL_FILES, Checkpoints
from atlas_jax.models import lora
from atlas_jax.models.config import from_hf
from atlas_jax.models.transformer import Decoder
from atlas_jax.options.grpo import GRPOConfig
from atlas_jax.options.train import MeshConfig
from atlas_jax.recipes import grpo
from atlas_jax.recipes.feed import PolicyBatches, measure, question_shares
from atlas_jax.recipes.layout import Layout, make_layout
from atlas_jax.rollout import stored
from atlas_jax.rollout.record import StepFacts
from atlas_jax.startup import directory, origins
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.directory import Origin
from atlas_jax.types import Metrics, Params, Sample

_STEP = re.compile(r"step_(\d+)(_process_\d+\.jsonl)?")


class MetricsLine(NamedTuple):
    """A line of `metrics.jsonl`, which with `logging_steps` is the mean of several steps."""

    first: int
    last: int
    values: dict[str, float]
    """Empty for a step that the log has no line of."""


class StoredRun(NamedTuple):
    """A stored step, and what there is to compute it from."""

    output_dir: pathlib.Path
    step: int
    config: GRPOConfig
    line: MetricsLine
    begins: int
    """The step after which the replay begins, of a checkpoint or 0."""


class Replayed(NamedTuple):
    """The metrics of a step that was computed once more, beside the logged ones."""

    step: int
    values: dict[str, float]
    """Metrics of the step."""
    line: MetricsLine
    again: dict[str, float]
    """Metrics of the steps of the line."""
    tolerance: float

    @property
    def different(self) -> list[str]:
        """Names of the logged metrics that the replay does not reproduce."""
        return [n for n in self.line.values if n in self.again and not self._is_equal(n)]

    def _is_equal(self, name: str) -> bool:
        logged = self.line.values[name]
        again = self.again[name]
        if math.isnan(logged) or math.isnan(again):
            return math.isnan(logged) and math.isnan(again)
        # A loss is a sum of terms of both signs, whose rounding does not shrink with it.
        least = 0.0 if name.startswith("optim/") else 0.1 * self.tolerance
        return abs(again - logged) <= max(self.tolerance * abs(logged), least)


def find(path: str, config: GRPOConfig | None = None) -> StoredRun:
    """Returns the step that `OUTPUT_DIR/rollouts/step_NUMBER` names.

    Args:
        path: of the step; the name of one of its files will do.
        config: options of the run; None takes those that the run has written.

    Raises:
        ValueError: in one line, for a step that is not stored.
        OSError: for a file that cannot be read.
    """
    place = pathlib.Path(path).expanduser().absolute()
    name = _STEP.fullmatch(place.name)
    if not name or place.parent.name != "rollouts":
        raise ValueError(f"--replay={path} is no step; give OUTPUT_DIR/rollouts/step_000123")
    step = int(name[1])
    output_dir = place.parent.parent
    recorded = stored.steps(place.parent)
    if step not in recorded:
        shown = ", ".join(_ranges(recorded)) or "none"
        raise ValueError(f"{place.parent} has no file of step {step}; it has those of {shown}")
    if config is None:
        saved = saved_config.load(str(output_dir / "config.json"))
        config = config_lib.freeze(saved.config, GRPOConfig)
    # A directory that was copied here has another name than in its config.
    config = dataclasses.replace(config, output_dir=str(output_dir))
    line = _line(output_dir / "metrics.jsonl", step)
    checkpoints = _checkpoints(output_dir)
    begins = max((c for c in checkpoints if c < line.first), default=0)
    missing = sorted({*range(begins + 1, line.last + 1)} - {*recorded})
    if missing:
        raise ValueError(
            f"step {step} cannot be computed: of the steps after {begins}, where training would go "
            f"on, {place.parent} has no file of {', '.join(_ranges(missing))}; "
            f"{_possible(recorded, {0, *checkpoints})}"
        )
    stored.read(place.parent, step)  # what is wrong with it is said before anything is loaded
    return StoredRun(output_dir=output_dir, step=step, config=config, line=line, begins=begins)


def run(found: StoredRun, devices: Sequence[jax.Device] | None = None) -> Replayed:
    """Computes the step.

    Args:
        found: from `find`.
        devices: devices that compute, or as many of them as divide the samples; None takes all.

    Raises:
        ValueError: in one line, for files that are missing or of another model.
        StopRequestedError: if the process was asked to stop.
    """
    folder = found.output_dir / "rollouts"
    facts = stored.read(folder, found.step).facts
    compute, decoder = _compute(found, facts.num_samples, devices or jax.devices())
    config = compute.config
    assert isinstance(config, GRPOConfig)
    layout = make_layout(config, compute.plan, compute.sharding.num_replicas)
    layout = grpo.fit_attention(layout, decoder)
    loss = grpo.make_loss(decoder, config, layout.per_row)
    logprobs_fn = grpo.make_logprobs_fn(decoder, config, layout.per_row)
    num_steps = _num_steps(facts.num_steps, config)
    optimizer = compute.optimizer(decoder, num_steps)
    state, reference = _begin(found, compute, decoder, optimizer)
    batches = PolicyBatches(config, layout, logprobs_fn, compute.sharding, reference)
    del reference
    train = compute.train_step(loss, decoder, optimizer)
    own: Metrics = {}
    whole: Metrics = {}
    with stopping.training():
        for number in range(found.begins + 1, found.line.last + 1):
            stopping.check()
            samples, facts = _share(stored.read(folder, number), layout, config)
            if _num_steps(facts.num_steps, config) != num_steps:
                # The command that trained this step had another end, and so another schedule.
                num_steps = _num_steps(facts.num_steps, config)
                optimizer = compute.optimizer(decoder, num_steps)
                train = compute.train_step(loss, decoder, optimizer)
            values = measure(samples, number - 1, config, facts.given_rewards, bool(config.student))
            batch, _ = batches.make(samples, state)
            state, trained = train(state, batch)
            values = metrics.add(values, jax.device_get(trained))
            if number >= found.line.first:
                whole = metrics.add(whole, values)
            if number == found.step:
                own = values
            logging.info("step %d is computed", number)
    return Replayed(
        step=found.step,
        values=metrics.means(own),
        line=found.line,
        again=metrics.means(whole),
        tolerance=1e-5 if compute.dtype == jnp.float32 else 1e-2,
    )


def report(replayed: Replayed) -> str:
    """Returns the metrics of a replay beside the logged ones, as a table with a verdict."""
    step = replayed.step
    line = replayed.line
    different = replayed.different
    compared = sorted(replayed.again.keys() & line.values.keys())
    # A line of several steps has their mean, and the step itself another value.
    columns = {f"step {step}": replayed.values} if line.first < line.last or not compared else {}
    if compared:
        columns |= {"logged": line.values, "replayed": replayed.again}
    text = [f"{'metric':<36}" + "".join(f"{head:>17}" for head in columns)]
    for name in compared or sorted(replayed.values):
        cells = (f"{values[name]:>17.8g}" for values in columns.values())
        text.append(f"{name:<36}{''.join(cells)}{'  differs' if name in different else ''}")
    if line.first < line.last:
        text.append(f"one line of the log has steps {line.first} to {line.last}: their mean")
    others = sorted({name.partition("/")[0] for name in line.values.keys() - {*compared}})
    if compared and others:
        text.append(f"not computed again, since it is of clocks and servers: {', '.join(others)}")
    verdict = f"all {len(compared)} metrics are as logged, to {replayed.tolerance:g}"
    if different:
        verdict = f"{len(different)} of {len(compared)} metrics differ: {', '.join(different)}"
    elif not compared:
        verdict = "the log has no line of this step"
    return "\n".join([*text, f"step {step}: {verdict}"])


def _line(path: pathlib.Path, step: int) -> MetricsLine:
    """Returns the line of the log that the step is in."""
    before = 0
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        values = json.loads(text) if text.endswith("\n") else {}  # a kill may cut a line off
        if "loss/total" not in values:  # of an evaluation
            continue
        last = values.pop("step")
        if last >= step:
            numbers = {n: math.nan if v is None else float(v) for n, v in values.items()}
            return MetricsLine(before + 1, last, numbers)
        before = last
    return MetricsLine(step, step, {})


def _checkpoints(output_dir: pathlib.Path) -> list[int]:
    """Returns the steps with a checkpoint from which a run can continue."""
    # One that is being written has no number yet.
    paths = [p for p in (output_dir / "checkpoints").glob("*") if p.name.isdigit()]
    return sorted(int(path.name) for path in paths if not manager.is_stripped(path))


def _possible(recorded: Sequence[int], beginnings: Iterable[int]) -> str:
    """Returns which steps can be computed after `beginnings`, as a sentence part."""
    possible: list[int] = []
    for begins in beginnings:
        number = begins + 1
        while number in recorded:
            possible.append(number)
            number += 1
    names = ", ".join(_ranges(sorted(set(possible))))
    return f"steps that can be: {names}" if names else "no other step can be"


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Returns sorted numbers as words, neighbours as `first to last`."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    words = [f"{g[0]} to {g[-1]}" if len(g) > 1 else str(g[0]) for g in groups]
    return wording.shorten(words, 8)


def _num_steps(recorded: int, config: GRPOConfig) -> int:
    """Returns the steps of the run, which files of earlier versions do not say.

    Raises:
        ValueError: if the config does not say it either.
    """
    number = recorded or config.max_steps
    if number < 1:
        raise ValueError(
            "the files of this step do not say how many steps the run has, on which the learning "
            "rate depends; give --config OUTPUT_DIR/config.json --config.max_steps=NUMBER"
        )
    return number


def _compute(
    found: StoredRun, num_samples: int, devices: Sequence[jax.Device]
) -> tuple[Compute, Decoder]:
    """Returns how the step is computed on the devices that are here, on most of them.

    Raises:
        ValueError: if no number of devices divides the samples and the parameters.
    """
    path = found.output_dir / MODEL_FILES / "config.json"
    if not path.exists():
        raise ValueError(f"{path} is missing; copy the whole output_dir of the run")
    architecture = from_hf(json.loads(path.read_text()))
    several = jax.process_count() > 1  # each of which must have a part
    problem: ValueError | None = None
    counts = [len(devices)] if several else range(len(devices), 0, -1)
    for count, config in itertools.product(counts, _fitting(found.config, num_samples)):
        try:
            compute = Compute.of(config, devices[:count])
            if compute.plan.global_rows == num_samples:
                make_layout(config, compute.plan, compute.sharding.num_replicas)
                return compute, compute.decoder(architecture)
        except ValueError as error:
            problem = problem or error
    raise problem or ValueError(f"{num_samples} samples do not divide over {len(devices)} devices")


def _fitting(config: GRPOConfig, num_samples: int) -> list[GRPOConfig]:
    """Returns the config as it is, and others with the same rows for other numbers of devices."""
    sized = dataclasses.replace(config, train_batch_size=num_samples, gradient_accumulation_steps=0)
    return [config, sized, dataclasses.replace(sized, mesh=MeshConfig())]


def _begin(
    found: StoredRun, compute: Compute, decoder: Decoder, optimizer: training_step.Optimizer
) -> tuple[training_step.TrainState, Params | None]:
    """Returns the state that the replay begins with, and the reference there.

    Raises:
        ValueError: if weights that the run began with are needed and not at hand.
    """
    config = found.config
    before = directory.started(config.output_dir)
    origin = before.origin if before else Origin(config.model_name_or_path)
    checkpoints = Checkpoints(config.output_dir, create=False)
    steps = _checkpoints(found.output_dir)
    restored = found.begins if found.begins in steps else None
    where = f"checkpoint {restored}" if restored is not None else str(origin)
    logging.info("computes %d steps from %s on", found.line.last - found.begins, where)
    try:
        state = _state(restored, origin, checkpoints, compute, decoder, optimizer)
        if not config.beta:
            return state, None
        if state.frozen is not None:
            return state, state.frozen
        frozen = grpo.reference_decoder(config, decoder)
        return state, origins.reference(frozen, checkpoints, origin, state)
    except (OSError, ValueError) as error:
        left = "no checkpoint before it is left, and " if restored is None else ""
        recorded = stored.steps(found.output_dir / "rollouts")
        others = f"; {_possible(recorded, steps)}" if restored is None else ""
        raise ValueError(f"step {found.step} cannot be computed: {left}{error}{others}") from error
    finally:
        checkpoints.close()


def _state(
    restored: int | None,
    origin: Origin,
    checkpoints: Checkpoints,
    compute: Compute,
    decoder: Decoder,
    optimizer: training_step.Optimizer,
) -> training_step.TrainState:
    """Returns the state of a checkpoint, or that of the beginning."""
    config = compute.config
    base = None
    frozen = None
    if decoder.lora is not None:
        base = hf.open_source(hf.resolve(config.model_name_or_path))
        origins.check_same_base(Origin(config.output_dir), hf.digest(base))
        frozen = hf.load(base, decoder)
    if restored is not None and checkpoints.has_training_state(restored):
        state = checkpoints.restore(restored, compute.abstract_state(decoder, optimizer)).state
        return state._replace(frozen=frozen)
    if restored is not None:
        trained = decoder.trained
        shapes = training_step.abstract(trained.shapes, trained.placements)
        params = checkpoints.restore_params(restored, shapes)
    elif decoder.lora is not None and not config.resume_from:
        params = lora.init(decoder, config.seed)
    else:
        params = origins.load(origin, decoder, base=base)
    return compute.state(params, optimizer, frozen)


def _share(
    step: stored.StoredStep, layout: Layout, config: GRPOConfig
) -> tuple[list[Sample], StepFacts]:
    """Returns this process's samples of a step.

    Raises:
        ValueError: if the step has another number of samples than the one that is replayed.
    """
    size = config.num_generations
    shares = question_shares(layout.questions)
    if len(step.samples) != layout.questions * size:
        raise ValueError(
            f"a step before has {len(step.samples)} samples, and this one {layout.questions * size}"
            ": the run went on with another batch size, over which no replay goes"
        )
    first = sum(shares[: jax.process_index()]) * size
    return step.samples[first : first + shares[jax.process_index()] * size], step.facts
