"""Where metrics go beside metrics.jsonl; real packages, where they are installed."""

import dataclasses
import importlib.util
import json
import math
import os
import sqlite3
import struct
import subprocess
import sys
import time

import pytest

from atlas_jax import config, metrics, reporting


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


def test_none_reports_nowhere(tmp_path):
    writer = metrics.open_writer(options(tmp_path / "run"), 0)
    writer.write(1, {"loss/total": 1.0})
    writer.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandbb", "report_to has 'wandbb'; use some of tensorboard, wandb, trackio, "
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
    runs, logged, axes = set(), [], set()
    for path in sorted((tmp_path / "run").glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                runs.add((record.run.run_id, record.run.project, record.run.display_name))
            elif kind == "history":
                values = {
                    i.key or "/".join(i.nested_key): i.value_json for i in record.history.item
                }
                logged.append((int(values["step"]), float(values["loss/total"])))
            elif kind == "metric":
                axes.add((record.metric.name or record.metric.glob_name, record.metric.step_metric))
    ((identity, project, name),) = runs
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
