"""The tools as their docstrings call them: from the repository root, without PYTHONPATH."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from atlas_jax.rewards import find_gaming
from tests import stand_in, tiny, words
from tests.test_cli import error_of
from tests.tokenizers import chatml_tokenizer

TOOLS = sorted(path.name for path in pathlib.Path("tools").glob("*.py"))
PARTS = {
    "_checkout.py", "bench_gkd.py", "bench_grpo.py", "bench_rollout.py", "bench_traces.py",
    "demo_kinds.py", "demonstrations.py", "reward_shares.py",
}  # fmt: skip
NEEDED = {
    "bench.py": "the following arguments are required: recipe; --help tells the arguments",
    "bench_sync.py": "the following arguments are required: --model, --server; --help tells the a",
    "export_traces.py": "the following arguments are required: --output; --help tells the arg",
    "inspect_data.py": "--config is needed: the name of a shipped recipe ("
    "demo_grpo, demo_sft, distil_taught_student, quickstart_grpo, quickstart_sft, rlvr_gsm8k, "
    "teacher_gkd, teacher_rcl, teacher_sft), a FILE.py or a PACKAGE.MODULE",
    "make_demo.py": "the following arguments are required: --output; --help tells the arguments",
    "plan.py": "--target KIND:SIZE is needed, such as h100:8",
    "read_config.py": "names of options are needed, such as output_dir,rollout.protocol",
    "reward_variance.py": "--teacher is needed; --help tells the flags",
    "score_traces.py": "the following arguments are required: --traces; --help tells the arg",
    "show_lesson.py": "the following arguments are required: MODEL; --help tells the arguments",
}


def run(tool, *words, **environment):
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, f"tools/{tool}", *map(str, words)], capture_output=True, text=True,
        check=False, env=alone | environment,
    )  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_tells_its_arguments_and_a_part_of_one_that_it_is_none(tool):
    result = run(tool, "--help")
    if tool in PARTS:
        assert result.returncode == (0 if tool.startswith("_") else 1)
        assert result.stdout == ""
        return
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) > 5


@pytest.mark.parametrize("tool", NEEDED)
def test_missing_and_unknown_arguments_are_one_line(tool):
    assert error_of(run(tool)).startswith(NEEDED[tool])
    assert "Traceback" not in run(tool, "--no-such-flag").stderr


@pytest.mark.parametrize("tool", sorted(PARTS - {"_checkout.py"}))
def test_a_part_of_a_tool_says_what_to_run(tool):
    assert error_of(run(tool), 1).startswith("this is a part of tools/")


def test_an_export_reads_the_address_of_the_database_from_the_environment(tmp_path):
    output = tmp_path / "traces.jsonl"
    result = run("export_traces.py", "--output", output, ATLAS_DATABASE_URL="")
    assert error_of(result).startswith("--database-url is not given, and ATLAS_DATABASE_URL is not")
    url = "postgresql://u:hush@127.0.0.1:1/d"
    result = run("export_traces.py", "--output", output, ATLAS_DATABASE_URL=url)
    assert error_of(result, 1).startswith("u@127.0.0.1:1/d cannot be read")
    assert "hush" not in result.stderr
    assert not output.exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tools") / "model"
    tiny.save("smollm2", directory)
    chatml_tokenizer().save_pretrained(directory)
    return directory


def test_a_lesson_is_shown_as_the_docstring_says(model):
    result = run("show_lesson.py", model, "--max_new_tokens", "2")
    assert result.returncode == 0, result.stderr
    assert "--- written by" in result.stdout
    assert error_of(run("show_lesson.py", model, "--row", "9999"), 1).startswith("--row 9999 must")
    assert error_of(run("show_lesson.py", "absent/model/x"), 1).startswith("absent/model/x does no")


def test_data_is_inspected_as_the_docstring_says(model, tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    words = [
        f"--config.model_name_or_path={model}", "--config.data.format=auto",
        f"--config.data.dataset_path={tmp_path / 'a.jsonl'}", "--config.data.eval_path=none",
    ]  # fmt: skip
    result = run("inspect_data.py", "configs/run/quickstart_sft.py", *words)
    assert result.returncode == 0, result.stderr
    assert "1 rows to train on, 0 held out" in result.stdout
    absent = run("inspect_data.py", "configs/run/absent.py")
    assert error_of(absent).startswith("configs/run/absent.py does not exist")


def test_the_inspection_counts_sessions_of_files_by_pattern(model, tmp_path):
    given = {"validation": {"guidance": "Carry.", "text": "21"}}
    step = {"description": "Add.", "output": "4", "guidance": ["Carry."],
            "attempt_history": [{"evaluation": given}]}  # fmt: skip
    for name in ("a.jsonl", "b,c.jsonl"):
        session = {"task": name, "review_status": "approved", "status": "succeeded"}
        (tmp_path / name).write_text(json.dumps(session | {"steps": [step]}) + "\n")
    result = run(
        "inspect_data.py", "configs/run/teacher_sft.py:data=runtime_traces",
        f"--config.data.dataset_path={tmp_path}/*.jsonl", "--config.data.eval_split_ratio=0",
        f"--config.model_name_or_path={model}", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert "  approved               2" in result.stdout.split("\n")
    assert "2 rows to train on, 0 held out" in result.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The questions of the demo by file."""
    folder = tmp_path_factory.mktemp("demo")
    result = run("make_demo.py", "--output", folder, "--sft", "0")
    assert result.returncode == 0, result.stderr
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval", "unseen")
    }


def test_the_demo_has_enough_questions_and_each_only_once(demo):
    counts = {name: len(rows) for name, rows in demo.items()}
    assert counts == {"train": 2000, "eval": 500, "unseen": 120}
    texts = [row["problem_text"] for rows in demo.values() for row in rows]
    assert len(set(texts)) == len(texts)


def test_the_demo_asks_of_kinds_that_were_never_trained_on(demo):
    kinds = {name: {row["kind"] for row in rows} for name, rows in demo.items()}
    assert kinds["eval"] <= kinds["train"]
    assert not kinds["unseen"] & kinds["train"]
    assert len(kinds["train"]) >= 10
    assert len(kinds["unseen"]) >= 4


def test_no_lesson_of_the_demo_gives_its_answer_away(demo):
    for row in (row for rows in demo.values() for row in rows):
        question, truth, lesson = (
            row[name] for name in ("problem_text", "ground_truth", "teacher_teaching")
        )
        assert find_gaming(question, truth, lesson) == []
        assert truth.isdecimal()


def test_the_demo_follows_from_its_seed(demo, tmp_path):
    sizes = ("--sft", "0", "--train", "40", "--eval", "5", "--unseen", "6")
    for seed, same in (("18", True), ("19", False)):
        result = run("make_demo.py", "--output", tmp_path, "--seed", seed, *sizes)
        assert result.returncode == 0, result.stderr
        rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
        assert (rows == demo["train"][:40]) == same


SHARES = """
import sys
sys.path.insert(0, "tools")
from demo_kinds import TRAINED
from demonstrations import make_problems
make_problems(145, 0, {"share": TRAINED["share"]})
"""


def test_more_questions_than_the_kinds_have_are_refused():
    """Of twelve things, quotients and divisors of 2 to 5 whose result is not in the question."""
    result = subprocess.run(
        [sys.executable, "-c", SHARES], capture_output=True, text=True, check=False
    )
    assert result.stderr.endswith(" the kinds have 144 problems, not 145; ask for fewer\n")


def test_demonstrations_need_a_student(tmp_path):
    found = error_of(run("make_demo.py", "--output", tmp_path), 1)
    assert found == "--sft and --trial ask the student; give --model, or --sft 0"


@pytest.mark.parametrize(
    ("staleness", "teacher", "student", "wall"), [(0, 0.55, 0.75, 0.85), (1, 0.75, 0.9, 0.5)]
)
def test_servers_are_busy_while_questions_move_alone(staleness, teacher, student, wall):
    """Against three barriers a step with the same lengths, in virtual time."""
    words = ("rollout", "--simulate", "--staleness", staleness)
    found = json.loads(run("bench.py", *words, "--questions", 4, "--generations", 32).stdout)
    assert found["barriers_teacher_frac"] == pytest.approx(0.36, abs=0.02)
    assert found["teacher_busy_frac"] >= teacher
    assert found["student_busy_frac"] >= student
    assert found["wall_frac"] <= wall


@pytest.mark.parametrize("staleness", [0, 1])
def test_processes_that_count_their_own_requests_alone_load_all_servers_evenly(staleness):
    """One question of 32 completions in each of four processes, over eight servers."""
    words = ("rollout", "--simulate", "--staleness", staleness, "--servers", 8, "--processes", 4)
    found = json.loads(run("bench.py", *words, "--questions", 4, "--generations", 32).stdout)
    assert (found["servers"], found["processes"]) == (8, 4)
    assert 0 < found["uneven_frac"] <= 0.2


def test_the_bench_of_rollouts_asks_servers(tmp_path):
    names = ("baseline", "probe", "policy", "guided", "explain", "why")
    path = words.save(tmp_path / "model", names, max_position_embeddings=256)
    options = ["--questions", 2, "--generations", 2, "--steps", 2, "--max-new-tokens", 8]
    assert error_of(run("bench.py", "rollout", *options), 1).startswith("--model, --teacher-serve")
    with stand_in.running(path, 2) as servers:
        urls = [url for url, _ in servers]
        options += ["--model", path, "--teacher-servers", urls[0], "--student-servers", urls[1]]
        result = run("bench.py", "rollout", "--staleness", 1, *options)
        asked = [len([call for call in s.calls if "generate" in call[1]]) for _, s in servers]
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert 0 < found["teacher_busy_frac"] <= 1
    assert found["wall_secs"] > 0
    assert asked[0] == 2 * 2 * 2
    assert 2 * 2 * 2 <= asked[1] <= 2 * 2 * 4
