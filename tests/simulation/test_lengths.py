"""Why: a mean that is not the distribution's own makes every table wrong by that share."""

import numpy as np
import pytest

from megatron_fipo.errors import ConfigError
from megatron_fipo.simulation.lengths import Lengths


@pytest.mark.parametrize(("mean", "spread"), [(3700, 0.8), (10_000, 0.8), (18_000, 1.5), (100, 0.1), (2000, 2.0)])
def test_the_mean_is_that_after_the_cut(mean: float, spread: float) -> None:
    drawn = Lengths(mean, spread, 20_480).draw(400_000, np.random.default_rng(1))
    assert drawn.mean() == pytest.approx(mean, rel=0.01)
    assert drawn.min() >= 1 and drawn.max() <= 20_480


def test_spread_is_that_of_the_logarithm_where_nothing_is_cut() -> None:
    drawn = Lengths(1000, 0.5, 10**6).draw(200_000, np.random.default_rng(1))
    assert np.log(drawn).std() == pytest.approx(0.5, rel=0.01)


def test_no_spread_is_one_length() -> None:
    assert set(Lengths(77, 0, 100).draw(5, np.random.default_rng(1))) == {77}


def test_a_mean_beyond_the_longest_is_refused() -> None:
    with pytest.raises(ConfigError, match="--mean: 200 tokens"):
        Lengths(200, 1, 100).draw(1, np.random.default_rng(1))
