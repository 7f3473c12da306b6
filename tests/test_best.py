"""The best model of a run that goes back to a checkpoint before the step of that model."""

import dataclasses
import json
import math

import jax.numpy as jnp
import pytest

from atlas_jax import metrics
from atlas_jax.best import BestModel
from atlas_jax.config import SFTConfig
from tests import test_loop


def run(directory, num_steps, losses, fails_at=0):
    """Trains with an evaluation after each step and a checkpoint after each second one.

    After step s the model is the number 1 + 1 + 2 + … + s, and its evaluation `losses[s]`.
    """
    config = SFTConfig(
        output_dir=str(directory), save_steps=2, eval_steps=1, metric_for_best_model="eval/loss"
    )

    def export(state):
        (directory / "best").mkdir(exist_ok=True)
        (directory / "best" / "model").write_text(f"{float(state.params['x']):g}")
        return "best"

    def step(state, batch):
        state, values = test_loop.train_step(state, batch)
        loss = jnp.where(state.step == fails_at, jnp.nan, values["loss/total"][0])
        return state, values | {"loss/total": (loss, values["loss/total"][1])}

    def evaluate(state):
        return {"eval/loss": losses[int(state.step)]}

    best = BestModel(config, export)
    return test_loop.run(directory, num_steps, config, evaluate, step=step, best=best)


def kept(directory):
    """The model in `best/`, and the step and value that the run's end states of it."""
    config = SFTConfig(output_dir=str(directory))
    metrics.write_trainer_state(config, str(directory), 1, 1, 1.0)
    state = json.loads((directory / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(directory / "best")
    model = float((directory / "best" / "model").read_text())
    return model, state["best_global_step"], state["best_metric"]


def rolled_back(directory, losses):
    """Trains until the loss of step 4 is NaN, when the newest checkpoint is that of step 2."""
    with pytest.raises(RuntimeError, match="loss/total is nan at step 4"):
        run(directory, 5, losses, fails_at=4)
    assert test_loop.saved(directory) == [2]


@pytest.mark.parametrize("losses", [{1: 5.0, 2: 3.0, 3: 1.0}, {1: 5.0, 2: 3.0, 3: 2.0}])
def test_a_dropped_step_is_not_the_best_where_the_checkpoint_is_better_than_what_follows(
    tmp_path, losses
):
    rolled_back(tmp_path, losses)
    assert kept(tmp_path) == (7.0, 3, losses[3])
    run(tmp_path, 5, {3: 4.0, 4: 4.0, 5: 3.5})
    assert kept(tmp_path) == (4.0, 2, 3.0), "that of the checkpoint"


def test_where_the_model_that_was_best_before_is_lost_the_best_of_what_follows_counts(tmp_path):
    rolled_back(tmp_path, {1: 2.0, 2: 3.0, 3: 1.0})
    run(tmp_path, 5, {3: 9.0, 4: 7.0, 5: 8.0})
    assert kept(tmp_path) == (11.0, 4, 7.0)


def test_a_best_model_of_a_step_that_was_done_stays(tmp_path):
    rolled_back(tmp_path, {1: 1.0, 2: 3.0, 3: 2.0})
    run(tmp_path, 5, {3: 9.0, 4: 7.0, 5: math.nan})
    assert kept(tmp_path) == (2.0, 1, 1.0)
    run(tmp_path, 6, {6: 0.5})
    assert kept(tmp_path) == (22.0, 6, 0.5)


def test_an_export_that_a_kill_cut_off_does_not_count(tmp_path, monkeypatch):
    run(tmp_path, 2, {1: 5.0, 2: 3.0})
    monkeypatch.setattr("atlas_jax.best.write_whole", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        run(tmp_path, 4, {3: 1.0})
    monkeypatch.undo()
    run(tmp_path, 4, {3: 4.0, 4: 6.0})
    assert kept(tmp_path) == (7.0, 3, 4.0)


def test_a_greater_value_is_better_where_the_metric_or_the_option_says_so():
    from atlas_jax.best import is_better

    config = SFTConfig(metric_for_best_model="eval/accuracy")
    assert is_better(config, 0.6, 0.5)
    assert not is_better(dataclasses.replace(config, greater_is_better=False), 0.6, 0.5)
    assert is_better(dataclasses.replace(config, metric_for_best_model="eval/loss"), 0.5, 0.6)
