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
    alike: float = 0.0
    """Share of the logarithm's variance that lies between problems: 0: a problem says nothing of its responses'
    lengths; 1: all responses to a problem have one length."""

    @property
    def held(self) -> float:
        """Tokens that a response has on average while it is sampled, E L² / (2 E L): long ones take long."""
        if self.spread == 0 or self.mean == self.longest:
            return self.mean / 2
        location, variance = _location(self), self.spread**2
        normal, cut = NormalDist(), (math.log(self.longest) - location) / self.spread
        below = math.exp(2 * location + 2 * variance) * normal.cdf(cut - 2 * self.spread)
        return (below + self.longest**2 * (1 - normal.cdf(cut))) / self.mean / 2

    def draw_groups(
        self, count: int, samples: int, random: np.random.Generator, problems: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Lengths [count, samples] of the responses to `count` problems, and the length [count] to expect of each.

        Expected is the mean of as many other responses to the same problem: what an earlier epoch has left. `problems`
        draws what responses to one problem have in common, and is not used where that is nothing. ConfigError as by
        `draw`.
        """
        self._check()
        if not self.alike or self.spread == 0 or self.mean == self.longest:
            return self.draw(count * samples, random).reshape(count, samples), np.full(count, self.mean)
        between = _location(self) + self.spread * math.sqrt(self.alike) * problems.standard_normal((count, 1))
        within = self.spread * math.sqrt(1 - self.alike)
        now, before = (
            np.clip(np.rint(np.exp(between + within * source.standard_normal((count, samples)))), 1, self.longest)
            for source in (random, problems)
        )
        return now.astype(np.int64), before.mean(axis=1)

    def draw(self, count: int, random: np.random.Generator) -> NDArray[np.int64]:
        """`count` lengths, each from 1 to the longest. ConfigError if there is no such distribution."""
        self._check()
        if self.spread == 0 or self.mean == self.longest:
            return np.full(count, round(self.mean), dtype=np.int64)
        drawn = random.lognormal(_location(self), self.spread, count)
        return np.clip(np.rint(drawn), 1, self.longest).astype(np.int64)

    def _check(self) -> None:
        if not 1 <= self.mean <= self.longest:
            raise ConfigError(
                "--mean",
                f"{self.mean:g} tokens are no mean of responses of 1 to {self.longest} tokens",
                "another mean, or another rollout.max_response_length",
            )


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
