"""Small models of a trainer and its servers, for files of tests that have none of their own."""

import pytest

from tests import words
from tests.rollout import served


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The model that the servers are started with."""
    directory = tmp_path_factory.mktemp("old")
    return served.trainer(words.save(directory, served.WORDS, **served.SIZES))


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    directory = tmp_path_factory.mktemp("new")
    return served.trainer(words.save(directory, served.WORDS, seed=1, **served.SIZES))
