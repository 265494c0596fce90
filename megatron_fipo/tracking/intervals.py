"""Confidence intervals of a mean over problems, and over problems and seeds, by bootstrap. Vectorised by NumPy.

Problems and seeds are two separate samples: other problems would give another score, and so would other seeds. Both are
resampled, with replacement and independently of each other. The mean is taken over the drawn rows and columns. This is
Owen's pigeonhole bootstrap (The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007). The samples of one problem
are always drawn together: they are similar, and counting each separately would make the interval too narrow.

A bootstrap over m items has two faults: its spread is too small by √((m − 1)/m), and it uses a normal quantile where
Student's is right. With 3 seeds the interval has only 37 % of the right length. Hesterberg (What Teachers Should Know
About the Bootstrap, The American Statistician 69, 2015) corrects both by changing the level of the percentiles. That
needs more distinct draws than 3 seeds allow. So here the same factor, √(m/(m − 1)) · t/z, spreads the weights of each
draw around 1.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 10_000
_SEED = 20_260_319
"""Seed of the draws, so that the same scores always give the same interval."""
_BLOCK = 1000


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its interval. The ends are None if they cannot be computed."""

    mean: float
    low: float | None
    high: float | None

    @property
    def is_known(self) -> bool:
        """Whether the ends are known."""
        return self.low is not None

    def excludes_zero(self) -> bool:
        """Whether the interval excludes 0, so that a difference is significant."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_interval(scores: Values, level: float = LEVEL) -> Interval:
    """Return the mean of `scores`, (seeds, problems), each in [0, 1], with its interval over both.

    With one seed the interval covers only problems. With one column (the means of whole runs) it covers only seeds.
    With one seed and one column it is unknown. If all scores are 0, or all are 1, all draws are the same. The interval
    is then the exact one of Clopper and Pearson for the number of problems.
    """
    seeds, problems = scores.shape
    mean = float(scores.mean())
    is_constant = float(scores.min()) == float(scores.max())
    if problems == 1 and is_constant:  # one number, or equal means of whole runs, whose uncertainty is not known
        return Interval(mean, None, None)
    if is_constant and mean in (0.0, 1.0):
        reach = 1.0 - ((1.0 - level) / 2) ** (1.0 / problems)
        return Interval(mean, max(0.0, mean - reach), min(1.0, mean + reach))
    generator = np.random.default_rng(_SEED)
    draws = _blocks(
        lambda count: _means(
            scores, _weights(generator, seeds, count, level), _weights(generator, problems, count, level)
        )
    )
    low, high = _ends(draws, level)
    return Interval(mean, float(np.clip(low, 0.0, mean)), float(np.clip(high, mean, 1.0)))


def difference_interval(scores: Values, baseline: Values, level: float = LEVEL) -> Interval:
    """Return the mean of `scores` minus that of `baseline`, with its interval; both (seeds, problems), same problems.

    The two are paired by problem: a draw takes the same problems for both, so that a problem that is hard for both does
    not count as noise. Seeds are drawn separately, since the fifth run of one algorithm has nothing in common with the
    fifth run of another.
    """
    if scores.shape[1] != baseline.shape[1]:
        raise ValueError(f"{scores.shape[1]} problems against {baseline.shape[1]}; pairs need the same ones")
    mean = float(scores.mean() - baseline.mean())
    if scores.shape[1] == 1 and 1 in (scores.shape[0], baseline.shape[0]):
        return Interval(mean, None, None)
    generator = np.random.default_rng(_SEED)

    def draw(count: int) -> Values:
        problems = _weights(generator, scores.shape[1], count, level)
        ours = _means(scores, _weights(generator, scores.shape[0], count, level), problems)
        return ours - _means(baseline, _weights(generator, baseline.shape[0], count, level), problems)

    low, high = _ends(_blocks(draw), level)
    return Interval(mean, float(np.clip(low, -1.0, mean)), float(np.clip(high, mean, 1.0)))


def _blocks(draw: Callable[[int], Values]) -> Values:
    """Return RESAMPLES draws, computed in blocks to limit memory: 10,000 problems take 80 MB."""
    return np.concatenate([draw(_BLOCK) for _ in range(RESAMPLES // _BLOCK)])


def _weights(generator: np.random.Generator, size: int, count: int, level: float) -> Values:
    """Return (count, size) weights with mean 1 per row: how often each item was drawn, spread as described above."""
    if size == 1:
        return np.ones((count, 1))
    # Ten times as fast as the multinomial distribution's own generator.
    places = generator.integers(size, size=(count, size), dtype=np.int32) + size * np.arange(count)[:, None]
    drawn = np.bincount(places.ravel(), minlength=count * size).reshape(count, size)
    return np.asarray(1.0 + _spread(size, level) * (drawn - 1.0), dtype=np.float64)


def _means(scores: Values, seeds: Values, problems: Values) -> Values:
    """Return the (count,) means of (seeds, problems) scores under (count, seeds) and (count, problems) weights."""
    return np.asarray(((seeds @ scores) * problems).mean(axis=1) / scores.shape[0])


def _ends(draws: Values, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@functools.cache
def _spread(size: int, level: float) -> float:
    probability = (1.0 + level) / 2
    normal = NormalDist().inv_cdf(probability)
    return float((size / (size - 1)) ** 0.5 * student_quantile(probability, size - 1) / normal)


@functools.cache
def student_quantile(probability: float, degrees: int) -> float:
    """Return a quantile of Student's distribution, for probabilities above one half."""
    # Imported here, so that --help does not wait for it.
    from mpmath import betainc

    low, high = 0.0, 1000.0  # for one degree the 97.5 % quantile is 12.7
    while high - low > 1e-9:
        middle = (low + high) / 2
        inside = degrees / (degrees + middle * middle)
        tail = betainc(degrees / 2, 0.5, 0, inside, regularized=True) / 2
        low, high = (middle, high) if tail > 1 - probability else (low, middle)
    return low
