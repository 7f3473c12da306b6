"""Shares of a reward's variance, against rewards that are made of known parts."""

import numpy as np
import pytest

from tools import reward_shares
from tools.reward_shares import Lever


def drawn(lesson, luck, common, size=(400, 8, 8)):
    """Rewards of normal parts with these standard deviations, and a level for each question."""
    rng = np.random.default_rng(0)
    count, lessons, repeats = size
    return (
        rng.normal(0, 3.0, (count, 1, 1))
        + rng.normal(0, lesson, (count, lessons, 1))
        + rng.normal(0, luck, size)
        + rng.normal(0, common, (count, 1, repeats))
    )


@pytest.mark.parametrize(
    ("lesson", "luck", "common"), [(1.0, 1.0, 0.0), (0.5, 1.0, 1.0), (0.0, 1.0, 0.0)]
)
def test_the_shares_are_those_that_the_rewards_were_made_with(lesson, luck, common):
    found = reward_shares.of(drawn(lesson, luck, common))
    noise = luck**2 + common**2
    assert found.share == pytest.approx(lesson**2 / (lesson**2 + noise), abs=0.02)
    assert found.compared == pytest.approx(lesson**2 / (lesson**2 + luck**2), abs=0.02)
    assert found.taught == pytest.approx(luck, rel=0.02)
    assert found.alone == pytest.approx(common, abs=0.06)
    assert found.lesson == pytest.approx(lesson, abs=0.06)


def test_the_shares_of_shrout_and_fleiss():
    """Their table 2: six targets, four judges; ICC(2,1) = 0.29 and ICC(3,1) = 0.71."""
    ratings = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    found = reward_shares.of(np.asarray([ratings], float))
    assert found.share == pytest.approx(0.29, abs=0.005)
    assert found.compared == pytest.approx(0.71, abs=0.005)


def test_a_greedy_student_leaves_all_to_the_lesson_where_lessons_differ():
    found = reward_shares.of(np.asarray([[[0.0], [1.0]], [[1.0], [1.0]]]))
    assert (found.share, found.compared, found.taught, found.equal) == (1.0, 1.0, 0.0, 0.5)


def test_the_mean_over_more_answers_is_the_surer_reward():
    names = [lever.name for lever in reward_shares.levers(8)]
    assert names[:4] == [
        "one answer, one alone", "num_guided=2", "num_guided=4", "num_guided=2 num_baseline=2",
    ]  # fmt: skip
    single = drawn(0.5, 1.0, 0.0)
    mean = single.reshape(400, 8, 2, 4).mean(-1)
    assert reward_shares.of(mean).share > reward_shares.of(single).share + 0.2


def test_each_lever_has_its_line():
    rows = [(Lever("a"), reward_shares.of(drawn(1, 1, 0, (4, 3, 2))), 4)]
    head, line = reward_shares.table(rows).splitlines()
    assert head.split()[0] == "lever"
    assert line.split()[0] == "a"
    assert len(line) == len(head)
