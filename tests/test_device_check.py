"""The device check on the CPU of this machine, with tiny shapes."""

import json
import os
import pathlib
import subprocess
import sys
import tarfile

import pytest

HERE = pathlib.Path("tools/device_check")


def results(directory):
    text = (directory / "results.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def environment(directory, **more):
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return alone | {"JAX_PLATFORMS": "cpu", "OUT": str(directory), "PYTHON": sys.executable} | more


def test_a_program_is_measured_and_estimated(tmp_path):
    command = [sys.executable, HERE / "check.py", "sft_1x8192", "--tiny"]
    subprocess.run(command, env=environment(tmp_path), check=True, capture_output=True)
    device, measured = results(tmp_path)
    assert device["kind"] == "cpu" and measured["case"] == "sft_1x8192.train"
    assert measured["tok_s"] > 0 and measured["estimated_s"] > 0
    assert measured["rates"] == "published"
    assert measured["losses"][0] > measured["losses"][-1]  # seven steps on one batch
    command = [sys.executable, HERE / "table.py", tmp_path / "results.jsonl"]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "sft_1x8192.train" in table and "NOT DONE" not in table


def test_an_unknown_case_is_one_line(tmp_path):
    command = [sys.executable, HERE / "check.py", "speed"]
    found = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1


@pytest.mark.long
def test_every_case_runs_and_holds(tmp_path):
    limits = {"SCALE": "8", "LIMIT": "3000"}
    command = ["bash", HERE / "run.sh", "--tiny"]
    subprocess.run(command, env=environment(tmp_path, **limits), check=True, capture_output=True)
    found = results(tmp_path)
    assert not [row for row in found if "failed" in row or "skipped" in row]
    assert [row for row in found if row["case"] == "values.attention"]
    assert all(row.get("good", True) for row in found)
    assert {"grpo.update", "grpo.logprobs", "sft_8x4096_packed.train"} <= {r["case"] for r in found}
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert rates["products"] > 0 and rates["source"].startswith("measured on cpu")
    with tarfile.open(tmp_path / "all.tgz") as archive:
        assert "./hlo_sft_8x4096.train.txt" in archive.getnames()
