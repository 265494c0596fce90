"""Why: a mean that is not the distribution's own makes every table wrong by that share."""

import numpy as np
import pytest

from megatron_fipo.errors import ConfigError
from megatron_fipo.rollout.loads import ResponseLengths
from megatron_fipo.simulation.lengths import Lengths
from tests.rollout.engines import problems


@pytest.mark.parametrize(("mean", "spread"), [(3700, 0.8), (10_000, 0.8), (18_000, 1.5), (100, 0.1), (2000, 2.0)])
def test_the_mean_is_that_after_the_cut(mean: float, spread: float) -> None:
    drawn = Lengths(mean, spread, 20_480).draw(400_000, np.random.default_rng(1))
    assert drawn.mean() == pytest.approx(mean, rel=0.01)
    assert drawn.min() >= 1 and drawn.max() <= 20_480


@pytest.mark.parametrize(("mean", "spread"), [(3700, 0.8), (8_000, 1.5), (200, 0.0)])
def test_what_is_held_is_what_a_run_learns_from_its_responses(mean: float, spread: float) -> None:
    """The simulated engine is asked for as many samples as a real one only if both expect the same of a sample."""
    lengths = Lengths(mean, spread, 20_480)
    learnt = ResponseLengths(lengths.longest)
    for row in lengths.draw(256 * 400, np.random.default_rng(1)).reshape(256, 400):
        learnt.note(problems(1)[0], row.tolist())
    assert lengths.held == pytest.approx(learnt.held, rel=0.01)
    assert spread == 0 or lengths.held > 0.6 * mean, "the control: it is not half of the mean"


def test_spread_is_that_of_the_logarithm_where_nothing_is_cut() -> None:
    drawn = Lengths(1000, 0.5, 10**6).draw(200_000, np.random.default_rng(1))
    assert np.log(drawn).std() == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("alike", [0.3, 0.9])
def test_responses_to_one_problem_are_as_alike_as_asked(alike: float) -> None:
    lengths = Lengths(1000, 0.5, 10**6, alike)
    found, expected = lengths.draw_groups(20_000, 8, np.random.default_rng(1), np.random.default_rng(2))
    logarithms = np.log(found)
    assert found.mean() == pytest.approx(1000, rel=0.02) and logarithms.std() == pytest.approx(0.5, rel=0.02)
    assert np.corrcoef(logarithms[:, 0], logarithms[:, 1])[0, 1] == pytest.approx(alike, abs=0.02)
    # What is expected is of other responses: it is no nearer to these than their own kind.
    before = np.log(expected)
    assert np.corrcoef(before, logarithms[:, 0])[0, 1] == pytest.approx(
        np.sqrt(alike) * np.sqrt(alike / (alike + (1 - alike) / 8)), abs=0.03
    )


def test_groups_without_likeness_are_drawn_as_before() -> None:
    lengths = Lengths(1000, 0.5, 10**6)
    found, expected = lengths.draw_groups(10, 4, np.random.default_rng(1), np.random.default_rng(2))
    assert found.ravel().tolist() == lengths.draw(40, np.random.default_rng(1)).tolist()
    assert set(expected) == {1000}


def test_no_spread_is_one_length() -> None:
    assert set(Lengths(77, 0, 100).draw(5, np.random.default_rng(1))) == {77}


def test_a_mean_beyond_the_longest_is_refused() -> None:
    with pytest.raises(ConfigError, match="--mean: 200 tokens"):
        Lengths(200, 1, 100).draw(1, np.random.default_rng(1))
