"""Why: a wrong standard deviation or ramp changes every gradient and no run ever fails for it.

Does not cover which rewards reach the advantages; tests/rewards/test_pool.py does.
"""

import pytest
import torch

from megatron_fipo.algorithm.advantages import group_advantages, overlong_penalty

REWARDS = [1.0, -1.0, -1.0, 0.25, 1.0, -1.5]


def test_advantages_are_the_formula_with_the_unbiased_standard_deviation():
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    expected = (rewards - rewards.mean()) / (rewards.std(unbiased=True) + 1e-6)
    torch.testing.assert_close(torch.tensor(group_advantages(REWARDS, norm_by_std=True), dtype=torch.float64), expected)
    biased = (rewards - rewards.mean()) / (rewards.std(unbiased=False) + 1e-6)
    assert not torch.allclose(biased, expected, rtol=1e-2)


def test_without_the_standard_deviation_the_rewards_are_only_centred():
    assert group_advantages([1.0, 0.0, -1.0], norm_by_std=False) == [1.0, 0.0, -1.0]


@pytest.mark.parametrize("rewards", [[], [1.0], [0.1] * 7])
def test_a_group_without_contrast_has_no_advantage(rewards):
    assert group_advantages(rewards, norm_by_std=True) == [0.0] * len(rewards)


@pytest.mark.parametrize(("length", "penalty"), [(0, 0.0), (16384, 0.0), (18432, -0.5), (20480, -1.0)])
def test_overlong_penalty_ramps_down_over_the_buffer_of_the_32b_recipe(length, penalty):
    found = overlong_penalty(length, max_response_length=20480, buffer_length=4096, penalty_factor=1.0)
    assert found == pytest.approx(penalty)


def test_overlong_penalty_scales_with_its_factor():
    assert overlong_penalty(100, max_response_length=100, buffer_length=50, penalty_factor=0.3) == pytest.approx(-0.3)
