"""The training loop: batch, step, log, evaluate, save, stop. It knows no algorithm."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from absl import logging
from tqdm import tqdm

from atlas_jax import distributed, metrics
from atlas_jax.checkpoint.manager import Checkpoints
from atlas_jax.config import TrainConfig, masked
from atlas_jax.metrics import MetricWriter
from atlas_jax.step import TrainState
from atlas_jax.stopping import StopRequestedError
from atlas_jax.types import DependencyError, Metrics, Params


class StepInput(NamedTuple):
    """What one step trains on."""

    batch: Any  # placed arrays, [microbatches, B, T]
    num_tokens: int  # that its updates read over all processes, padding left out
    metrics: Metrics  # of how it came about, over all processes


_PAUSE_SECS = 2.0
"""A pause looks this often whether the run is to stop."""


@runtime_checkable
class Feed(Protocol):
    """Where batches come from, and the position in them."""

    def next(self, state: TrainState, pause: Callable[[float], None]) -> StepInput:
        """Returns the next batch; completions are sampled from the state's parameters.

        `pause` waits for so many seconds, in every process, and raises `StopRequestedError` when a
        signal has come. Where `next` raises, `get_state` is still the position before the batch.

        Raises:
            DependencyError: if the batch cannot be made, waiting included.
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
    """Trains until `job.num_steps`, or until SIGTERM or SIGINT, and saves where it stopped.

    Metrics of a step are fetched when the next one has been dispatched, so that devices never wait
    for the log.

    Raises:
        RuntimeError: when a loss or gradient is not finite; nothing of that step is saved.
        DependencyError: when the feed cannot go on; the steps before it are saved.
    """
    start = int(state.step)
    log = _Log(job, start)
    pending: _Pending | None = None
    with _stop_signal() as stop_requested, log.progress:
        for step in range(start + 1, job.num_steps + 1):
            try:
                given = feed.next(state, _pause(stop_requested))
            except (DependencyError, StopRequestedError) as error:
                if pending:
                    log.fetch(pending)
                _save(job, state, feed)
                _log_stop(int(state.step), error)
                if isinstance(error, DependencyError):
                    job.checkpoints.close()
                    raise
                break
            stop_anywhere = distributed.vote(stop_requested())
            state, values = job.train_step(state, given.batch)
            distributed.arrive(f"step {step}")
            if pending:
                log.fetch(pending)
            length = given.batch.tokens.shape[-1]
            pending = _Pending(step, values, given.metrics, given.num_tokens, length)
            stop = stop_anywhere()
            last = stop or step == job.num_steps
            save = last or _due(step, job.config.save_steps)
            evaluate = job.evaluate and ((last and not stop) or _due(step, job.config.eval_steps))
            if save or evaluate:
                log.fetch(pending)
                pending = None
            if evaluate and job.evaluate:
                log.write(step, job.evaluate(state))
            if save:
                _save(job, state, feed)
            if stop:
                _log_stop(step, StopRequestedError("a signal"))
                break
    job.checkpoints.close()
    return Outcome(state, log.last, int(state.step) < job.num_steps)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _pause(stop_requested: Callable[[], bool]) -> Callable[[float], None]:
    """Returns the function that a feed waits with."""

    def pause(secs: float) -> None:
        slices = max(1, math.ceil(secs / _PAUSE_SECS))
        for _ in range(slices):
            time.sleep(secs / slices)
            if distributed.any_process(stop_requested()):
                raise StopRequestedError("a signal, while it waited")

    return pause


def _log_stop(step: int, why: Exception) -> None:
    logging.warning("stopped at step %d by %s; the same command continues", step, why)


def _save(job: Job, state: TrainState, feed: Feed) -> None:
    if job.checkpoints.latest() == int(state.step):
        return
    config, reference = masked(job.config), feed.get_reference()
    job.checkpoints.save(state, feed.get_state(), config, reference)


class _Log:
    """Adds up metrics between two lines of the log, and times the steps."""

    def __init__(self, job: Job, start: int) -> None:
        self._job = job
        self._total: Metrics = {}
        self._secs: list[float] = []
        self._tokens = self._flops = 0.0
        self._mark = time.perf_counter()
        self.last: dict[str, float] = {}
        self.progress = tqdm(
            total=job.num_steps, initial=start, unit="step", disable=not distributed.is_main(),
            dynamic_ncols=True, mininterval=1.0, desc=job.config.algorithm,
        )  # fmt: skip

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
        weighed = {name: value for name, value in values.items() if value[1]}
        found = metrics.means(metrics.add({}, weighed))
        for name in ("loss/total", "optim/grad_norm"):
            if not math.isfinite(found.get(name, 0.0)):
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


@contextlib.contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM or SIGINT came; a second one acts as usual."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)

    def remember(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous = {int(n): signal.signal(n, remember) for n in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
