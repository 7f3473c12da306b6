"""Batches do not depend on how many processes make them, also where a process has no group."""

import json
import os
import sys

import numpy as np
import pytest

from tests import processes
from tests.recipes import feed_process

QUESTIONS = (2, 4, 6)
"""Groups a step: on four processes fewer than there are, one for each, and 2 2 1 1."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns the directory of what 1, 2 and 4 processes with four devices together made."""
    directory = tmp_path_factory.mktemp("feeds")
    for count in (1, 2, 4):
        port = processes.free_port()
        names = ("ATLAS_COORDINATOR", "ATLAS_NUM_PROCESSES", "ATLAS_PROCESS_ID")
        command = [sys.executable, "-m", "tests.recipes.feed_process", str(directory / str(count))]
        asked = []
        for process in range(count):
            address = (f"127.0.0.1:{port}", str(count), str(process)) if count > 1 else ("",) * 3
            environment = os.environ | dict(zip(names, address, strict=True))
            environment["XLA_FLAGS"] = processes.xla_flags(4 // count)
            asked.append({"args": [*command, *map(str, QUESTIONS)], "env": environment})
        processes.finish(asked, directory / f"logs{count}")
    return directory


def samples(output, step):
    found = []
    for path in sorted((output / "rollouts").glob(f"step_{step + 1:06d}_process_*.jsonl")):
        found += [json.loads(line) for line in path.read_text().splitlines()]
    return found


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("number", QUESTIONS)
def test_batches_of_several_processes_are_those_of_one(made, number, count):
    one, several = made / "1" / str(number), made / str(count) / str(number)
    for step in range(feed_process.STEPS):
        expected, found = (np.load(path / f"batch_{step}.npz") for path in (one, several))
        for name in expected.files:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        known, same = (json.loads((p / f"step_{step}.json").read_text()) for p in (one, several))
        assert same["num_tokens"] == known["num_tokens"]
        assert same["state"] == known["state"]
        assert same["metrics"].keys() == known["metrics"].keys()
        for name, value in known["metrics"].items():
            np.testing.assert_allclose(same["metrics"][name], value, 1e-12, err_msg=name)
        assert samples(several, step) == samples(one, step)
        assert len(samples(one, step)) == number * feed_process.GROUP


def test_processes_give_up_a_batch_for_the_same_reason(made):
    """A stop counts before an outage, so that the exit code of all says that the run continues."""
    for count, reason in ((1, "DependencyError"), (2, "StopRequestedError")):
        found = {path.read_text() for path in (made / str(count)).glob("left_*")}
        assert found == {f"{reason} at 0"}
        assert len(list((made / str(count)).glob("left_*"))) == count


def test_only_processes_with_groups_write_a_record(made):
    names = {path.name[-len("process_0.jsonl") :] for path in made.glob("4/2/rollouts/*")}
    assert names == {"process_0.jsonl", "process_1.jsonl"}


def test_groups_were_skipped_and_replaced(made):
    """The comparison is of steps in which that happens."""
    found = [samples(made / f"1/{n}", i) for n in QUESTIONS for i in range(feed_process.STEPS)]
    trained = [any(s["trains"] and s["advantage"] for s in step) for step in found]
    skipped = [any(s["skipped"] for s in step) for step in found]
    assert any(map(all, zip(trained, skipped, strict=True)))
    last = json.loads((made / f"1/2/step_{feed_process.STEPS - 1}.json").read_text())
    assert last["state"]["position"] > 2 * feed_process.STEPS, "some were replaced"
