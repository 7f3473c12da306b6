"""Options: defaults, errors, and that each of them is read."""

import ast
import dataclasses
import pathlib
import subprocess
import sys

import pytest

from atlas_jax import config
from atlas_jax.config import MeshConfig, SFTConfig
from atlas_jax.options.train import batch_plan, masked
from atlas_jax.sharding import make_mesh

BASE = SFTConfig(
    model_name_or_path="m", output_dir="o", data=config.DataConfig(dataset_path="d.jsonl")
)


def frozen(**changes):
    draft = config.defaults(SFTConfig)
    draft.update_from_flattened_dict(changes)
    return config.freeze(draft)


def test_defaults_survive_freezing():
    for schema in (SFTConfig, config.GRPOConfig):
        assert config.freeze(config.defaults(schema)) == schema()


@pytest.mark.parametrize(
    ("name", "word", "value"),
    [
        ("gradient_checkpointing", "true", "full"),
        ("gradient_checkpointing", "False", "none"),
        ("attn_implementation", "flash_attention_2", "auto"),
        ("packing", "YES", True),
        ("packing", "auto", "auto"),
    ],
)
def test_words_of_the_original_are_understood(name, word, value):
    assert getattr(frozen(**{name: word}), name) == value


def test_a_config_file_may_set_true_where_it_is_one_of_several_words():
    draft = config.defaults(SFTConfig)
    draft.packing = True
    draft.gradient_checkpointing = False
    found = config.freeze(draft)
    assert (found.packing, found.gradient_checkpointing) == (True, "none")


def test_an_unknown_option_is_answered_with_the_nearest():
    draft = config.defaults(SFTConfig)
    with draft.unlocked():
        draft.learning_rat = 1.0
    with pytest.raises(ValueError, match="learning_rat; did you mean 'learning_rate'"):
        config.freeze(draft)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_dir": ""}, "output_dir is empty"),
        ({"warmup_ratio": 1.5}, "warmup_ratio=1.5 must be at least 0 and below 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be above 0"),
        ({"learning_rate": float("inf")}, "learning_rate=inf must be finite"),
        ({"num_train_epochs": float("inf")}, "num_train_epochs=inf must be finite"),
        ({"weight_decay": float("nan")}, "weight_decay=nan must be 0 or more"),
        ({"seed": -1}, "seed=-1 must be 0 or more"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0 must be at least 0 and below 1"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"output_dir": "m"}, "the model's own directory"),
        ({"mesh": MeshConfig(data=-1, fsdp=-1)}, "at most -1"),
    ],
)
def test_impossible_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config.validate(dataclasses.replace(BASE, **change))


REFUSALS = [
    ({"packing": "perhaps"}, "packing='perhaps' must be one of auto, true, false"),
    ({"packing": 1}, "packing=1 must be one of auto, true, false"),
    ({"sync_ref_model": "yes"}, "sync_ref_model='yes' must be true or false"),
    ({"sync_ref_model": 1}, "sync_ref_model=1 must be true or false"),
    ({"max_steps": 1.5}, "max_steps=1.5 must be a whole number above 0, or -1 to count epochs"),
    ({"max_steps": -5}, "max_steps=-5 must be above 0, or -1 to count epochs"),
    ({"seed": True}, "seed=True must be a whole number of 0 or more"),
    ({"learning_rate": "1e-5"}, "learning_rate='1e-5' must be a number above 0"),
    ({"adam_beta1": -3.0}, "adam_beta1=-3.0 must be at least 0 and below 1"),
    ({"beta": -3.0}, "beta=-3.0 must be 0 or more"),
    ({"beta": float("inf")}, "beta=inf must be finite"),
    ({"num_generations": 1}, "num_generations=1 must be 2 or more: a group of one has no mean to "
     "compare with"),
    ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
    ({"output_dir": 3}, "output_dir=3 must be a text"),
    ({"mesh.data": -2}, "mesh.data=-2 must be above 0, or -1 for all devices that are left"),
    ({"sharding": "fdsp"}, "sharding='fdsp' must be one of fsdp, zero1, replicated; did you mean "
     "'fsdp'?"),
    ({"loss_type": "grop"}, "loss_type='grop' must be one of grpo, bnpo, dr_grpo, dapo, gspo, "
     "gspo_token, cispo, package.module:function; did you mean 'grpo'?"),
    ({"offload": "optimizer,parms"},
     "offload='optimizer,parms' must be none, or some of optimizer, "
     "params, activations, reference with commas; did you mean 'params'?"),
    ({"offload": "none,params"},
     "offload='none,params' must be none, or some of optimizer, params, "
     "activations, reference with commas"),
    ({"reward.names": ("exact_mach",)},
     "reward.names=('exact_mach',) holds 'exact_mach'; each item "
     "must be one of teaching_gain, exact_match, package.module:function; did you mean "
     "'exact_match'?"),
    ({"reward.retry_waits_secs": (1.0, -1.0)}, "reward.retry_waits_secs=(1.0, -1.0) holds -1.0; "
     "each item must be 0 or more"),
    ({"reward.rim.limits.max_tries": 0}, "reward.rim.limits.max_tries=0 must be above 0"),
    ({"reward.rim.small_model.input_price": -2.0}, "reward.rim.small_model.input_price=-2.0 must "
     "be 0 or more, or -1 where it is not known"),
    ({"teaching.max_probe_tokens": 0}, "teaching.max_probe_tokens=0 must be above 0"),
    ({"max_probe_tokens": "many"}, "teaching.max_probe_tokens='many' must be a whole number above "
     "0"),
    ({"data.columns": 3}, "data.columns=3 must be a group of options (messages, prompt, "
     "completion, …)"),
]  # fmt: skip
"""Changes of a config, and the sentence that refuses each."""


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_a_value_that_its_option_does_not_allow_is_refused_in_one_line(change, message):
    draft = config.defaults(config.GRPOConfig)
    for name, value in change.items():
        group, _, last = name.rpartition(".")
        with draft.unlocked(), draft.ignore_type():
            (draft[group] if group else draft)[last] = value
    with pytest.raises(ValueError) as error:
        config.freeze(draft)
    assert str(error.value) == message


@pytest.mark.parametrize("name", sorted(set(config.all_options()) - {"algorithm"}))
def test_every_option_refuses_a_value_of_another_type(name):
    schemas = (config.GRPOConfig, config.GKDConfig)
    draft = config.defaults(next(s for s in schemas if name in config.flat(s())))
    group, _, last = name.rpartition(".")
    with draft.unlocked(), draft.ignore_type():
        (draft[group] if group else draft)[last] = 1j
    with pytest.raises(ValueError, match=f"^{name}[= ].*1j"):
        config.freeze(draft)


FORMER = {
    "data.system_prompt": "teaching.system_prompt",
    "data.teacher_template": "teaching.teacher_template",
    "data.lesson_template": "teaching.lesson_template",
    "rollout.student_system_prompt": "teaching.student_system_prompt",
    "rollout.student_chat_template_kwargs": "teaching.student_chat_template_kwargs",
    "rollout.student_diagnostic_template": "teaching.student_diagnostic_template",
    "rollout.student_baseline_template": "teaching.student_baseline_template",
    "rollout.student_with_teaching_template": "teaching.student_with_teaching_template",
    "rollout.missing_teaching": "teaching.missing_teaching",
    "rollout.max_answer_tokens": "teaching.max_answer_tokens",
    "max_probe_tokens": "teaching.max_probe_tokens",
}


def example(present):
    """A value that is not the default of a moved option."""
    return 7 if "tokens" in present else "whole" if "missing" in present else "text {question}"


@pytest.mark.parametrize(("former", "present"), FORMER.items())
def test_an_option_is_set_by_its_former_name_too(former, present):
    value, (group, _, last) = example(present), former.rpartition(".")
    draft = config.defaults(config.GRPOConfig)
    draft.update_from_flattened_dict({former: value})
    by_assignment = config.defaults(config.GRPOConfig)
    setattr(getattr(by_assignment, group) if group else by_assignment, last, value)
    part = {last: value}
    if group:
        part = {group: dataclasses.replace(getattr(config.GRPOConfig(), group), **part)}
    for result in (
        config.freeze(draft),
        config.freeze(by_assignment),
        config.freeze(by_assignment.copy_and_resolve_references()),
        config.GRPOConfig(**part),
        dataclasses.replace(config.GRPOConfig(), **part),
    ):
        assert config.flat(result)[present] == value
        assert former not in config.flat(result)
        assert result == config.GRPOConfig(teaching=result.teaching)


def test_the_later_of_two_names_in_config_files_counts():
    draft = config.defaults(config.GRPOConfig)
    draft.teaching.max_probe_tokens = 5
    draft.max_probe_tokens = 6
    assert config.freeze(draft).teaching.max_probe_tokens == 6


def test_two_names_with_two_values_are_refused():
    message = (
        "max_probe_tokens=4 and teaching.max_probe_tokens=5 are two names of one option; leave "
        "max_probe_tokens out"
    )
    with pytest.raises(ValueError, match=message):
        config.GRPOConfig(max_probe_tokens=4, teaching=config.TeachingConfig(max_probe_tokens=5))
    torn = config.defaults(config.GRPOConfig).copy_and_resolve_references()
    torn.max_probe_tokens, torn.teaching.max_probe_tokens = 4, 5
    with pytest.raises(ValueError, match=message):
        config.freeze(torn)


def test_a_written_config_has_no_former_names():
    written = masked(config.GRPOConfig(max_probe_tokens=4))
    assert written["teaching"]["max_probe_tokens"] == 4
    assert "max_probe_tokens" not in written and "system_prompt" not in written["data"]


def test_options_of_rewards_are_not_imported_for_sft():
    code = (
        "import sys; from atlas_jax import config; config.validate(config.SFTConfig("
        "model_name_or_path='m', output_dir='o', data=config.DataConfig(dataset_path='d')));"
        "print([m for m in sys.modules if m.startswith('atlas_jax.options')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "options.train" in result.stdout
    assert not {"judges", "grpo", "reward"} & set(result.stdout.replace("'", ".").split("."))


def test_a_possible_config_is_accepted():
    config.validate(BASE)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((2, 0, 0), (16, 1, 2)),
        ((2, 8, 0), (128, 8, 2)),
        ((2, 8, 128), (128, 8, 2)),
        ((2, 0, 64), (64, 4, 2)),
        ((2, 0, 56), (56, 7, 1)),  # 7 rows a device, of which 2 at a time do not divide
        ((4, 0, 72), (72, 3, 3)),  # 9 rows a device: 3 at a time
        ((100, 0, 72), (72, 1, 9)),
        ((4, 0, 8), (8, 1, 1)),
    ],
)
def test_batch_sizes_are_completed(sizes, expected):
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "train_batch_size")
    plan = batch_plan(
        dataclasses.replace(BASE, **dict(zip(names, sizes, strict=True))), num_replicas=8
    )
    assert (plan.global_rows, plan.microbatches, plan.device_rows) == expected
    assert plan.microbatches * plan.device_rows * 8 == plan.global_rows


@pytest.mark.parametrize(
    ("total", "accumulation", "message"),
    [
        (60, 0, "over the 8 devices .* set train_batch_size=56 or 64"),
        (7, 0, "train_batch_size=8"),
        (60, 3, "= 48; use 48, or set one of"),
    ],
)
def test_batch_sizes_that_do_not_divide_name_the_nearest(total, accumulation, message):
    changed = dataclasses.replace(
        BASE, train_batch_size=total, gradient_accumulation_steps=accumulation
    )
    with pytest.raises(ValueError, match=message):
        batch_plan(changed, num_replicas=8)


@pytest.mark.parametrize("devices", [1, 2, 8, 64])
@pytest.mark.parametrize(
    ("run", "rows"), [("teacher_sft", 128), ("teacher_rcl", 128), ("rlvr_gsm8k", 256)]
)
def test_the_recipes_have_the_same_batch_on_any_number_of_devices(run, rows, devices):
    module = __import__(f"atlas_jax.configs.run.{run}", fromlist=["get_config"])
    recipe = config.freeze(module.get_config())
    plan = batch_plan(recipe, devices)
    assert plan.global_rows == rows
    assert plan.device_rows <= recipe.per_device_train_batch_size
    assert plan.microbatches * plan.device_rows * devices == rows


def test_a_mesh_that_does_not_use_all_devices_is_refused():
    with pytest.raises(ValueError, match="does not use 8 devices exactly"):
        make_mesh(MeshConfig(data=3))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://atlas:hunter2@db:5433/atlas", "postgresql://atlas:***@db:5433/atlas"),
        ("postgresql://atlas:a/b@hunter2@db/atlas", "postgresql://atlas:***@db/atlas"),
        (
            "postgresql://db/atlas?user=a&password=hunter2",
            "postgresql://db/atlas?user=a&password=***",
        ),
        ("host=db password='is hunter2' user=a", "host=db password=*** user=a"),
    ],
)
def test_secrets_are_masked(url, shown):
    changed = dataclasses.replace(BASE, data=config.DataConfig(db_url=url))
    assert masked(changed)["data"]["db_url"] == shown


@pytest.mark.parametrize("run", ["teacher_sft", "teacher_rcl", "quickstart_sft", "quickstart_grpo"])
def test_a_run_takes_sessions_from_the_database_or_from_an_export(run, monkeypatch):
    monkeypatch.setenv("ATLAS_DATABASE_URL", "postgresql://db/atlas")
    module = __import__(f"atlas_jax.configs.run.{run}", fromlist=["get_config"])
    stored = config.freeze(module.get_config("data=runtime_pg"))
    exported = config.freeze(module.get_config("data=runtime_traces"))
    config.validate(stored)
    config.validate(exported)
    assert (stored.data.db_url, stored.data.dataset_path) == ("postgresql://db/atlas", "")
    both = dataclasses.replace(exported.data, db_url="postgresql://db/atlas")
    neither = dataclasses.replace(exported.data, dataset_path="")
    for data, state in (
        (both, "data.dataset_path and data.db_url are all set"),
        (neither, "data.dataset_path, data.db_url and data.source are empty"),
    ):
        with pytest.raises(ValueError, match=state):
            config.validate(dataclasses.replace(exported, data=data))


def test_every_option_is_read_somewhere():
    read = set()
    for path in pathlib.Path("atlas_jax").rglob("*.py"):
        if "configs" in path.parts:  # they set options
            continue
        tree = ast.parse(path.read_text())
        read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    schemas = map(config.schema, config.ALGORITHMS)
    options = {name for schema in schemas for name in config.flat(schema())}
    unread = {name.split(".")[-1] for name in options} - read
    assert not unread


@pytest.mark.parametrize("run", sorted(p.stem for p in pathlib.Path("configs/run").glob("*.py")))
def test_every_run_file_is_valid(run):
    module = __import__(f"atlas_jax.configs.run.{run}", fromlist=["get_config"])
    config.validate(config.freeze(module.get_config()))
    for model in pathlib.Path("configs/model").glob("*.py"):
        config.freeze(module.get_config(f"model={model.stem}"))
    with pytest.raises(ValueError, match=r"configs/model/llama9.py does not exist"):
        module.get_config("model=llama9")
    with pytest.raises(ValueError, match="is not one of model=NAME, data=NAME"):
        module.get_config("modle=llama3_8b")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.learning_rat=1", "learning_rate"),
        ("--config.max_steps=1.5", "max_steps"),
        ("--config=configs/run/absent.py", "absent.py"),
        ("--config.data.dataset_path=absent.jsonl", "absent.jsonl"),
        ("--config.train_batch_size=7", "train_batch_size=7 does not divide over the 8 devices"),
    ],
)
def test_the_command_answers_a_mistake_in_one_line(flag, message, tmp_path):
    command = [
        sys.executable, "-m", "atlas_jax.train", "--config=configs/run/teacher_sft.py",
        f"--config.output_dir={tmp_path / 'run'}", f"--config.model_name_or_path={tmp_path}", flag,
    ]  # fmt: skip
    if flag.startswith("--config="):
        command[3:6] = []
    if "dataset" in flag or "batch" in flag:
        from tests import tiny
        from tests.tokenizers import chatml_tokenizer

        tiny.save("smollm2", tmp_path)
        chatml_tokenizer().save_pretrained(tmp_path)
        command.append("--config.max_seq_length=64")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    error = result.stderr.strip().splitlines()
    assert message in result.stderr
    assert "Traceback" not in result.stderr, error[-5:]


def test_every_recipe_says_on_what_how_long_and_with_what_result_it_ran():
    for path in sorted(pathlib.Path("atlas_jax/configs/run").glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        said = all(word in doc for word in ("Hardware:", "Time:", "Result:"))
        assert said or "Hardware, time and result: not run yet" in doc, path


def test_rewards_from_python_take_the_place_of_the_names():
    def brevity(sample):
        return 0.0

    options = {"rollout.protocol": "direct", "reward.names": ("teaching_gain",)}
    draft = config.defaults(config.GRPOConfig)
    draft.update_from_flattened_dict(options)
    draft.model_name_or_path = draft.output_dir = draft.data.dataset_path = "x"
    draft.output_dir = "y"
    made = config.freeze(draft)
    with pytest.raises(ValueError, match="teaching_gain compares a student's answers"):
        config.validate(made)
    config.validate(made, [brevity])
    with pytest.raises(ValueError, match=r"rewards=.*'exact_mach'.*did you mean 'exact_match'"):
        config.validate(made, ["exact_mach"])
    draft.reward.weights = (1.0, 0.5)
    config.validate(config.freeze(draft), [brevity, "exact_match"])
    with pytest.raises(ValueError, match=r"reward.weights=.* for \('brevity',\); give one weight"):
        config.validate(config.freeze(draft), [brevity])
