"""What is checked before JAX starts, each mistake as a user would make it."""

import dataclasses
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import safetensors.numpy

from atlas_jax import config_files, preflight
from atlas_jax.config import (
    DataConfig,
    GRPOConfig,
    RewardConfig,
    RIMConfig,
    SFTConfig,
    TeachingConfig,
    freeze,
)
from tests import tiny
from tests.report import runs
from tests.test_cli import error_of, run
from tests.tokenizers import chatml_tokenizer

TRAIN, READ = ("-m", "atlas_jax.train"), ("tools/read_config.py", "output_dir")
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that is whole; tests that break one copy it."""
    directory = tmp_path_factory.mktemp("preflight") / "model"
    tiny.save("smollm2", directory)
    chatml_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def config(model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    return SFTConfig(
        model_name_or_path=str(model),
        output_dir=str(tmp_path / "run"),
        data=DataConfig(dataset_path=str(rows)),
    )


@pytest.fixture
def grpo(config, tmp_path):
    rows = tmp_path / "questions.jsonl"
    rows.write_text(json.dumps({"question": "1+1?", "answer": "2"}) + "\n")
    templates = {
        f"student_{name}_template": "{question}" for name in ("baseline", "diagnostic")
    } | {"student_with_teaching_template": "{question} {teaching}"}
    templates["teacher_template"] = "{question} {approach}"
    return GRPOConfig(
        model_name_or_path=config.model_name_or_path,
        student_model=config.model_name_or_path,
        output_dir=config.output_dir,
        data=DataConfig(dataset_path=str(rows)),
        teaching=TeachingConfig(**templates),
    )


def refused(config, message, kind=ValueError):
    """The check fails with one line that matches."""
    with pytest.raises(kind, match=message) as error:
        preflight.check(config)
    assert "\n" not in str(error.value)


def changed(config, **changes):
    """The config with other options; those of groups are `group__name`."""
    for name, value in changes.items():
        first, _, rest = name.partition("__")
        value = changed(getattr(config, first), **{rest: value}) if rest else value
        config = dataclasses.replace(config, **{first: value})
    return config


def test_a_run_that_can_be_made_passes_and_leaves_nothing(config, grpo, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    preflight.check(config)
    preflight.check(grpo)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", sorted(p.stem for p in pathlib.Path("configs/run").glob("*.py")))
def test_the_shipped_recipes_pass(name, model, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    draft = config_files.load(f"configs/run/{name}.py")
    draft.model_name_or_path = draft.model_name_or_path or str(model)
    if name.startswith("demo_"):  # launch/demo.sh makes their rows
        rows = {"dataset_path": "configs/data/quickstart/train.jsonl", "eval_path": ""}
        draft.data.update({key: value for key, value in rows.items() if key in draft.data})
    if name == "distil_taught_student":  # its rows are samples of a run of GRPO
        draft.data.dataset_path = f"{runs.grpo(tmp_path / 'grpo')}/rollouts/*.jsonl"
    preflight.check(freeze(draft), 8)


@pytest.mark.usefixtures("torch_to_find")
def test_neither_jax_nor_transformers_is_imported(config, grpo, tmp_path):
    code = (
        "import sys, pickle; from atlas_jax import preflight\n"
        "for config in pickle.load(open(sys.argv[1], 'rb')): preflight.check(config, 8)\n"
        "assert not {'jax', 'flax', 'torch', 'transformers', 'orbax', 'datasets'} & {*sys.modules}"
    )
    (tmp_path / "configs").write_bytes(pickle.dumps([config, grpo]))
    result = run("-c", code, tmp_path / "configs")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("command", "change", "message"),
    [
        (TRAIN, "data.dataset_path=absent.jsonl",
         "data.dataset_path: dataset file absent.jsonl does not exist; relative paths start at "),
        (READ, "data.eval_path=absent.parquet",
         "data.eval_path: dataset file absent.parquet does not exist; relative paths start at "),
        (TRAIN, "model_name_or_path=checkpoints/sft/finale",
         "model_name_or_path=checkpoints/sft/finale does not exist; relative paths start at "),
        (READ, "output_dir=pyproject.toml/run",
         "output_dir=pyproject.toml/run cannot be made: "),
        (READ, "train_batch_size=7", "train_batch_size=7 does not divide over "),
        (READ, "mesh.fsdp=0", "mesh sizes (1, 0, 1) must be positive, and one of them at most -1"),
    ],
)  # fmt: skip
def test_commands_tell_a_mistake_in_a_line(config, command, change, message):
    options = {
        "model_name_or_path": config.model_name_or_path, "output_dir": config.output_dir,
        "data.dataset_path": config.data.dataset_path, "data.format": "auto", "data.eval_path": "",
    }  # fmt: skip
    name, value = change.split("=")
    words = [f"--config.{k}={v}" for k, v in (options | {name: value}).items()]
    more = ["--check_devices=2"] if command == READ else []
    result = run(*command, "--config=configs/run/quickstart_sft.py", *words, *more)
    assert error_of(result, 1).startswith(message)


def test_read_config_checks_only_if_it_is_asked_to():
    words = ["--config=configs/run/quickstart_sft.py", "--config.data.dataset_path=absent.jsonl"]
    assert run(*READ, *words).stdout == "outputs/quickstart/sft\n"


# --- models


def broken(model, tmp_path, change):
    """A copy of the model that `change(directory)` breaks."""
    directory = tmp_path / "broken"
    shutil.copytree(model, directory)
    change(directory)
    return str(directory)


def write(name, text):
    return lambda directory: (directory / name).write_text(text)


def edited(**options):
    def change(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | options))

    return change


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def shard(directory):
    path = directory / "model.safetensors"
    path.rename(directory / "model-00001-of-00002.safetensors")
    names = {"a": path.name.replace("model.", "model-00001-of-00002."), "b": "model-00002.saf"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def adapter(directory):
    (directory / "config.json").unlink()
    (directory / "adapter_config.json").write_text("{}")


def as_run(directory):
    (directory / "final").mkdir()
    shutil.copy(directory / "config.json", directory / "final")
    (directory / "config.json").write_text('{"algorithm": "sft"}')


def without(*names):
    return lambda directory: [(directory / name).unlink() for name in names]


@pytest.mark.parametrize("option", ["model_name_or_path", "student_model"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("config.json"), r"is no model: it has no config\.json$"),
        (write("config.json", "{"), r"config\.json is not JSON"),
        (write("config.json", "[" * 100_000), r"config\.json is not JSON"),
        (edited(model_type="gemma2"), "model_type 'gemma2' is not supported; supported are llama"),
        (edited(auto_map={"AutoModel": "x.Y"}), "config.json has auto_map"),
        (as_run, r"its config\.json is not that of a Hugging Face model .*broken/final is one"),
        (adapter, "holds a LoRA adapter .* merge it into its base model"),
        (without("model.safetensors"), r"has no \*\.safetensors file, nor other weights"),
        (truncate, r"model\.safetensors \(\d+ bytes\) is truncated or no safetensors file"),
        (shard, r"model-00002\.saf is named in the index but does not exist"),
        (without("tokenizer.json"), r"has no tokenizer\.json, nor another tokenizer's file"),
    ],
)
def test_a_directory_that_is_no_whole_model_is_told(model, grpo, tmp_path, option, change, message):
    path = broken(model, tmp_path, change)
    refused(changed(grpo, **{option: path}), rf"{option}={re.escape(path)}.*{message}")


def test_a_student_that_a_server_answers_for_may_be_of_any_architecture(model, grpo, tmp_path):
    path = broken(model, tmp_path, edited(model_type="gemma2"))
    preflight.check_models(changed(grpo, student_model=path, rollout__backend="vllm"))


def test_sharded_models_and_fp16_bins_beside_safetensors_pass(model, config, tmp_path):
    def halves(directory):
        path = directory / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        path.unlink()
        names = sorted(tensors)
        for i, part in enumerate((names[:5], names[5:])):
            safetensors.numpy.save_file(
                {n: tensors[n] for n in part}, directory / f"m{i}.safetensors"
            )
        weight_map = {n: f"m{int(i >= 5)}.safetensors" for i, n in enumerate(names)}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )
        (directory / "pytorch_model.bin").write_bytes(b"old")

    preflight.check(changed(config, model_name_or_path=broken(model, tmp_path, halves)))


def test_a_stale_index_beside_a_whole_file_passes(model, config, tmp_path):
    def stale(directory):
        shards = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(shards))
        (directory / "extra.safetensors").write_bytes(b"cut")

    preflight.check(changed(config, model_name_or_path=broken(model, tmp_path, stale)))


@pytest.mark.parametrize(
    "name", ["./absent", "/absent", "~/absent", "a/b/c", "absent/", "absent.gguf", "a b/c", "a//b"]
)
def test_what_looks_like_a_path_is_not_taken_for_a_hub_id(config, name):
    refused(changed(config, model_name_or_path=name), rf"={name} does not exist; relative paths")


def test_a_hub_id_is_one_unless_a_directory_speaks_against_it(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    near = changed(config, model_name_or_path="models/absent")
    far = changed(config, model_name_or_path="nobody/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    preflight.check(far)
    refused(near, "=models/absent does not exist, though the directory models does; correct it, or")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(far, "=nobody/model does not exist, and HF_HUB_OFFLINE forbids to ask the hub; correct")


def test_a_model_that_was_fetched_from_the_hub_is_one(config, tmp_path):
    hub = tmp_path / "hub" / "models--configs--model"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("abc")
    (hub / "snapshots" / "abc").mkdir(parents=True)
    words = [
        os.path.abspath(READ[0]), READ[1],
        f"--config={os.path.abspath('configs/run/quickstart_sft.py')}",
        "--config.model_name_or_path=configs/model",
        f"--config.tokenizer_name_or_path={config.model_name_or_path}",
        f"--config.output_dir={config.output_dir}", "--check_devices=1",
    ]  # fmt: skip
    shutil.copytree("configs/data", tmp_path / "configs/data")
    here = {"cwd": tmp_path, "HF_HUB_CACHE": str(tmp_path / "hub")}
    assert "hf download configs/model" in error_of(run(*words, **here), 1)
    (hub / "snapshots" / "abc" / "config.json").write_text("{}")
    result = run(*words, **here)
    assert result.returncode == 0, result.stderr


def test_a_file_that_is_no_gguf_file_is_told(config, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"no")
    refused(changed(config, model_name_or_path=str(tmp_path / "model.gguf")), "no GGUF file")


def test_a_chat_template_is_missed_where_rows_need_it(model, config, tmp_path):
    path = broken(model, tmp_path, without("chat_template.jinja"))
    told = changed(config, model_name_or_path=path, data__format="messages")
    refused(told, "has no chat template, which conversations need; set tokenizer_name_or_path")
    preflight.check(changed(told, tokenizer_name_or_path=str(model)))
    refused(
        changed(config, data__format="messages", tokenizer_name_or_path=path),
        f"tokenizer_name_or_path={path} has no chat template",
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "does not exist; give the output_dir of another run, one of its checkpoints, or a"),
        ([], "is no model: it has no config.json"),
        (["checkpoints"], "is no model: it has no config.json"),
        (["checkpoints/3"], None),
    ],
)
def test_resume_from_is_a_run_a_checkpoint_or_a_model(config, model, tmp_path, make, message):
    path = tmp_path / "other"
    for name in make or []:
        (path / name).mkdir(parents=True)
    if make == []:
        path.mkdir()
    resumed = changed(config, resume_from=str(path))
    if message:
        refused(resumed, f"resume_from={path} {message}")
        assert make is not None or not path.exists()
        return
    for good in (path, path / "checkpoints/3", model):
        preflight.check(changed(config, resume_from=str(good)))


# --- data, templates, keys


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "a,b\n", r"a\.txt is of an unknown kind; its name must end in"),
        ("a.parquet", "no table", r"a\.parquet is not a Parquet file"),
        ("a.jsonl", '{"messages": \n{"messages": 1}\n', r"a\.jsonl:1: is not JSON"),
        ("a.jsonl", '{"body": "x"}\n', r"a\.jsonl:1: lacks messages; it has body"),
        ("a", None, "the directory .* holds no file that ends in"),
    ],
)
def test_data_that_cannot_be_read_or_used_is_told(config, tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text) if text is not None else path.mkdir()
    for option in ("dataset_path", "eval_path"):
        told = changed(config, **{f"data__{option}": str(path)})
        refused(told, rf"^data\.{option}: .*{message}")


def test_a_few_unusable_rows_may_stand_first(config, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{broken\n" * 20 + json.dumps({"messages": MESSAGES}) + "\n")
    preflight.check(changed(config, data__dataset_path=str(path)))
    assert config.data.max_rejected_frac < 1


def test_rows_of_another_format_and_without_truth_are_told(config, grpo, tmp_path):
    refused(
        changed(config, data__format="teaching", teaching__teacher_template="{question}",
                teaching__lesson_template="{teaching}"),
        "lacks problem_text.*; use data.format=auto or messages",
    )  # fmt: skip
    (tmp_path / "questions.jsonl").write_text('{"question": "1+1?"}\n')
    refused(grpo, r"questions\.jsonl:1: has no ground truth, which the reward needs")


def test_an_export_of_sessions_is_looked_into(config, tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_text('{"task": ""}\n')
    told = changed(
        config, data__format="session", data__dataset_path=str(path),
        teaching__teacher_template="{question}", teaching__lesson_template="{teaching}",
    )  # fmt: skip
    refused(told, r"data\.dataset_path: .*traces\.jsonl:1: has .* as task")
    refused(changed(told, data__dataset_path=str(tmp_path / "b.jsonl")), r"b\.jsonl does not exist")
    path.write_text('{"task": "Add."}\n')
    refused(changed(told, data__created_after="soon"), r"has the str 'soon' as data\.created_after")


def test_templates_are_checked(config, grpo):
    refused(
        changed(config, data__format="teaching"),
        r"teaching\.teacher_template is empty, and data\.format=teaching needs it; take configs/",
    )
    refused(changed(config, teaching__teacher_template="{what}"), r"has the unknown field \{what\}")
    refused(
        changed(grpo, teaching__student_with_teaching_template="{question}"),
        r"teaching\.student_with_teaching_template='\{question\}' lacks \{teaching\}",
    )
    direct = changed(grpo, rollout__protocol="direct", reward__names=("exact_match",))
    refused(changed(direct, rollout__direct_template="Solve it."), r"lacks \{question\}")
    preflight.check(changed(direct, student_model="no/such/model"))


def test_keys_of_judges_are_there(grpo, monkeypatch):
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    judged = changed(grpo, reward=RewardConfig(kind="rim", rim=RIMConfig()))
    refused(judged, "GEMINI_API_KEY, which is not set; set it, or name an endpoint of your own")
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    preflight.check(judged)


def test_files_of_judges_can_be_used(grpo, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    (tmp_path / "file").write_text("")
    judged = changed(grpo, reward=RewardConfig(kind="rim"))
    refused(
        changed(judged, reward__rim__cache_dir=f"{tmp_path}/file/cache"),
        rf"^reward\.rim\.cache_dir={tmp_path}/file/cache cannot be made: ",
    )
    account = tmp_path / "run" / "judges_spent_process_0.json"
    account.parent.mkdir()
    account.write_text("")
    refused(judged, rf"^{account} is not the account of what judges have cost")
    preflight.check(grpo)


def test_fields_that_templates_use_are_in_the_rows(grpo):
    told = changed(
        grpo,
        rollout__question_fields=("level",),
        teaching__student_baseline_template="{question} {level}",
    )
    refused(told, r"questions\.jsonl:1: lacks the field 'level' of rollout\.question_fields")


def test_a_database_that_cannot_be_reached_is_told(config):
    told = changed(config, data__dataset_path="", data__db_url="postgresql://u:hush@127.0.0.1:1/d")
    refused(told, r"u@127\.0\.0\.1:1/d cannot be read", ConnectionError)
    with pytest.raises(ConnectionError) as error:
        preflight.check(told)
    assert "hush" not in str(error.value)


# --- devices


@pytest.mark.parametrize(
    ("changes", "num_devices", "message"),
    [
        ({"mesh__data": 3, "mesh__fsdp": 2}, 8, "mesh data=3 x fsdp=2 x tensor=1 does not use 8"),
        ({"train_batch_size": 7}, 2, "train_batch_size=7 does not divide over .*; (use|set)"),
        ({"train_batch_size": 8, "mesh__tensor": 2}, 4, None),
    ],
)
def test_rows_divide_over_the_devices(config, changes, num_devices, message):
    told = changed(config, **changes)
    preflight.check(told)
    if message is None:
        preflight.check(told, num_devices)
        return
    with pytest.raises(ValueError, match=message):
        preflight.check(told, num_devices)


def test_groups_divide_the_rows_of_the_devices(grpo):
    told = changed(grpo, per_device_train_batch_size=2, num_generations=8)
    for good in (4, 8, 64):
        preflight.check(told, good)
    with pytest.raises(ValueError, match="2 completions a step do not divide into groups of num_g"):
        preflight.check(told, 1)


# --- directories


def test_output_dir_may_be_anything_but_a_file(config, tmp_path):
    (tmp_path / "file").write_text("")
    refused(
        changed(config, output_dir=str(tmp_path / "file")), "file is no directory; name another"
    )
    refused(
        changed(config, output_dir=str(tmp_path / "file" / "run")),
        rf"^output_dir={tmp_path}/file/run cannot be made: {tmp_path}/file is no directory",
    )
    preflight.check(changed(config, output_dir=str(tmp_path / "a" / "b")))
    preflight.check(changed(config, output_dir=str(tmp_path)))


def isolated(script, *words):
    """Runs a shell script in a namespace of its own, where it may mount file systems."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-euc", script, "sh"]
    return subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip


needs_mounts = pytest.mark.skipif(
    isolated("mount -t tmpfs none /mnt").returncode != 0, reason="file systems cannot be mounted"
)


@needs_mounts
@pytest.mark.parametrize(
    ("mount", "message"),
    [
        ("size=512k", "{}/run: No space left on device; make room there, or write elsewhere"),
        ("ro", "{}/run: cannot be written; name another directory"),
    ],
)
def test_a_full_or_read_only_disk_is_one_line(config, tmp_path, mount, message):
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f'mount -t tmpfs -o {mount} none "$1"; '
        'exec "$2" -m atlas_jax.train --config=configs/run/quickstart_sft.py '
        '--config.output_dir="$1/run" --config.model_name_or_path="$3"'
    )
    result = isolated(script, disk, sys.executable, config.model_name_or_path)
    assert error_of(result, 1) == message.format(disk)


@needs_mounts
def test_evaluation_looks_first_where_it_will_write(grpo, tmp_path):
    words = [
        "-m", "atlas_jax.evaluate", f"--teacher={grpo.model_name_or_path}",
        f"--student={grpo.student_model}", f"--data={grpo.data.dataset_path}",
    ]  # fmt: skip
    result = run(*words, f"--output={tmp_path}")
    assert error_of(result, 1) == f"{tmp_path} is a directory; name a file in it"
    absent = [word.replace("questions.jsonl", "absent.jsonl") for word in words]
    result = run(*absent, f"--output={tmp_path}/e.json")
    assert error_of(result, 1).startswith("data.dataset_path: dataset file ")
    teacher = [word.replace("teacher=", "teacher=/absent") for word in words]
    assert "/absent" in error_of(run(*teacher, f"--output={tmp_path}/e.json"), 1)
