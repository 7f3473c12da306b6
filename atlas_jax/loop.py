"""The training loop: batch, step, log, save, evaluate, stop. It knows no algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from absl import logging
from tqdm import tqdm

from atlas_jax import distributed, metrics, stopping
from atlas_jax.checkpoint.manager import Checkpoints
from atlas_jax.config import TrainConfig, masked
from atlas_jax.metrics import MetricWriter
from atlas_jax.profiling import Profile
from atlas_jax.step import TrainState
from atlas_jax.stopping import StopRequestedError
from atlas_jax.types import DependencyError, Metrics, Params

_UNLOGGED = "metrics"
"""Key of a checkpoint's `data` with the metrics of the steps since the last line of the log."""


class StepInput(NamedTuple):
    """What one step trains on."""

    batch: Any  # placed arrays, [microbatches, B, T]
    num_tokens: int  # read by its updates over all processes, padding left out
    metrics: Metrics  # of how it came about, over all processes


_PAUSE_SECS = 2.0
"""A pause looks this often whether the run is to stop."""


@runtime_checkable
class Feed(Protocol):
    """Where batches come from, and the position in them."""

    @property
    def samples_policy(self) -> bool:
        """Whether batches are made with the parameters of the state, as rollouts are.

        Then each step's metrics are fetched before the next batch is made, so that parameters of a
        step that went wrong are never sampled. Otherwise the devices go on meanwhile.
        """

    def next(self, state: TrainState, pause: Callable[[float], None]) -> StepInput:
        """Returns the next batch.

        `pause` waits for so many seconds in every process. Where `next` raises, `get_state` is
        still the position before the batch.

        Raises:
            DependencyError: if the batch cannot be made, waiting included.
            StopRequestedError: if the run is to stop.
        """

    def get_state(self) -> dict[str, Any]:
        """Returns the position behind the last batch, ready for JSON."""

    def get_reference(self) -> Params | None:
        """Returns reference parameters that change while training; None if there are none."""


class Job(NamedTuple):
    """What stays the same while a run trains."""

    config: TrainConfig
    num_steps: int
    flops_per_token: Callable[[int], float]  # by row length
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    evaluate: Callable[[TrainState], dict[str, float]] | None
    writer: MetricWriter
    checkpoints: Checkpoints
    healthy: Mapping[str, tuple[float, float]] = MappingProxyType({})  # metric -> its range
    restored: Mapping[str, Any] = MappingProxyType({})  # `data` of the checkpoint, if there is one


class Outcome(NamedTuple):
    """How a run ended."""

    state: TrainState
    last: dict[str, float]  # metrics of the last logged step and the last evaluation
    stopped: bool  # by a signal, before its last step


class _Pending(NamedTuple):
    """A step whose metrics the devices still compute."""

    step: int
    metrics: Metrics  # on the devices
    known: Metrics  # on the host
    tokens: int
    length: int


def run(job: Job, state: TrainState, feed: Feed) -> Outcome:
    """Trains until `job.num_steps`, or until the run is asked to stop, and saves where it ended.

    An evaluation that fails because of something outside is logged, and the run goes on.

    Raises:
        RuntimeError: when a loss or gradient is not finite; nothing of that step is saved.
        DependencyError: when the feed cannot go on; the steps before it are saved.
        OSError: if a checkpoint cannot be written.
    """
    training = _Training(job, state, feed)
    with stopping.training(), training.log.progress:
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
            stopping.request(str(error))  # whatever still works on later batches gives up
            stopping.end_soon(stopping.EXIT_CODE if stopped else 1)
            if not stopped:
                raise
        else:
            training.end()
    return Outcome(training.state, training.log.last, training.number < job.num_steps)


class _Training:
    """A run while it trains: its state, and the step whose metrics are not fetched yet."""

    def __init__(self, job: Job, state: TrainState, feed: Feed) -> None:
        self.state = state
        self.log = _Log(job, int(state.step))
        self._job = job
        self._feed = feed
        self._pending: _Pending | None = None
        self._profile = Profile(job.config)

    @property
    def number(self) -> int:
        """Steps that are done."""
        return int(self.state.step)

    def catch_up(self) -> None:
        """Evaluates the step that the run continues from, if a kill came before its evaluation."""
        due = _due(self.number, self._job.config.eval_steps)
        if self.number and due and not self.log.has_evaluation(self.number):
            self._evaluate()

    def step(self, step: int) -> None:
        """Makes a batch and trains on it; logs, saves and evaluates what is due.

        Raises:
            StopRequestedError: if the run was asked to stop; the step may be done and saved.
        """
        config, feed = self._job.config, self._feed
        if feed.samples_policy:
            self.log.start_clock()
        self._profile.before(step)
        given = feed.next(self.state, _pause)
        stop_anywhere = distributed.vote(stopping.requested())
        self.state, values = self._job.train_step(self.state, given.batch)
        self._profile.after(step, self.state)
        distributed.arrive(f"step {step}")
        self._fetch()
        length = given.batch.tokens.shape[-1]
        self._pending = _Pending(step, values, given.metrics, given.num_tokens, length)
        stop = stop_anywhere()
        last = stop or step == self._job.num_steps
        save = last or _due(step, config.save_steps)
        evaluate = (last and not stop) or _due(step, config.eval_steps)
        if save or evaluate or feed.samples_policy:
            self._fetch()
        # The checkpoint comes first: nothing of this step is lost if its evaluation fails.
        if save:
            self._save()
        if stop:
            raise StopRequestedError(stopping.reason() or "another process")
        if evaluate:
            self._evaluate()

    def end(self) -> None:
        """Saves the state, and waits until it is written, however long that takes."""
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
        if checkpoints.latest() == self.number:
            return
        data = self._feed.get_state() | {_UNLOGGED: self.log.unlogged()}
        with stopping.saving():
            checkpoints.save(self.state, data, masked(self._job.config), self._feed.get_reference())
        self.log.start_clock()

    def _evaluate(self) -> None:
        """Evaluates, if the run does; an evaluation whose servers fail is left out."""
        if not self._job.evaluate:
            return
        try:
            with distributed.together(StopRequestedError, DependencyError):
                values = self._job.evaluate(self.state)
        except DependencyError as error:
            logging.error("step %d is not evaluated, and training goes on: %s", self.number, error)
            self.log.start_clock()
        else:
            self.log.write(self.number, values)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _pause(secs: float) -> None:
    """Waits for so many seconds; in every process, which all stop together."""
    slices = max(1, math.ceil(secs / _PAUSE_SECS))
    for _ in range(slices):
        time.sleep(secs / slices)
        if distributed.any_process(stopping.requested()):
            raise StopRequestedError(stopping.reason() or "another process")


class _Log:
    """Adds up metrics between two lines of the log, and times the steps."""

    def __init__(self, job: Job, start: int) -> None:
        self._job = job
        before = job.restored.get(_UNLOGGED, {})
        self._total: Metrics = {k: tuple(v) for k, v in before.get("total", {}).items()}
        self._secs: list[float] = list(before.get("secs", []))
        self._tokens: float = before.get("tokens", 0.0)
        self._flops: float = before.get("flops", 0.0)
        self._mark = time.perf_counter()
        self.last: dict[str, float] = {}
        self.progress = tqdm(
            total=job.num_steps, initial=start, unit="step", disable=not distributed.is_main(),
            dynamic_ncols=True, mininterval=1.0, desc=job.config.algorithm,
        )  # fmt: skip

    def unlogged(self) -> dict[str, Any]:
        """Returns the sums since the last line, ready for JSON; a resumed run adds to them."""
        total = {k: [float(x) for x in v] for k, v in self._total.items()}
        return {
            "total": total, "secs": self._secs, "tokens": self._tokens, "flops": self._flops,
        }  # fmt: skip

    def has_evaluation(self, step: int) -> bool:
        """Returns whether the step was evaluated, in every process."""
        return distributed.any_process(self._job.writer.last_evaluation == step)

    def start_clock(self) -> None:
        """Leaves the time until now out of the next step's."""
        self._mark = time.perf_counter()

    def fetch(self, pending: _Pending) -> None:
        """Waits for the metrics of one step, checks them, and writes them when it is time."""
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
        self.progress.update()

    def _check_finite(self, step: int, values: Metrics) -> None:
        sums = metrics.add({}, values)
        found = metrics.means(sums)
        for name in ("loss/total", "optim/grad_norm"):
            if sums[name][1] and not math.isfinite(found[name]):  # without weight nothing trained
                good = self._job.checkpoints.latest()
                where = (
                    "there is no checkpoint yet"
                    if good is None
                    else (
                        f"the last good checkpoint is {self._job.checkpoints.directory / str(good)}"
                    )
                )
                self._job.checkpoints.close()
                raise RuntimeError(
                    f"{name} is {found[name]} at step {step}; {where}. Lower learning_rate (now "
                    f"{self._job.config.learning_rate}) or look at the rows of that step"
                )

    def _flush(self, step: int) -> None:
        values = metrics.means(self._total)
        secs, devices = sum(self._secs), jax.device_count()
        values["perf/step_secs"] = secs / len(self._secs)
        values["perf/tokens_per_sec_per_device"] = self._tokens / secs / devices
        peak = metrics.peak_flops(jax.devices()[0])
        if peak:
            values["perf/mfu"] = self._flops / secs / devices / peak
        self.write(step, values)
        self.progress.set_postfix(
            loss=f"{values['loss/total']:.3f}",
            lr=f"{values['optim/learning_rate']:.1e}",
            tok_s=f"{self._tokens / secs:.0f}",
        )
        self._total, self._secs, self._tokens, self._flops = {}, [], 0.0, 0.0

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes metrics to all files, and as a line to `training.log`."""
        self._job.writer.write(step, values)
        self.last |= values
        shown = " ".join(f"{name}={value:.4g}" for name, value in values.items())
        logging.info("step %d/%d %s", step, self._job.num_steps, shown)
        for name, (low, high) in self._job.healthy.items():
            value = values.get(name, math.nan)
            if value < low or value > high:
                logging.warning("%s=%.4g is outside %g to %g", name, value, low, high)
        self._mark = time.perf_counter()
