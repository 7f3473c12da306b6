"""Sizes of a GRPO step: questions, groups and rows on any number of devices."""

import dataclasses

import pytest

from atlas_jax import config as config_lib
from atlas_jax.config import GRPOConfig, RolloutConfig
from atlas_jax.configs.run import teacher_rcl
from atlas_jax.options.train import BatchPlan, batch_plan
from atlas_jax.recipes.layout import make_layout

BASE = GRPOConfig(model_name_or_path="m", student_model="s", output_dir="o")


@pytest.mark.parametrize(("rows", "device_rows"), [(6, 2), (2, 2), (20, 2), (45, 3)])
def test_sizes_that_cannot_work_name_ones_that_can(rows, device_rows):
    draft = dataclasses.replace(
        BASE,
        num_generations=8,
        per_device_train_batch_size=device_rows,
        gradient_accumulation_steps=rows // device_rows,
    )
    with pytest.raises(ValueError, match="do not divide into groups of num_generations=8") as error:
        make_layout(draft, batch_plan(draft, 1), 1)
    advice = str(error.value).partition("train_batch_size=")[2]
    named = [int(word) for word in advice.replace(",", " ").split() if word.isdigit()]
    assert named
    for size in named:
        changed = dataclasses.replace(draft, train_batch_size=size, gradient_accumulation_steps=0)
        layout = make_layout(changed, batch_plan(changed, 1), 1)
        assert layout.questions * 8 == size
    assert "gradient_accumulation_steps=0" in str(error.value)


def test_a_row_holds_as_many_completions_as_fit_and_divide():
    draft = dataclasses.replace(
        BASE, num_generations=8, per_device_train_batch_size=4, max_prompt_length=100,
        max_new_tokens=50, max_seq_length=299,
    )  # fmt: skip
    plan = BatchPlan(global_rows=16, microbatches=2, device_rows=4)
    assert make_layout(draft, plan, 2).per_row == 2
    wider = dataclasses.replace(draft, max_seq_length=300)
    assert make_layout(wider, plan, 2).per_row == 4
    apart = dataclasses.replace(wider, rollout=RolloutConfig(share_prompt=False))
    assert make_layout(apart, plan, 2).per_row == 1
    fewer = dataclasses.replace(plan, device_rows=2, microbatches=4)
    assert make_layout(wider, fewer, 2).per_row == 2


def test_updates_divide_the_microbatches_of_a_step():
    draft = dataclasses.replace(
        BASE, num_generations=8, per_device_train_batch_size=4, train_batch_size=24,
        gradient_accumulation_steps=0, steps_per_generation=4,
    )  # fmt: skip
    plan = batch_plan(draft, 1)
    assert plan.microbatches == 6
    with pytest.raises(
        ValueError, match=r"24 completions .* 6 microbatches.*batch_size=6 or a div"
    ):
        make_layout(draft, plan, 1)
    fitting = dataclasses.replace(draft, per_device_train_batch_size=3)
    assert make_layout(fitting, batch_plan(fitting, 1), 1).microbatches == 8


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16, 32, 64, 128])
def test_the_recipe_of_the_guide_asks_four_questions_on_any_number_of_devices(devices):
    recipe = config_lib.freeze(teacher_rcl.get_config())
    plan = batch_plan(recipe, devices)
    layout = make_layout(recipe, plan, devices)
    assert layout.questions == 4
    assert plan.global_rows == 128
    assert plan.device_rows == min(4, 128 // devices)
    assert layout.microbatches * plan.device_rows * devices == 128
    assert plan.device_rows % layout.per_row == 0
    rows = plan.global_rows // layout.per_row
    assert all(rows % count == 0 for count in (1, 2, 4, 8, 64) if count <= devices)  # of processes


def test_six_devices_get_the_sizes_that_also_hold_whole_groups():
    recipe = config_lib.freeze(teacher_rcl.get_config())
    with pytest.raises(ValueError, match=r"over the 6 devices.*set train_batch_size=96 or 192"):
        batch_plan(recipe, 6)
