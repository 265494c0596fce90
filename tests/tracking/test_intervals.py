"""Why: with intervals that are too narrow, a lucky seed looks like a discovery. The tests compare with known answers,
and count how often intervals contain the true value on simulated problems, where a naive interval fails.

Not covered: scores far from those simulated, such as a benchmark of three problems.
"""

from statistics import NormalDist

import numpy as np
import pytest

from megatron_fipo.tracking import intervals
from megatron_fipo.tracking.intervals import difference_interval, mean_interval, student_quantile


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (2, 4.303), (4, 2.776), (29, 2.045), (1000, 1.962)])
def test_student_quantiles_are_those_of_the_printed_tables(degrees, quantile):
    assert student_quantile(0.975, degrees) == pytest.approx(quantile, abs=5e-4)


def test_all_right_is_the_exact_binomial_interval():
    assert mean_interval(np.ones((1, 30))).low == pytest.approx(0.8843, abs=1e-4)  # 0.025 ** (1 / 30)
    assert mean_interval(np.ones((1, 30))).high == 1.0
    assert mean_interval(np.zeros((3, 30))).high == pytest.approx(1 - 0.8843, abs=1e-4)


def test_many_problems_are_the_normal_interval():
    scores = np.random.default_rng(0).random((1, 2000))
    found, reach = mean_interval(scores), 1.96 * scores.std(ddof=1) / 2000**0.5
    assert found.low == pytest.approx(scores.mean() - reach, abs=0.05 * reach)
    assert found.high == pytest.approx(scores.mean() + reach, abs=0.05 * reach)
    assert mean_interval(scores) == found, "the draws have a seed"


def test_seeds_alone_and_one_number():
    found = mean_interval(np.array([[0.5], [0.6], [0.7]]))
    assert found.low < 0.5 < 0.7 < found.high, "three seeds say less than their range"
    assert not mean_interval(np.array([[0.5]])).is_known
    assert not mean_interval(np.array([[1.0], [1.0]])).is_known, "of how many problems?"


def simulated(generator: np.random.Generator, seeds: int, problems: int, samples: int, seed_spread: float):
    """(seeds, problems) shares right, of problems of any difficulty and seeds that are better or worse at all."""
    difficulty = generator.normal(0.5, 2.0, size=problems)
    ability = generator.normal(0.0, seed_spread, size=seeds)
    return generator.binomial(samples, 1 / (1 + np.exp(-difficulty - ability[:, None]))) / samples


def truth(seed_spread: float) -> float:
    generator = np.random.default_rng(0)
    total = generator.normal(0.5, 2.0, size=10**6) + generator.normal(0.0, seed_spread, size=10**6)
    return float((1 / (1 + np.exp(-total))).mean())


@pytest.mark.parametrize(("seeds", "problems", "samples", "spread"), [(1, 30, 32, 0.0), (3, 30, 32, 1.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(monkeypatch, seeds, problems, samples, spread):
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    generator, right, repeats = np.random.default_rng(1), truth(spread), 300
    held = naive = 0
    for _ in range(repeats):
        scores = simulated(generator, seeds, problems, samples, spread)
        found, mean = mean_interval(scores), scores.mean()
        held += found.low <= right <= found.high
        reach = NormalDist().inv_cdf(0.975) * (mean * (1 - mean) / (scores.size * samples)) ** 0.5
        naive += mean - reach <= right <= mean + reach
    assert held / repeats > 0.91, "95 % less three standard errors of 300 repeats"
    assert naive / repeats < 0.6, "samples counted one by one: the check has to notice"


def test_a_difference_is_paired_by_problem():
    generator = np.random.default_rng(2)
    difficulty = generator.random(60)
    ours = np.clip(difficulty + 0.05 + generator.normal(0, 0.02, (3, 60)), 0, 1)
    theirs = np.clip(difficulty + generator.normal(0, 0.02, (4, 60)), 0, 1)
    found = difference_interval(ours, theirs)
    assert found.excludes_zero() and found.mean == pytest.approx(ours.mean() - theirs.mean())
    unpaired = difference_interval(ours, theirs[:, generator.permutation(60)])
    assert not unpaired.excludes_zero(), "the same numbers without their pairs"
    assert difference_interval(ours, ours).low <= 0 <= difference_interval(ours, ours).high
    with pytest.raises(ValueError, match="60 problems against 30"):
        difference_interval(ours, theirs[:, :30])


def test_a_difference_that_is_not_there_is_seldom_found(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    generator, found = np.random.default_rng(3), 0
    for _ in range(200):
        both = simulated(generator, 6, 40, 8, 0.5)
        found += difference_interval(both[:3], both[3:]).excludes_zero()
    assert found / 200 < 0.09
