"""The interface of the Atlas SDK over a real database."""

import asyncio
import subprocess
import sys

import pytest

from atlas_jax import training_data
from tests.runtime_database import execute, new_database, session


@pytest.fixture(scope="module")
def url():
    return new_database([session(i) for i in range(250)])


def numbers(sessions):
    return [s.session_metadata["session_id"] for s in sessions]


def test_the_async_forms_answer_as_the_others(url):
    async def ask():
        filters = {"status_filters": ["succeeded"], "min_reward": 0.5}
        return (
            await training_data.get_training_sessions_async(url, limit=7, **filters),
            [s async for s in training_data.iter_training_sessions_async(url)],
            await training_data.count_training_sessions_async(url, **filters),
            await training_data.get_session_by_id_async(url, 9),
            training_data.count_training_sessions(url),  # inside a running event loop
        )

    some, everything, count, one, total = asyncio.run(ask())
    filters = {"status_filters": ["succeeded"], "min_reward": 0.5}
    assert some == training_data.get_training_sessions(url, limit=7, **filters)
    assert numbers(everything) == list(range(250, 0, -1))
    assert count == training_data.count_training_sessions(url, **filters)
    assert one == everything[-9]
    assert total == 250


def test_a_time_limit_of_the_sdk_is_taken_over(url):
    class SdkConfig(training_data.StorageConfig):
        database_url = "unused"

    config = SdkConfig(statement_timeout_seconds=5.0)
    assert training_data.get_session_by_id(url, 1, config=config).task == "What is 0 plus 0?"


def test_a_session_that_cannot_be_read_is_left_out_and_named(caplog):
    url = new_database([session(i) for i in range(3)])
    execute(url, "UPDATE sessions SET reward = '[1]' WHERE id = 2")
    assert numbers(training_data.get_training_sessions(url)) == [3, 1]
    assert "session 2 is left out: it has a JSON list of 1 as session_reward" in caplog.text


@pytest.mark.usefixtures("torch_to_find")
def test_neither_jax_nor_torch_is_imported():
    check = "import sys, atlas_jax.training_data; print({'jax', 'torch'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
