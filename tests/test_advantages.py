"""Group advantages: numbers by hand, and members that could not be scored."""

import numpy as np
import pytest

from atlas_jax.losses import group_advantages


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_advantages_by_hand():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, 5.0, 2.0, 3.0]])
    centered = np.array([[0.5, -0.5, -0.5, 0.5], [-1.0, 2.0, -1.0, 0.0]])
    first, second = np.sqrt(1 / 3), np.sqrt(2.0)  # sums of squares 1 and 6, over 3
    everywhere = np.sqrt(19.5 / 7)  # mean 14/8; 44 - 14**2 / 8 = 19.5, over 7
    by_group = centered / (np.array([[first], [second]]) + 1e-4)
    close(group_advantages(rewards, "none"), centered)
    close(group_advantages(rewards, "group"), by_group)
    close(group_advantages(rewards, "batch"), centered / (everywhere + 1e-4))
    assert group_advantages(rewards, "group").dtype == np.float32


@pytest.mark.parametrize("scale_rewards", ["none", "group", "batch"])
def test_a_member_without_reward_moves_nobody(scale_rewards):
    nan = np.nan
    rewards = np.array([[1.0, nan, 3.0, 8.0], [nan, 2.0, 0.0, 4.0]])
    found = group_advantages(rewards, scale_rewards)
    others = group_advantages(np.array([[1.0, 3.0, 8.0], [2.0, 0.0, 4.0]]), scale_rewards)
    assert found[0, 1] == found[1, 0] == 0
    close(found[~np.isnan(rewards)], others.ravel())


@pytest.mark.parametrize("scale_rewards", ["none", "group", "batch"])
def test_groups_that_cannot_be_compared_have_no_advantage(scale_rewards):
    nan = np.nan
    rewards = np.array([[nan, 7.0, nan], [nan] * 3, [0.1] * 3, [0.0, 1.0, 2.0]])
    found = group_advantages(rewards, scale_rewards)
    assert not found[:3].any()
    assert found[3, 0] < 0 == found[3, 1] < found[3, 2]
    assert not group_advantages(rewards[:1], scale_rewards).any()
    assert not group_advantages(rewards[1:2], scale_rewards).any()


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
def test_large_float32_rewards_do_not_overflow(scale_rewards):
    rewards = np.array([[0.0, 1e30]], np.float32)
    half = np.sqrt(0.5)  # 0.5 over the standard deviation sqrt(0.5)
    close(group_advantages(rewards, scale_rewards), [[-half, half]])


@pytest.mark.parametrize(
    ("rewards", "scale_rewards", "message"),
    [
        ([[0.0, 1.0], [0.0, np.inf]], "group", "member 1 of group 1 is inf; use a finite"),
        ([[-np.inf, np.nan]], "none", "member 0 of group 0 is -inf"),
        ([[0.0, 1.0]], "std", "scale_rewards='std' must be one of none, group, batch"),
    ],
)
def test_rewards_that_cannot_be_compared_are_refused(rewards, scale_rewards, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(np.array(rewards), scale_rewards)
