"""The snapshot that a run trains on."""

import dataclasses
import json

import psycopg
import pyarrow.parquet
import pytest

from atlas_jax.config import DataConfig
from atlas_jax.data import sources
from atlas_jax.traces import snapshot
from tests import runtime_database
from tests.runtime_database import execute, new_database, session


def names(output_dir):
    return [name for name, _ in snapshot.read(output_dir)]


@pytest.fixture
def config():
    url = new_database([session(3 * i, review_status="approved") for i in range(5)])
    return DataConfig(db_url=url, format="session")


@pytest.fixture
def run(config, tmp_path):
    snapshot.take(config, str(tmp_path))
    return str(tmp_path)


def test_it_says_what_was_asked_and_how_far_the_database_went(config, run, tmp_path):
    described = json.loads((tmp_path / "data/sessions-0000.json").read_text())
    assert described["query"]["review_status_filters"] == ["approved"]
    assert described["watermark"] == {
        "session_id": 5, "created_at": "2025-01-01T00:00:02+00:00",
    }  # fmt: skip
    assert described["sessions"] == 5
    table = pyarrow.parquet.read_table(tmp_path / "data/sessions-0000.parquet")
    assert table["session_id"].to_pylist() == [5, 4, 3, 2, 1]
    assert json.loads(table["record"][0].as_py())["task"] == "What is 12 plus 12?"


def test_a_run_does_not_see_what_becomes_of_the_database(config, run):
    before, _ = sources.load_rows(config, 0, run)
    execute(config.db_url, "DELETE FROM sessions WHERE id > 1")
    execute(config.db_url, "DROP TABLE step_attempts")
    snapshot.check(config, run)
    snapshot.take(config, run)
    assert sources.load_rows(config, 0, run)[0] == before
    assert [row.name for row in before.rows] == [f"session {i}" for i in (5, 4, 3, 2, 1)]


def test_a_refresh_reads_the_database_again_and_keeps_the_old_snapshot(config, run, tmp_path):
    old = (tmp_path / "data/sessions-0000.parquet").read_bytes()
    execute(config.db_url, "UPDATE sessions SET review_status = 'quarantined' WHERE id = 2")
    with psycopg.connect(config.db_url) as connection:
        runtime_database.fill(connection, [session(99, review_status="approved")])
    snapshot.take(dataclasses.replace(config, refresh=True), run)
    assert names(run) == [f"session {i}" for i in (6, 5, 4, 3, 1)]
    assert (tmp_path / "data/sessions-0000.parquet").read_bytes() == old
    snapshot.take(config, run)
    assert len(names(run)) == 5


def test_other_filters_than_those_of_the_snapshot_are_an_error(config, run):
    changed = dataclasses.replace(config, min_reward=0.5)
    with pytest.raises(ValueError, match=r"was read with min_reward=0.0 \(now 0.5\).*refresh=true"):
        snapshot.check(changed, run)


def test_a_snapshot_that_was_changed_is_an_error(config, run, tmp_path):
    with (tmp_path / "data/sessions-0000.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"is not the file that sessions-0000.json describes"):
        names(run)


def test_a_read_that_was_killed_leaves_no_snapshot(config, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sessions-0000.partial").write_bytes(b"half")
    (tmp_path / "data/sessions-0000.parquet").write_bytes(b"without its description")
    with pytest.raises(ValueError, match="holds no snapshot"):
        names(str(tmp_path))
    snapshot.take(config, str(tmp_path))
    assert len(names(str(tmp_path))) == 5


def test_a_database_without_a_session_that_passes_is_an_error_before_anything_starts(
    config, tmp_path
):
    changed = dataclasses.replace(config, learning_key="none")
    with pytest.raises(ValueError, match=r"none of 5 sessions .* passes the filters"):
        snapshot.check(changed, str(tmp_path))
    with pytest.raises(ValueError, match="created_after; it must be a time"):
        snapshot.check(dataclasses.replace(config, created_after="soon"), str(tmp_path))


def test_the_newest_sessions_are_taken_where_there_is_a_limit(config, tmp_path):
    snapshot.take(dataclasses.replace(config, max_sessions=2), str(tmp_path))
    assert names(str(tmp_path)) == ["session 5", "session 4"]
