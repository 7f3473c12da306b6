"""Where metrics go beside metrics.jsonl; real packages, where they are installed."""

import dataclasses
import html
import importlib.util
import json
import math
import os
import re
import sqlite3
import struct
import subprocess
import sys
import time

import pytest

from atlas_jax import config, metric_docs, metrics, reporting
from atlas_jax.rollout import record
from atlas_jax.types import Reward
from tests.report import runs


def options(path, *report_to):
    path.mkdir(exist_ok=True)
    return dataclasses.replace(
        config.SFTConfig(), model_name_or_path="m", output_dir=str(path), report_to=report_to
    )


def needs(package):
    spec = importlib.util.find_spec(package)
    return pytest.mark.skipif(
        spec is None or spec.origin is None,
        reason=f"{package} is not installed; pip install -e '.[report]' brings it",
    )


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_reports.py").write_text(
        "seen = []\n"
        "def report(step, values):\n    seen.append((step, values))\n"
        "def broken(step, values):\n    return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda: sys.modules["own_reports"].seen
    sys.modules.pop("own_reports", None)


def test_a_function_of_the_users_gets_step_and_metrics(tmp_path, own_module, caplog):
    made = options(tmp_path / "run", "own_reports:broken", "own_reports:report")
    writer = metrics.open_writer(made, 0)
    writer.write(3, {"loss/total": 1.5})
    writer.write(4, {"loss/total": math.nan})
    writer.write_text(4, "lessons", "text")
    writer.close()
    first, second = own_module()
    assert first == (3, {"loss/total": 1.5})
    assert second[0] == 4
    assert math.isnan(second[1]["loss/total"])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss/total"] for line in lines] == [1.5, None]


def test_tensorboard_shows_numbers_and_texts(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = metrics.open_writer(options(tmp_path / "run", "tensorboard"), 0)
    writer.write(2, {"loss/total": 1.5})
    writer.write_text(2, "lessons", "**a lesson**")
    writer.close()
    found = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss/total")] == [(2, 1.5)]
    assert found.Tensors("lessons")[0].tensor_proto.string_val == [b"**a lesson**"]
    # A checkpoint of step 1: what is done again takes the place of what was shown.
    writer = metrics.open_writer(options(tmp_path / "run", "tensorboard"), 1)
    writer.write(2, {"loss/total": 1.25})
    writer.close()
    found = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss/total")] == [(2, 1.25)]


def test_tensorboard_says_what_each_metric_means(tmp_path):
    """Read as TensorBoard reads it: the description comes with the first value of each file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = metrics.open_writer(options(tmp_path / "run", "tensorboard"), 0)
    names = ("policy/kl", "eval/accuracy_delta", "reward/teaching_gain", "mine/own")
    for step in (1, 2):
        writer.write(step, dict.fromkeys(names, step / 2))
        writer.write_text(step, "lessons", "text")
    writer.close()
    found = EventAccumulator(str(tmp_path / "run")).Reload()
    told = {name: found.SummaryMetadata(name).summary_description for name in (*names, "lessons")}
    meaning = metric_docs.METRICS["policy/kl"].meaning
    assert told["policy/kl"] == f"{meaning} Unit: nats per token."
    assert told["eval/accuracy_delta"].endswith("On held-out questions, decoded greedily.")
    assert "that is called teaching_gain" in told["reward/teaching_gain"]
    assert told["mine/own"] == ""
    assert "the student's answer alone, its plan, the lesson" in told["lessons"]
    assert [e.value for e in found.Scalars("policy/kl")] == [0.5, 1.0]
    (file,) = (tmp_path / "run").glob("events.out.tfevents*")
    assert file.read_bytes().count(meaning.encode()) == 1, "once a file, not once a step"


def test_every_metric_that_is_documented_has_a_description():
    assert all(metric_docs.describe(name).startswith(m.meaning.partition("NAME")[0])
               for name, m in metric_docs.METRICS.items())  # fmt: skip


def test_lessons_are_paragraphs_with_plan_and_verdict(tmp_path):
    """What TensorBoard shows of them: texts as they are, whatever Markdown would make of them."""
    from tensorboard import plugin_util
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lesson = "Use <b>2 * 3 * 4</b> | and # not [this](x)\nthen `stop`"
    helped = runs.sample("q1", 0, False, True, teaching=lesson, details={"gaming": [runs.LEAK]})
    untaught = runs.sample("q2", 0, True, True, teaching="", place=1)
    untaught = untaught._replace(completion=runs.said("no tags"), reward=Reward(None, {}))
    direct = runs.sample("q3", 0, True, True, place=2)
    direct = direct._replace(baseline=None, probe=None, guided=None)
    writer = metrics.open_writer(options(tmp_path / "run", "tensorboard"), 0)
    writer.write_text(1, "lessons", record.lessons_text([helped, untaught, direct], count=3))
    writer.close()
    found = EventAccumulator(str(tmp_path / "run")).Reload()
    (text,) = found.Tensors("lessons")[0].tensor_proto.string_val
    shown = plugin_util.markdown_to_safe_html(text)
    first, second, third = (
        " ".join(html.unescape(re.sub("<[^>]+>", "", part)).split())
        for part in shown.split("<h3>")[1:]
    )
    assert first == (
        "Question 1 of 3 question How many is q1? right answer 4 alone I count 5 apples "
        "plan I would count lesson Use <b>2 * 3 * 4</b> | and # not [this](x) then `stop` "
        "taught With the lesson I count 4 pears "
        "verdict: wrong → right; reward 1.00; the lesson states the answer"
    )
    assert "text without a lesson no tags taught" in second
    assert second.endswith("verdict: right → right; not scored")
    assert "answer" in third and "plan" not in third and third.endswith("verdict: reward 0.00")


def test_standard_output_gets_lines_of_json(tmp_path, capsys):
    writer = metrics.open_writer(options(tmp_path / "run", "stdout"), 0)
    writer.write(3, {"loss/total": 1.5, "eval/nothing": math.nan})
    writer.write_text(3, "lessons", "text")
    writer.close()
    assert json.loads(capsys.readouterr().out) == {
        "step": 3, "loss/total": 1.5, "eval/nothing": None
    }  # fmt: skip


def test_none_reports_nowhere(tmp_path):
    writer = metrics.open_writer(options(tmp_path / "run"), 0)
    writer.write(1, {"loss/total": 1.0})
    writer.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandbb", "report_to has 'wandbb'; use some of tensorboard, wandb, trackio, stdout, "
         "package.module:function, or none; did you mean 'wandb'?"),
        ("own_reports:nothing", "report_to=own_reports:nothing: own_reports has no nothing"),
        ("json:decoder", "report_to=json:decoder: decoder is a module; it must be callable"),
    ],
)  # fmt: skip
def test_what_cannot_be_reported_to_is_said_first(name, message, own_module):
    with pytest.raises(ValueError) as error:
        reporting.check([name])
    assert str(error.value) == message


def test_a_missing_package_is_named_with_its_extra(tmp_path):
    """A directory `wandb`, as its offline runs leave one, is not the package."""
    (tmp_path / "wandb").mkdir()
    code = "import sys; from atlas_jax import reporting; reporting.check(['wandb'])"
    isolated = "import sys; sys.path = [p for p in sys.path if 'report_venv' not in p]; "
    found = subprocess.run(
        [sys.executable, "-c", isolated + code], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    if found.returncode == 0:
        pytest.skip("wandb is installed")
    assert found.stderr.splitlines()[-1] == (
        'ValueError: report_to=wandb needs the package wandb; install it with pip install -e '
        '".[report]" (or pip install wandb), or leave it out of report_to'
    )  # fmt: skip


def wandb_records(path):
    """The records of an offline run: LevelDB's log, blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@needs("wandb")
def test_a_continued_run_is_the_same_run_of_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    made = options(tmp_path / "run", "wandb")
    for start in (0, 1):  # a checkpoint of step 1: step 2 is done again
        writer = metrics.open_writer(made, start)
        for step in (start + 1, start + 2):
            writer.write(step, {"loss/total": 1.0 / step})
        writer.write_text(start + 2, "lessons", "text")
        writer.close()
        time.sleep(1.1)  # directories of offline runs are named by the second
    seen, logged, axes = set(), [], set()
    for path in sorted((tmp_path / "run").glob("wandb/offline-run-*/*.wandb")):
        for entry in wandb_records(path):
            kind = entry.WhichOneof("record_type")
            if kind == "run":
                seen.add((entry.run.run_id, entry.run.project, entry.run.display_name))
            elif kind == "history":
                values = {i.key or "/".join(i.nested_key): i.value_json for i in entry.history.item}
                logged.append((int(values["step"]), float(values["loss/total"])))
            elif kind == "metric":
                axes.add((entry.metric.name or entry.metric.glob_name, entry.metric.step_metric))
    ((identity, project, name),) = seen
    assert (project, name) == ("atlas_jax", "run")
    assert (tmp_path / "run" / ".wandb_run").read_text() == f"{identity}\n"
    assert logged == [(step, pytest.approx(1.0 / step)) for step in (1, 2, 2, 3)]
    assert axes == {("step", ""), ("*", "step")}


TRACKIO = """
import pathlib, sys
from atlas_jax import metrics
from tests.test_reporting import options
path, start = pathlib.Path(sys.argv[1]), int(sys.argv[2])
writer = metrics.open_writer(options(path, "trackio"), start)
for step in (start + 1, start + 2):
    writer.write(step, {"loss/total": 1.0 / step, "eval/nothing": float("nan")})
writer.close()
"""


@needs("trackio")
def test_a_continued_run_is_the_same_run_of_trackio(tmp_path):
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "TRACKIO_PROJECT": "mine"}
    for start in ("0", "1"):
        command = [sys.executable, "-c", TRACKIO, str(tmp_path / "run"), start]
        subprocess.run(command, env=environment, check=True, timeout=120)
    with sqlite3.connect(tmp_path / "trackio" / "mine.db") as database:
        rows = database.execute("SELECT run_id, step, metrics FROM metrics").fetchall()
    assert len({row[0] for row in rows}) == 1
    assert [(step, json.loads(text)["loss/total"]) for _, step, text in rows] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 2, 3)
    ]
