"""Names of other trainers: the answers, the document, and that both speak of what exists."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from atlas_jax import config, migration, overrides, saved_config
from atlas_jax.options.train import masked

ENTRIES = (*migration.OPTIONS, *migration.WORDS)
OURS = set(config.all_options())
GROUPS = {name.rpartition(".")[0] for name in OURS} - {""}


def test_the_document_is_what_the_table_makes():
    assert pathlib.Path("docs/migration.md").read_text() == migration.document()


def test_each_foreign_name_has_one_answer_and_is_no_option_here():
    names = [name for entry in ENTRIES for name in entry.names.split()]
    assert len(names) == len(set(names))
    assert not OURS & set(names)
    assert not [name for name in OURS if any(entry.matches(name) for entry in ENTRIES)]


ELSEWHERE = {
    "rollouts/", "checkpoints/", "final/", "training.log", "FILE.py", "db_url", "sft", "grpo",
    "atlas-plan", "atlas-convert", "atlas-serve", "launch_with_server.sh", "none", "dots", "mlp",
    "full", "token", "sequence", "constant", "linear", "cosine", "local", "auto", "float32",
    "hf upload NAME OUTPUT_DIR/final",
}  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.names.split()[0])
def test_an_answer_names_options_that_exist_with_values_that_they_take(entry):
    for text in re.findall("`([^`]*)`", entry.here):
        if text in ELSEWHERE or text.isupper() or re.match(r"--|[A-Z_]+$|teacher_", text):
            continue
        name, _, value = text.partition("=")
        assert name in OURS | GROUPS | {"rollout", "reward.rim"} or name == "data.db_url", text
        draft = config.defaults(config.GRPOConfig)
        if value and not re.search("[A-Z…:]", value):
            overrides.apply(draft, [overrides.Option(name, value)])


@pytest.mark.parametrize("algorithm", config.ALGORITHMS)
def test_what_changes_nothing_is_accepted_with_a_note(algorithm):
    draft = config.defaults(config.schema(algorithm))
    before = config.freeze(draft)
    accepted = [e.names.split()[0].rstrip("*") for e in migration.OPTIONS if e.changes_nothing]
    notes = overrides.apply(draft, [overrides.Option(name, "true") for name in accepted])
    assert len(notes) == len(accepted) > 10
    assert config.freeze(draft) == before


def test_what_is_not_here_is_accepted_only_where_it_is_turned_off():
    draft = config.defaults(config.SFTConfig)
    (note,) = overrides.apply(draft, [overrides.Option("push_to_hub", "False")])
    assert note.startswith("push_to_hub=False: there is no upload here")
    with pytest.raises(ValueError, match="unknown option push_to_hub: there is no upload here"):
        overrides.apply(draft, [overrides.Option("push_to_hub", "true")])


def test_an_option_with_another_name_and_the_same_values_is_set():
    draft = config.defaults(config.SFTConfig)
    overrides.apply(draft, [overrides.Option("dataloader_num_workers", "7")])
    assert draft.data.num_workers == 7


GUIDE = {
    "bf16=true": "write model.compute_dtype=bfloat16",
    "deepspeed=configs/deepspeed/zero2.json": "sharding=zero1",
    "export_path=traces.jsonl": "write data.dataset_path",
    "max_completion_length=512": "write max_new_tokens",
    "reward_weights=[1]": "write reward.weights",
    "warmup_steps=5": "write warmup_ratio",
}


@pytest.mark.parametrize("command", [
    ("-m", "atlas_jax.train"), ("-m", "atlas_jax.evaluate"), ("tools/read_config.py", "output_dir"),
    ("-m", "atlas_jax.plan.command"), ("tools/inspect_data.py",),
], ids=lambda command: command[-1])  # fmt: skip
def test_every_command_answers_an_option_of_the_guide_in_a_sentence(command):
    words = [f"--config.{word}" for word in list(GUIDE)[:1]]
    assert_answer(
        [sys.executable, *command, "--config=teacher_rcl", *words], *next(iter(GUIDE.items()))
    )


@pytest.mark.parametrize("word", GUIDE)
def test_launch_answers_options_of_the_guide_in_a_sentence(word):
    assert_answer(["launch/launch.sh", "1", "teacher_rcl", word], word, GUIDE[word])


def assert_answer(command, word, answer):
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert found.returncode == 2
    (line,) = found.stderr.strip().splitlines()
    assert line.startswith(f"error: unknown option {word.partition('=')[0]}: ")
    assert answer in line


@pytest.mark.parametrize("word", ["+override", "data@_global_=runtime_pg", "--config-name=x"])
def test_words_of_hydra_are_answered(word):
    command = [sys.executable, "-m", "atlas_jax.train", "--config=teacher_sft", word]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert migration.find(word.lstrip("-")).answer in found.stderr
    assert len(found.stderr.splitlines()) == 1


VALUES = {
    ("max_steps", "1e3"): 1000, ("max_steps", "null"): -1, ("eval_steps", "none"): 0,
    ("learning_rate", "1e-5"): 1e-5, ("learning_rate", "1"): 1.0, ("data.shuffle", "yes"): True,
    ("data.shuffle", "FALSE"): False, ("top_k", "null"): 0, ("seed", "-1"): -1,
    ("reward.weights", "[1, 2.5]"): (1.0, 2.5), ("reward.weights", "null"): (),
    ("reward.names", "a,b"): ("a", "b"), ("reward.names", "['a', \"b, c\"]"): ("a", "b, c"),
    ("data.length_buckets", "(128,)"): (128,), ("rollout.direct_template", "[x], {question}"):
    "[x], {question}",
}  # fmt: skip


@pytest.mark.parametrize(("option", "value"), VALUES.items(), ids=str)
def test_values_are_read_as_a_person_would(option, value):
    draft = config.defaults(config.GRPOConfig)
    overrides.apply(draft, [overrides.Option(*option)])
    found = functools.reduce(getattr, option[0].split("."), draft)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("before", [True, False, "auto"])
def test_an_option_of_several_words_takes_each_whatever_a_config_file_has_set(before):
    draft = config.defaults(config.SFTConfig)
    draft.packing = before
    for word, value in (("auto", "auto"), ("true", True), ("no", False)):
        overrides.apply(draft, [overrides.Option("packing", word)])
        assert config.freeze(draft).packing == value


def test_words_are_options_in_every_notation():
    draft = config.defaults(config.GRPOConfig)
    words = ["--config.seed", "3", "--config.packing", "-config.beta=0.1",
             "--noconfig.sync_ref_model", "--seed=1", "rest",
             "--config.reward.names=a", "--config.reward.names", "b"]  # fmt: skip
    options, others = overrides.separate(words, draft)
    assert others == ["--seed=1", "rest"]
    overrides.apply(draft, options)
    found = (draft.seed, draft.packing, draft.beta, draft.sync_ref_model)
    assert found == (3, "true", 0.1, False)
    assert draft.reward.names == ("a", "b")


def saved(tmp_path, **changes):
    draft = config.defaults(config.GRPOConfig)
    with draft.unlocked():
        draft.update_from_flattened_dict(changes)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(masked(config.freeze(draft))))
    return str(path), config.freeze(draft)


def test_a_runs_config_can_be_given_back(tmp_path):
    path, before = saved(tmp_path, **{
        "learning_rate": 1e-7, "reward.weights": (1.0,), "data.status_filters": ("succeeded",),
        "data.db_url": "postgresql://localhost/x",
    })  # fmt: skip
    again = saved_config.load(path)
    again.check(())
    assert config.freeze(again.config) == before


def test_a_secret_that_a_saved_config_does_not_hold_must_be_given_again(tmp_path, monkeypatch):
    monkeypatch.delenv("ATLAS_DATABASE_URL", raising=False)
    path, _ = saved(tmp_path, **{"data.db_url": "postgresql://user:hush@localhost/x"})
    with pytest.raises(ValueError) as error:
        saved_config.load(path).check(["seed"])
    assert str(error.value) == (
        f"{path} keeps no secrets and no rows from Python; give again --config.data.db_url=… "
        "(or the variable ATLAS_DATABASE_URL)"
    )
    saved_config.load(path).check(["data.db_url"])
    monkeypatch.setenv("ATLAS_DATABASE_URL", "postgresql://user:new@localhost/x")
    again = saved_config.load(path)
    again.check(())
    assert again.config.data.db_url == "postgresql://user:new@localhost/x"


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is no JSON"), ('{"model_type": "llama"}', "is no run's config.json"),
    ('{"algorithm": "sft", "bf16": true}', "unknown option bf16: write model.compute_dtype"),
])  # fmt: skip
def test_a_file_that_is_no_saved_config_is_named(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        saved_config.load(str(tmp_path / "config.json"))


def test_a_saved_config_is_read_by_the_commands(tmp_path):
    path, _ = saved(tmp_path, learning_rate=3e-7)
    command = [sys.executable, "tools/read_config.py", "learning_rate,seed", f"--config={path}",
               "--config.seed=9"]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert found.stdout == "3e-07\n9\n", found.stderr
