"""What commands answer to words that they do not take, and to files that fail: one line."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SHIPPED = ", ".join(sorted(p.stem for p in pathlib.Path("configs/run").glob("*.py")))
SFT, GRPO = "configs/run/teacher_sft.py", "configs/run/teacher_rcl.py"
ROOT = os.getcwd()


def run(*words, cwd=None, **environment):
    """Runs Python with the words; the package is found from any directory."""
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False, cwd=cwd,
        env=os.environ | {"PYTHONPATH": ROOT} | environment, timeout=300,
    )  # fmt: skip


def error_of(result, code=2):
    """The line that a command ends with."""
    assert result.returncode == code, result.stderr[-2000:]
    (line, *hint) = result.stderr.strip().splitlines()
    assert hint in ([], ["(ATLAS_TRACEBACK=1 shows where)"]), result.stderr
    return line.removeprefix("error: ")


GIVE = "; give FILE.py, PACKAGE.MODULE, or the name of a shipped file in configs/run/"
TRAIN = ("-m", "atlas_jax.train")
COMMANDS = {
    "train": TRAIN,
    "evaluate": ("-m", "atlas_jax.evaluate"),
    "read_config": ("tools/read_config.py", "output_dir"),
    "plan": ("tools/plan.py",),
    "inspect_data": ("tools/inspect_data.py",),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistyped_option_is_answered_with_the_nearest_in_a_sentence(command):
    result = run(*COMMANDS[command], f"--config={GRPO}", "--config.learning_rte=1")
    assert error_of(result) == "unknown option learning_rte; did you mean 'learning_rate'?"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), f"--config is needed: the name of a shipped recipe ({SHIPPED}), a FILE.py or a "
             "PACKAGE.MODULE"),
        ((f"--config={SFT}", "--config.dataset_pth=x"),
         "unknown option dataset_pth; did you mean 'data.dataset_path'?"),
        ((f"--config={SFT}", "--config.data.learning_rate=1"),
         "unknown option data.learning_rate; did you mean 'learning_rate'?"),
        ((f"--config={SFT}", "--config.zzzz=1"), "unknown option zzzz; --options lists all"),
        ((f"--config={SFT}", "--learning_rate=1"),
         "unknown flag --learning_rate; write --config.learning_rate=…"),
        (("--learning_rate=1",), "unknown flag --learning_rate; write --config.learning_rate=…"),
        (("--cofig=x",), "unknown flag --cofig; did you mean 'config'?"),
        (("--config.seed=1",),
         "--config.seed=1 changes a config; name it with --config NAME"),
        (("--config", SFT, "--config.max_steps", "1.5"),
         "--config.max_steps=1.5 must be a whole number"),
        ((f"--config={SFT}", "--config.data.length_buckets=(1,'x')"),
         "--config.data.length_buckets=(1,'x') must be a whole number, and 'x' is not"),
        ((f"--config={SFT}", "--config.data.shuffle=perhaps"),
         "--config.data.shuffle=perhaps must be true or false"),
        (("--num_processes=two",), "--num_processes=two must be a whole number"),
        ((f"--config={SFT}", "--config.model=qwen3_8b"),
         "model=qwen3_8b: model is a group of options (model.compute_dtype, model.export_dtype, "
         "model.gradient_dtype, …); set one of these; to take configs/model/qwen3_8b.py, write "
         "--config NAME:model=qwen3_8b"),
        ((f"--config={SFT}:model=qwen3_7b",),
         "configs/model/qwen3_7b.py does not exist; give the name of a file in configs/model/, or "
         "PACKAGE.MODULE; did you mean 'qwen3_8b'?"),
        ((f"--config={SFT}:modl=qwen3_8b",),
         "config argument 'modl=qwen3_8b' is not one of model=NAME, data=NAME; did you mean "
         "'model'?"),
        ((f"--config={SFT}:model=qwen3_8b,", "data=quickstart_sft"),
         "'data=quickstart_sft' is not expected here; options are written --config.NAME=VALUE, "
         "and --config CONFIG:model=NAME,data=NAME has no blanks"),
        (("--config=configs/run/teacher_sft.yaml",),
         f"configs/run/teacher_sft.yaml does not exist{GIVE}; there is configs/run/teacher_sft.py"),
        (("--config=elsewhere/teacher_rcl.yaml",),
         f"elsewhere/teacher_rcl.yaml does not exist{GIVE}; did you mean the shipped "
         "'teacher_rcl'?"),
        (("--config=configs/run",),
         f"configs/run is no Python file{GIVE}; shipped are {SHIPPED}"),
        (("--config=teacher_stf",),
         f"teacher_stf does not exist{GIVE}; did you mean the shipped 'teacher_sft'?"),
        (("--config=nobody.has.this",),
         f"nobody.has.this does not exist{GIVE}; shipped are {SHIPPED}"),
        (("--config=json.nothing",), f"json.nothing does not exist{GIVE}; shipped are {SHIPPED}"),
        (("--config=json.decoder",),
         "json.decoder has no function get_config; see configs/run/teacher_sft.py"),
        (("--config=mine.py",),
         f"mine.py does not exist{GIVE}; relative paths start at {ROOT}"),
    ],
)  # fmt: skip
def test_words_that_train_does_not_take(words, message):
    assert error_of(run(*TRAIN, *words)) == message


def test_a_blank_after_the_comma_of_a_quoted_argument_is_nothing():
    result = run(
        "tools/read_config.py", "data.dataset_path",
        f"--config={SFT}: model=qwen3_8b, data = quickstart_sft",
    )  # fmt: skip
    assert result.stdout == "atlas_jax/configs/data/quickstart/train.jsonl\n"


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_an_answer_and_no_error(command, flag):
    result = run(*COMMANDS[command], flag)
    assert result.returncode == 0, result.stderr
    assert "--config" in result.stdout
    assert {"train": "--coordinator", "evaluate": "--teacher"}.get(command, "") in result.stdout
    assert result.stderr == ""


OWN = """from atlas_jax.configs.run import teacher_sft


def get_config(argument=None):
    c = teacher_sft.get_config(argument)
    c.learning_rate = 3e-4
    return c
"""


def test_a_config_of_the_user_changes_a_shipped_one(tmp_path):
    """By path and by dotted name, with parts of their own, from any directory."""
    package = tmp_path / "mine"
    package.mkdir()
    (package / "run.py").write_text(OWN)
    (package / "smaller.py").write_text("def apply(config):\n    config.model_name_or_path = 'x'\n")
    read = [f"{ROOT}/tools/read_config.py", "learning_rate,model_name_or_path,warmup_ratio"]
    for config in ("mine/run.py", "mine.run"):
        for part, model in (("mine.smaller", "x"), ("qwen3_8b", "Qwen/Qwen3-8B")):
            words = [*read, f"--config={config}:model={part}"]
            result = run(*words, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
            assert result.stdout == f"0.0003\n{model}\n0.1\n", result.stderr


def test_a_name_that_is_shipped_is_the_file_of_the_checkout():
    options = "algorithm,output_dir,learning_rate,data.system_prompt,data.dataset_path"
    by_name, by_path = (
        run("tools/read_config.py", options, f"--config={config}:data=runtime_traces").stdout
        for config in ("teacher_rcl", GRPO)
    )
    assert by_name == by_path
    assert by_name.startswith("grpo\ncheckpoints/grpo\n5e-07\n")


def test_what_lies_elsewhere_is_named(tmp_path):
    (tmp_path / "theirs.py").write_text("from configs.run import teacher_sft\n")
    alone = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path / "package")}
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "atlas_jax").symlink_to(f"{ROOT}/atlas_jax")
    assert error_of(run(*TRAIN, f"--config={SFT}", **alone)) == (
        f"{SFT} does not exist{GIVE}; did you mean the shipped 'teacher_sft'?"
    )
    assert error_of(run(*TRAIN, "--config=theirs.py", **alone)) == (
        f"{tmp_path}/theirs.py:1: ModuleNotFoundError: No module named 'configs'; the shipped "
        "files are imported from atlas_jax.configs"
    )


START = """from atlas_jax import config


def get_config():
    c = config.defaults(config.SFTConfig)
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", ":1: SyntaxError: invalid syntax"),
        ("import numpyy\n", ":1: ModuleNotFoundError: No module named 'numpyy'"),
        ("x = 1\n", " has no function get_config; see configs/run/teacher_sft.py"),
        (START, ": get_config returns a NoneType; it must return the config that "
                "config.defaults(…) gave it"),
        (START + "    c.learning_rat = 1.0\n",
         ":6: unknown option learning_rat; did you mean 'learning_rate'?"),
        (START + "    c.data.db_url = 'postgresql://u:hush@h/d'\n    c.data.zzzz = 1\n",
         ":7: unknown option zzzz"),
        (START + "    return c.zzzz\n", ":6: unknown option zzzz"),
        (START + "    c.max_steps = 'many'\n",
         ":6: TypeError: Could not override field 'max_steps' (reference). many is of original "
         "type <class 'str'> and cannot be casted to type <class 'int'>"),
        (START + "    return c.seed / 0\n", ":6: ZeroDivisionError: division by zero"),
        (START + "    raise ValueError('mine')\n", ":6: ValueError: mine"),
        (START + "    return open('absent.txt')\n",
         ":6: FileNotFoundError: [Errno 2] No such file or directory: 'absent.txt'"),
    ],
)  # fmt: skip
def test_an_error_of_a_config_is_told_with_its_place(text, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    result = run(*TRAIN, f"--config={path}")
    assert error_of(result) == f"{path}{message}"
    assert "hush" not in result.stderr
    traced = run(*TRAIN, f"--config={path}", ATLAS_TRACEBACK="1")
    assert "Traceback" in traced.stderr
    assert f'"{path}", line' in traced.stderr or "no function" in message or "returns" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("output_dir=null", "output_dir is empty; set --config.output_dir=…"),
    ],
)
def test_values_that_do_not_fit_are_refused(change, message):
    result = run(*TRAIN, f"--config={SFT}", f"--config.{change}")
    assert error_of(result, 1).startswith(message)


def test_an_option_is_set_by_its_former_name_and_by_its_present_one():
    names = "teaching.max_probe_tokens,teaching.student_baseline_template,teaching.lesson_template"
    for changes in (
        ("max_probe_tokens=7", "rollout.student_baseline_template={question}?",
         "data.lesson_template=L"),
        ("teaching.max_probe_tokens=7", "teaching.student_baseline_template={question}?",
         "teaching.lesson_template=L"),
    ):  # fmt: skip
        result = run(
            "tools/read_config.py", names, f"--config={GRPO}", *(f"--config.{c}" for c in changes)
        )
        assert result.stdout == "7\n{question}?\nL\n", result.stderr


def test_an_option_is_given_under_one_of_its_names():
    changes = ("--config.max_probe_tokens=7", "--config.teaching.max_probe_tokens=8")
    result = run(*TRAIN, f"--config={GRPO}", *changes)
    assert error_of(result) == (
        "max_probe_tokens and teaching.max_probe_tokens are two names of one option; give one"
    )


def test_none_and_null_empty_an_option():
    names = "resume_from,data.eval_path,tokenizer_name_or_path,reward.rim.cache_dir,reward.names"
    changes = [
        "resume_from=null", "data.eval_path=None", "tokenizer_name_or_path=none",
        "reward.rim.cache_dir=null", "reward.names=[exact_match]",
    ]  # fmt: skip
    result = run(
        "tools/read_config.py", names, f"--config={GRPO}", *(f"--config.{c}" for c in changes)
    )
    assert result.stdout == "\n\n\n\n('exact_match',)\n", result.stderr


def test_the_questions_that_an_effect_needs_are_told_without_a_model():
    """`atlas-evaluate --effect 0.1`, of the documentation."""
    result = run(*COMMANDS["evaluate"], "--effect", "0.1", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    counts = {row["changed"]: row["questions"] for row in found["needed"]}
    assert list(counts) == [0.1, 0.2, 0.3, 0.4, 0.5] and found["power"] == 0.8
    # Connor's formula, (1.96 sqrt(c) + 0.842 sqrt(c - 0.01))^2 / 0.01, for c = 0.3: 233.
    assert 233 < counts[0.3] < 1.1 * 233
    shown = run(*COMMANDS["evaluate"], "--effect", "0.1").stdout
    assert f"+10.0 points                   30%  {counts[0.3]:>10}\n" in shown
    wrong = run(*COMMANDS["evaluate"], "--effect=10")
    assert error_of(wrong) == "--effect=10 must be above 0 and at most 1, such as 0.1"
