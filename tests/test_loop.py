"""The loop: what is logged, saved and evaluated in which order, and what ends a run."""

import dataclasses
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import loop, metrics, stopping
from atlas_jax.checkpoint.manager import Checkpoints
from atlas_jax.config import SFTConfig
from atlas_jax.step import TrainState
from atlas_jax.types import Batch, DependencyError

CONFIG = SFTConfig(save_steps=2, logging_steps=1)


@jax.jit
def train_step(state, batch):
    """Adds the batch's number to the one parameter; the loss is the parameter before."""
    number = batch.tokens[0, 0, 0].astype(jnp.float32)
    weight = jnp.float32(batch.loss_mask.any())
    values = {
        "loss/total": (state.params["x"] * weight, weight),
        "optim/grad_norm": (jnp.abs(number), jnp.float32(1)),
        "optim/learning_rate": (jnp.float32(0.5), jnp.float32(1)),
    }
    return TrainState(state.step + 1, {"x": state.params["x"] + number}, ()), values


class Numbers:
    """Batches that hold 1, 2, 3, …; `events` says what happened in which order."""

    def __init__(self, events, sampled=True, trained=True, fails=lambda position: None):
        self.samples_policy = sampled
        self._events = events
        self._trained = trained
        self._fails = fails
        self._position = 0

    def next(self, state, pause):
        """Returns the next number as a batch."""
        self._events.append(f"next {self._position + 1} of {float(state.params['x']):g}")
        self._fails(self._position + 1)
        self._position += 1
        tokens = np.full((1, 1, 3), self._position, np.int32)
        mask = np.full(tokens.shape, self._trained)
        return loop.StepInput(Batch(tokens, tokens, tokens, mask), 3, {})

    def get_state(self):
        """Returns the last number."""
        return {"position": self._position}

    def set_state(self, state):
        """Continues after a number."""
        self._position = state["position"]

    def get_reference(self):
        """Returns None."""


class Writer(metrics.MetricWriter):
    """Writes the real files, and notes when."""

    def __init__(self, directory, start, events):
        super().__init__(str(directory), start)
        self._seen = events

    def write(self, step, values):
        """Writes and notes."""
        kind = "evaluated" if "eval/loss" in values else "logged"
        self._seen.append(f"{kind} {step}")
        super().write(step, values)


def run(
    directory, num_steps, config=CONFIG, evaluate=None, events=None, step=train_step, best=None,
    **feed,
):  # fmt: skip
    """Runs, or continues, and returns the outcome and what happened."""
    events = [] if events is None else events
    checkpoints = Checkpoints(str(directory))
    state = TrainState(jnp.int32(0), {"x": jnp.float32(1)}, ())
    data = {}
    if checkpoints.latest() is not None:
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        state, data = checkpoints.restore(checkpoints.latest(), abstract)
    numbers = Numbers(events, **feed)
    if data:
        numbers.set_state(data)
    writer = Writer(directory, int(state.step), events)
    save = checkpoints.save

    def noted(state, *rest):
        events.append(f"saved {int(state.step)}")
        return save(state, *rest)

    checkpoints.save = noted
    job = loop.Job(
        config=config, num_steps=num_steps, flops_per_token=lambda _: 1.0, train_step=step,
        evaluate=evaluate, writer=writer, checkpoints=checkpoints, restored=data,
        keep_best=best and best.offer,
    )  # fmt: skip
    if best:
        best.resume(state)
    try:
        return loop.run(job, state, numbers), events
    finally:
        writer.close()


def lines(directory):
    found = (directory / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in found
    ]


def saved(directory):
    return sorted(int(p.name) for p in (directory / "checkpoints").iterdir())


def test_a_step_is_logged_before_the_next_batch_is_sampled(tmp_path):
    _, events = run(tmp_path, 3)
    assert events == [
        "next 1 of 1", "logged 1", "next 2 of 2", "logged 2", "saved 2", "next 3 of 4",
        "logged 3", "saved 3",
    ]  # fmt: skip


def test_batches_that_need_no_parameters_are_made_while_the_devices_compute(tmp_path):
    config = dataclasses.replace(CONFIG, save_steps=0)
    _, events = run(tmp_path, 3, config, sampled=False)
    assert [e.split(" of ")[0] for e in events] == [
        "next 1", "next 2", "logged 1", "next 3", "logged 2", "logged 3", "saved 3",
    ]  # fmt: skip


def test_parameters_that_went_wrong_are_never_sampled(tmp_path):
    def broken(state, batch):
        state, values = train_step(state, batch)
        wrong = jnp.where(state.step == 2, jnp.nan, values["optim/grad_norm"][0])
        return state, values | {"optim/grad_norm": (wrong, jnp.float32(1))}

    events = []
    with pytest.raises(RuntimeError, match=r"optim/grad_norm is nan at step 2; there is no"):
        run(tmp_path, 4, events=events, step=broken)
    assert [e for e in events if e.startswith("next")] == ["next 1 of 1", "next 2 of 2"]
    assert "saved 2" not in events


def test_a_step_without_a_trained_token_is_no_error(tmp_path):
    outcome, _ = run(tmp_path, 2, trained=False)
    assert not outcome.stopped
    assert [line["loss/total"] for line in lines(tmp_path)] == [None, None]
    assert math.isnan(outcome.last["loss/total"])


def test_a_step_is_saved_before_its_evaluation_which_may_fail(tmp_path):
    config = dataclasses.replace(CONFIG, eval_steps=2)
    asked = []

    def evaluate(state):
        asked.append(int(state.step))
        if len(asked) == 1:
            raise DependencyError("no server is left")
        return {"eval/loss": 7.0}

    outcome, events = run(tmp_path, 4, config, evaluate)
    assert asked == [2, 4]
    order = [e for e in events if not e.startswith(("next", "logged"))]
    assert order == ["saved 2", "saved 4", "evaluated 4"]
    assert not outcome.stopped
    assert outcome.last["eval/loss"] == 7.0


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(tmp_path):
    config = dataclasses.replace(CONFIG, eval_steps=2)

    def killed(state):
        while not (tmp_path / "checkpoints" / "2").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 2, config, killed)
    assert saved(tmp_path) == [2]
    evaluated = []

    def evaluate(state):
        evaluated.append(int(state.step))
        return {"eval/loss": 7.0}

    run(tmp_path, 3, config, evaluate)
    assert evaluated == [2, 3]
    run(tmp_path, 3, config, evaluate)
    assert evaluated == [2, 3], "no evaluation is made twice"


@pytest.mark.parametrize("logging_steps", [1, 2, 3, 4, 5])
def test_metrics_do_not_depend_on_where_a_run_was_stopped(tmp_path, logging_steps):
    config = dataclasses.replace(CONFIG, logging_steps=logging_steps, save_steps=3)
    run(tmp_path / "whole", 10, config)

    def stop(position):
        if position == 6:
            stopping.request("SIGTERM")
            stopping.check()

    outcome, events = run(tmp_path / "parts", 10, config, fails=stop)
    assert outcome.stopped
    assert events[-1] == "saved 5", "the state before the batch that was given up"
    outcome, _ = run(tmp_path / "parts", 10, config)
    assert not outcome.stopped
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_what_fails_outside_ends_the_run_with_its_steps_saved(tmp_path):
    def fail(position):
        if position == 4:
            raise DependencyError("no judge answers")

    with pytest.raises(DependencyError, match="no judge answers"):
        run(tmp_path, 9, fails=fail)
    assert saved(tmp_path) == [2, 3]
    outcome, events = run(tmp_path, 5)
    assert events[0] == "next 4 of 7"
    assert not outcome.stopped
