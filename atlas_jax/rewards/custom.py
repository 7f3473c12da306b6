"""Rewards that are functions of a user: by reference in `reward.names`, or as objects.

Sync functions by reference run in worker processes, which are killed when they hang; async ones run
on an event loop; objects run in a thread. A timeout, an exception and a wrong result are failures
of the samples of that call, and never end the run by themselves.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from atlas_jax import sockets, stopping
from atlas_jax.event_loop import EventLoopThread
from atlas_jax.rewards import forms
from atlas_jax.rewards.combined import failure
from atlas_jax.rewards.forms import Form, FunctionResult, UserFunction
from atlas_jax.rewards.workers import Workers
from atlas_jax.types import Reward, RewardFn, Sample

_GRACE_SECS = 5.0  # that an event loop has to notice a timeout
_LOOK_SECS = 0.5  # longest time from a request to stop until a wait ends

Runner = Callable[[Sequence[Sequence[Sample]]], list[FunctionResult]]
"""Calls a function once for each list of samples."""


def by_reference(
    reference: str,
    label: str,
    timeout_secs: float,
    num_workers: int,
    stack: contextlib.ExitStack,
) -> RewardFn:
    """Returns the reward that a reference names.

    Args:
        reference: `package.module:function`.
        label: its short name in reasons.
        timeout_secs: the time after which a call fails.
        num_workers: processes that run a sync function.
        stack: ends the processes or the event loop when it is closed.

    Raises:
        ValueError: for a reference that names no reward.
    """
    function, form = forms.find(reference)
    if forms.is_async(function):
        return _on_event_loop(function, form, label, timeout_secs, stack)
    workers = stack.enter_context(contextlib.closing(Workers(reference, timeout_secs, num_workers)))
    return _reward(label, form, workers.run, False)


def by_object(
    function: UserFunction, label: str, timeout_secs: float, stack: contextlib.ExitStack
) -> RewardFn:
    """Returns the reward that a function computes, which was given as an object.

    Args:
        function: the function.
        label: its short name in reasons.
        timeout_secs: the time after which a call fails.
        stack: ends the event loop when it is closed.

    Raises:
        ValueError: if its parameters fit no form.
    """
    form = forms.form_of(function, label)
    if forms.is_async(function):
        return _on_event_loop(function, form, label, timeout_secs, stack)
    logging.info(
        "the reward %s runs in a thread, which cannot be killed: after reward.timeout_secs=%g its "
        "sample fails and the call goes on; a name (package.module:function) runs in processes",
        *(label, timeout_secs),
    )
    return _reward(label, form, _Threads(function, form, timeout_secs).run, False)


def _on_event_loop(
    function: UserFunction,
    form: Form,
    label: str,
    timeout_secs: float,
    stack: contextlib.ExitStack,
) -> RewardFn:
    calls = stack.enter_context(contextlib.closing(_Coroutines(function, form, timeout_secs)))
    return _reward(label, form, calls.run, True)


def _reward(label: str, form: Form, run: Runner, is_retryable: bool) -> RewardFn:
    """Returns the reward whose calls `run` makes.

    Samples of which a text failed are not shown to the function.
    """
    failures = _Failures(label)

    def score(samples: Sequence[Sample]) -> list[Reward]:
        rewards = [failure(_texts(sample)) for sample in samples]
        places = [i for i, reward in enumerate(rewards) if reward is None]
        calls = [[i] for i in places] if form is Form.SAMPLE else [places] if places else []
        outcomes = run([[samples[i] for i in call] for call in calls])
        for call, outcome in zip(calls, outcomes, strict=True):
            if outcome.error:
                failures.count(outcome.error, len(call))
            values = outcome.values or [None] * len(call)
            for i, value in zip(call, values, strict=True):
                rewards[i] = _one(label, value, outcome.error, is_retryable)
        return [reward for reward in rewards if reward is not None]

    return score


def _one(label: str, value: float | None, error: str, is_retryable: bool) -> Reward:
    if error:
        details = {"unscored": f"{label}: {error}", "error": error}
        return Reward(value=None, details=details, is_retryable=is_retryable)
    return Reward(value=value, details={}, applies=value is not None)


def _texts(sample: Sample) -> dict[str, Any]:
    """Returns the texts that a function may look at, by name."""
    texts = {"completion": sample.completion, "baseline": sample.baseline, "answer": sample.guided}
    return {name: text for name, text in texts.items() if text is not None}


class _Failures:
    """Tells of failures in the log, less often the more of them there are."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._calls = 0

    def count(self, error: str, num_samples: int) -> None:
        self._calls += 1
        if self._calls & (self._calls - 1) == 0:  # 1, 2, 4, 8, …
            logging.warning(
                "the reward %s has failed in %d calls; the last, of %d samples: %s",
                *(self._label, self._calls, num_samples, error),
            )


class _Threads:
    """Calls a function in a thread, one call after the other."""

    def __init__(self, function: UserFunction, form: Form, timeout_secs: float) -> None:
        self._function = function
        self._form = form
        self._timeout_secs = timeout_secs

    def run(self, calls: Sequence[Sequence[Sample]]) -> list[FunctionResult]:
        """Returns the outcome of each call.

        Raises:
            StopRequestedError: if the run is to stop.
        """
        return [self._one(samples) for samples in calls]

    def _one(self, samples: Sequence[Sample]) -> FunctionResult:
        future: concurrent.futures.Future[FunctionResult] = concurrent.futures.Future()

        def call() -> None:
            future.set_result(forms.call(self._function, self._form, samples))

        # A thread of an executor would be waited for at the end of the program.
        threading.Thread(target=call, daemon=True, name="reward").start()
        _wait([future], time.monotonic() + self._timeout_secs)
        return (
            future.result()
            if future.done()
            else FunctionResult([], forms.overdue(self._timeout_secs))
        )


class _Coroutines:
    """Calls an async function for all samples at one time, on an event loop of its own.

    The loop is the same for the whole run, so that the function may keep connections.
    """

    def __init__(self, function: UserFunction, form: Form, timeout_secs: float) -> None:
        self._function = function
        self._form = form
        self._timeout_secs = timeout_secs
        self._loop: EventLoopThread | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def run(self, calls: Sequence[Sequence[Sample]]) -> list[FunctionResult]:
        """Returns the outcome of each call.

        Raises:
            StopRequestedError: if the run is to stop; the calls are cancelled.
        """
        with self._lock:
            if self._is_closed:
                return [FunctionResult([], forms.CLOSED)] * len(calls)
            loop = self._loop = self._loop or EventLoopThread("rewards")
            futures = [loop.submit(self._one(samples)) for samples in calls]
            try:
                _wait(futures, time.monotonic() + self._timeout_secs + _GRACE_SECS)
            finally:
                for future in futures:
                    future.cancel()
            # Whoever did not end in time may block the loop, so the next batch gets another one.
            if any(future.cancelled() for future in futures):
                loop.close(wait_secs=0.0)
                self._loop = None
            return [self._outcome(future) for future in futures]

    def close(self) -> None:
        """Cancels calls of other threads and ends the event loop; later calls fail."""
        self._is_closed = True
        if loop := self._loop:
            loop.close()

    async def _one(self, samples: Sequence[Sample]) -> FunctionResult:
        function = self._function
        form = self._form
        arguments, error = sockets.attempt(forms.arguments, function, form, samples)
        if error:
            return FunctionResult([], error)
        task = asyncio.ensure_future(sockets.attempt_async(function(**arguments)))
        try:
            # Unlike `wait_for` it tells the function's own TimeoutError from ours.
            done, _ = await asyncio.wait([task], timeout=self._timeout_secs)
        finally:
            task.cancel()
        if not done:
            return FunctionResult([], forms.overdue(self._timeout_secs))
        if task.cancelled():
            return FunctionResult([], "it was cancelled by itself")
        said, error = task.result()
        if error:
            return FunctionResult([], error)
        result, error = sockets.attempt(forms.checked, form, said, len(samples))
        return FunctionResult([], error) if error else result

    def _outcome(self, future: concurrent.futures.Future[FunctionResult]) -> FunctionResult:
        if future.cancelled() and self._is_closed:
            return FunctionResult([], forms.CLOSED)
        if future.cancelled():
            return FunctionResult(
                [], f"{forms.overdue(self._timeout_secs)}, and blocks its event loop"
            )
        raised = future.exception()
        return FunctionResult([], sockets.describe(raised)) if raised else future.result()


def _wait(futures: Sequence[concurrent.futures.Future[Any]], end: float) -> None:
    """Waits until the futures are done, or the time has come; a request to stop raises."""
    waiting: set[concurrent.futures.Future[Any]] = set(futures)
    while waiting and (left := end - time.monotonic()) > 0:
        _, waiting = concurrent.futures.wait(waiting, timeout=min(left, _LOOK_SECS))
        stopping.check()
