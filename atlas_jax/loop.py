"""The training loop: batch, step, log, save, evaluate, stop. It is the same for every recipe."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import jax
from absl import logging

from atlas_jax import distributed, metrics, stopping
from atlas_jax.checkpoint.manager import Checkpoints
from atlas_jax.metrics import MetricWriter
from atlas_jax.options.train import TrainConfig, masked
from atlas_jax.step import TrainState
from atlas_jax.stopping import StopRequestedError
from atlas_jax.types import DependencyError, Metrics, Params

if TYPE_CHECKING:
    from atlas_jax.display import RunDisplay
    from atlas_jax.profiling import Profile

_UNLOGGED = "metrics"
"""Key in a checkpoint's `data` for the metrics of the steps since the last line of the log."""


class StepInput(NamedTuple):
    """The batch of one step."""

    batch: Any  # placed arrays, [microbatches, B, T], or a list of them, see `step.TrainStep`
    num_tokens: int  # tokens that its updates read, over all processes, without padding
    metrics: Metrics  # metrics of making the batch, over all processes


_PAUSE_SECS = 2.0
"""Seconds between two checks, in a pause, for a request to stop."""


@runtime_checkable
class BatchSource(Protocol):
    """A source of batches, with the position in them."""

    @property
    def samples_policy(self) -> bool:
        """True if batches are made with the parameters of the state, as rollouts are.

        Each step's metrics are then fetched and checked before the next batch is made, so that the
        parameters of a failed step are never sampled. Otherwise the next step starts meanwhile.
        """

    def next(self, state: TrainState, pause: Callable[[float], None]) -> StepInput:
        """Returns the next batch.

        `pause` waits a number of seconds in every process. If `next` raises, `get_state` still
        returns the position before the batch.

        Raises:
            DependencyError: if the batch cannot be made, even after waiting.
            StopRequestedError: if the run was asked to stop.
        """

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch, in a form that JSON can store."""

    def get_reference(self) -> Params | None:
        """Returns the reference parameters if they change in training, else None."""


class Job(NamedTuple):
    """The constants of a training run: its step, its limits, and where it logs and saves."""

    config: TrainConfig
    num_steps: int
    flops_per_token: Callable[[float], float]  # FLOPs per token, by row length
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    evaluate: Callable[[TrainState], dict[str, float]] | None
    writer: MetricWriter
    checkpoints: Checkpoints
    keep_best: Callable[[TrainState, dict[str, float]], None] | None = None
    """Exports the state if its evaluation is the best one."""
    restored: Mapping[str, Any] = MappingProxyType({})
    """`data` of the checkpoint that the run resumes from."""


class Outcome(NamedTuple):
    """Result of a training run."""

    state: TrainState
    last: dict[str, float]  # metrics of the last logged step and the last evaluation
    stopped: bool  # whether a request ended it before its last step


class _Pending(NamedTuple):
    """A step whose metrics the devices are still computing."""

    step: int
    metrics: Metrics  # on the devices
    known: Metrics  # on the host
    tokens: int
    length: float


def run(job: Job, state: TrainState, feed: BatchSource) -> Outcome:
    """Trains until `job.num_steps`, or until the run is asked to stop, and saves its last state.

    An evaluation that fails because of an external service is logged, and training continues.

    Raises:
        RuntimeError: if a loss or gradient is not finite; nothing of that step is saved.
        DependencyError: if the feed cannot continue; the steps before are saved.
        OSError: if a checkpoint cannot be written.
    """
    training = _LoopState(job, state, feed)
    with stopping.training(), training.log.shown():
        try:
            training.catch_up()
            for step in range(int(state.step) + 1, job.num_steps + 1):
                training.step(step)
        except (DependencyError, StopRequestedError) as error:
            training.end()
            logging.warning(
                "stopped at step %d (%s); the same command continues", training.number, error
            )
            stopped = isinstance(error, StopRequestedError)
            stopping.request(str(error))  # ends threads that still work on later batches
            stopping.end_soon(stopping.EXIT_CODE if stopped else 1)
            if not stopped:
                raise
        else:
            training.end()
    return Outcome(training.state, training.log.last, training.number < job.num_steps)


class _LoopState:
    """A run in training: its state, and the step whose metrics are not fetched yet."""

    def __init__(self, job: Job, state: TrainState, feed: BatchSource) -> None:
        self.state = state
        self.log = _Log(job, int(state.step))
        self._job = job
        self._feed = feed
        self._pending: _Pending | None = None
        self._profile = _profile(job.config)

    @property
    def number(self) -> int:
        """Number of completed steps."""
        return int(self.state.step)

    def catch_up(self) -> None:
        """Evaluates the step that training begins with, if that is due and was not done."""
        config = self._job.config
        if self.number:  # killed or stopped before its evaluation
            due = _due(self.number, config.eval_steps) or self.number == self._job.num_steps
        else:
            due = config.eval_on_start
        if due and not self.log.has_evaluation(self.number):
            self._evaluate()

    def step(self, step: int) -> None:
        """Makes a batch and trains on it; logs, saves and evaluates if due.

        Raises:
            StopRequestedError: if the run was asked to stop, before or after the step.
        """
        config = self._job.config
        feed = self._feed
        # No earlier step is in flight then, so making the batch belongs to the time of this one.
        if feed.samples_policy:
            self.log.start_clock()
        if self._profile:
            self._profile.before(step)
        self.log.begin("writing" if feed.samples_policy else "reading rows")
        given = feed.next(self.state, _pause)
        self.log.begin("training")
        # The vote is queued before the step and read after it, so that no device waits for the
        # host.
        stop_anywhere = distributed.vote(stopping.requested())
        self.state, values = self._job.train_step(self.state, given.batch)
        if self._profile:
            self._profile.after(step, self.state)
        distributed.arrive(f"step {step}")
        # The metrics of the step before are read while the devices compute this one.
        self._fetch()
        length = _row_length(given.batch)
        self._pending = _Pending(
            step=step, metrics=values, known=given.metrics, tokens=given.num_tokens, length=length
        )
        stop = stop_anywhere()
        last = stop or step == self._job.num_steps
        save = last or _due(step, config.save_steps)
        # A run that is to stop has no time to evaluate; `catch_up` does it when the run continues.
        evaluate = (last and not stop) or _due(step, config.eval_steps)
        # No state is saved, evaluated or sampled before its loss is known to be finite.
        if save or evaluate or feed.samples_policy:
            self._fetch()
        # The checkpoint comes first, so that a failing evaluation does not lose the step.
        if save:
            self._save()
        if stop:
            raise StopRequestedError(stopping.reason() or "another process")
        if evaluate:
            self._evaluate()

    def end(self) -> None:
        """Saves the state, and waits until it is written, however long that takes."""
        if self._profile:
            self._profile.close()
        self._fetch()
        self._save()
        distributed.arrive(f"the checkpoint of step {self.number}")
        with stopping.saving():
            self._job.checkpoints.close()

    def _fetch(self) -> None:
        if self._pending:
            self.log.fetch(self._pending)
        self._pending = None

    def _save(self) -> None:
        checkpoints = self._job.checkpoints
        # `end` saves too, perhaps a step that was due by itself.
        if checkpoints.latest() == self.number:
            return
        data = self._feed.get_state() | {_UNLOGGED: self.log.unlogged()}
        self.log.begin("saving")
        with stopping.saving():
            checkpoints.save(self.state, data, masked(self._job.config), self._feed.get_reference())
        # The time of saving belongs to no step.
        self.log.start_clock()

    def _evaluate(self) -> None:
        """Evaluates if the run does; an evaluation whose servers fail is skipped."""
        if not self._job.evaluate:
            return
        self.log.begin("evaluating")
        try:
            with distributed.together(StopRequestedError, DependencyError):
                values = self._job.evaluate(self.state)
        except DependencyError as error:
            logging.error("step %d is not evaluated, and training goes on: %s", self.number, error)
            self.log.start_clock()
        else:
            if self._job.keep_best:
                # First: with its line in the log an evaluation is not done again.
                self._job.keep_best(self.state, values)
            self.log.write(self.number, values)


def _profile(config: TrainConfig) -> Profile | None:
    if not config.profile_steps or not distributed.is_main():
        return None
    from atlas_jax.profiling import Profile  # only `profile_steps` asks for it

    return Profile(config)


def _row_length(batch: Any) -> float:
    """Returns the length of rows, the mean one of parts of different lengths."""
    parts = batch if isinstance(batch, list) else [batch]
    sizes = [part.tokens.size for part in parts]
    rows = [part.tokens.size // part.tokens.shape[-1] for part in parts]
    return sum(sizes) / sum(rows)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _pause(secs: float) -> None:
    """Waits for `secs` seconds in every process; a request to stop ends the wait in all of them."""
    slices = max(1, math.ceil(secs / _PAUSE_SECS))
    for _ in range(slices):
        time.sleep(secs / slices)
        if distributed.any_process(stopping.requested()):
            raise StopRequestedError(stopping.reason() or "another process")


class _Log:
    """Sums of metrics between two lines of the log, with the time of the steps."""

    def __init__(self, job: Job, start: int) -> None:
        self._job = job
        before = job.restored.get(_UNLOGGED, {})
        self._total: Metrics = {k: tuple(v) for k, v in before.get("total", {}).items()}
        self._secs: list[float] = list(before.get("secs", []))
        self._tokens: float = before.get("tokens", 0.0)
        self._flops: float = before.get("flops", 0.0)
        self._mark = time.perf_counter()
        self.last: dict[str, float] = {}
        self._display = _display(job, start)

    def shown(self) -> contextlib.AbstractContextManager[None]:
        """Returns a block during which the terminal shows the run."""
        return self._display.shown() if self._display else contextlib.nullcontext()

    def begin(self, phase: str) -> None:
        """Says what is done now."""
        if self._display:
            self._display.begin(phase)

    def unlogged(self) -> dict[str, Any]:
        """Returns the sums since the last line, for JSON; a resumed run continues them."""
        total = {k: [float(x) for x in v] for k, v in self._total.items()}
        return {"total": total, "secs": self._secs, "tokens": self._tokens, "flops": self._flops}

    def has_evaluation(self, step: int) -> bool:
        """Returns whether the step was evaluated; every process gets the same answer."""
        return distributed.any_process(self._job.writer.last_evaluation == step)

    def start_clock(self) -> None:
        """Starts the next step's time now, without the time since the last step."""
        self._mark = time.perf_counter()

    def fetch(self, pending: _Pending) -> None:
        """Waits for the metrics of one step, checks them, and writes them if a line is due."""
        # This waits for the devices, so the clock is read after it.
        values = jax.device_get(pending.metrics)
        now = time.perf_counter()
        self._secs.append(now - self._mark)
        self._mark = now
        self._total = metrics.add(metrics.add(self._total, values), pending.known)
        self._tokens += pending.tokens
        self._flops += pending.tokens * self._job.flops_per_token(pending.length)
        self._check_finite(pending.step, values)
        if (
            _due(pending.step, self._job.config.logging_steps)
            or pending.step == self._job.num_steps
        ):
            self._flush(pending.step)
        if self._display:
            self._display.advance(pending.step)

    def _check_finite(self, step: int, values: Metrics) -> None:
        sums = metrics.add({}, values)
        means = metrics.means(sums)
        for name in ("loss/total", "optim/grad_norm"):
            # With a weight of 0 nothing was trained, and the mean is NaN without a fault.
            if sums[name][1] and not math.isfinite(means[name]):
                good = self._job.checkpoints.latest()
                where = (
                    "there is no checkpoint yet"
                    if good is None
                    else (
                        f"the last good checkpoint is {self._job.checkpoints.directory / str(good)}"
                    )
                )
                # Checkpoints of earlier steps may still be on their way to the disk.
                self._job.checkpoints.close()
                raise RuntimeError(
                    f"{name} is {means[name]} at step {step}; {where}. Lower learning_rate (now "
                    f"{self._job.config.learning_rate}) or look at the rows of that step"
                )

    def _flush(self, step: int) -> None:
        values = metrics.means(self._total)
        secs = sum(self._secs)
        devices = jax.device_count()
        values["perf/step_secs"] = secs / len(self._secs)
        values["perf/tokens_per_sec_per_device"] = self._tokens / secs / devices
        peak = metrics.peak_flops(jax.devices()[0])
        if peak:
            values["perf/mfu"] = self._flops / secs / devices / peak
        memory = metrics.peak_bytes(jax.local_devices()[0])
        if memory:
            values["perf/memory_peak_bytes"] = float(memory)
        self.write(step, values)
        self._total = {}
        self._secs = []
        self._tokens = 0.0
        self._flops = 0.0

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes metrics to all files, and as a line to `training.log`."""
        self._job.writer.write(step, values)
        self.last |= values
        if self._display:
            self._display.write(step, values)
        self._mark = time.perf_counter()


def _display(job: Job, start: int) -> RunDisplay | None:
    """Returns what shows the run; None in processes other than the first."""
    if not distributed.is_main():
        return None
    from atlas_jax.display import RunDisplay  # only the first process shows anything

    config = job.config
    return RunDisplay(
        config.algorithm, job.num_steps, start, every=config.summary_steps, mode=config.terminal
    )
