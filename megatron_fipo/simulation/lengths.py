"""Lengths of responses: log-normal, and cut at the longest that a run allows."""

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from megatron_fipo.errors import ConfigError

_HALVINGS = 80


@dataclass(frozen=True)
class Lengths:
    """A distribution of response lengths, in tokens."""

    mean: float
    """Of the lengths as they are after the cut."""
    spread: float
    """Standard deviation of the logarithm before the cut; 0: all have the mean's length."""
    longest: int

    def draw(self, count: int, random: np.random.Generator) -> NDArray[np.int64]:
        """`count` lengths, each from 1 to the longest. ConfigError if there is no such distribution."""
        if not 1 <= self.mean <= self.longest:
            raise ConfigError(
                "--mean",
                f"{self.mean:g} tokens are no mean of responses of 1 to {self.longest} tokens",
                "another mean, or another rollout.max_response_length",
            )
        if self.spread == 0 or self.mean == self.longest:
            return np.full(count, round(self.mean), dtype=np.int64)
        drawn = random.lognormal(_location(self), self.spread, count)
        return np.clip(np.rint(drawn), 1, self.longest).astype(np.int64)


@functools.cache
def _location(lengths: Lengths) -> float:
    """Mean of the logarithm before the cut, such that lengths have their mean after it."""
    low, high = math.log(lengths.mean) - lengths.spread**2, math.log(lengths.longest) + 20 * lengths.spread
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean_after_cut(lengths, middle) < lengths.mean else (low, middle)
    return (low + high) / 2


def _mean_after_cut(lengths: Lengths, location: float) -> float:
    normal, cut = NormalDist(), (math.log(lengths.longest) - location) / lengths.spread
    below = math.exp(location + lengths.spread**2 / 2) * normal.cdf(cut - lengths.spread)
    return below + lengths.longest * (1 - normal.cdf(cut))
