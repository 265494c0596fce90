"""What sampling tells the trainer when it is asked to go on. Calls go down only: sampling never calls the trainer.

Rank 0 hears an event first; `weights.ranks` tells it to the others, as JSON.
"""

from collections.abc import Callable, Generator
from typing import Generic, TypeVar

import msgspec

_T = TypeVar("_T")


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """All is sampled that was asked for."""


class WeightsWanted(msgspec.Struct, frozen=True, tag="weights_wanted"):
    """No server is left that samples. These start again, or may come back; they need weights."""

    servers: tuple[str, ...]


class BrokenOff(msgspec.Struct, frozen=True, tag="broken_off"):
    """Ctrl-C has ended the sampling before its end."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Why there will be no samples, and the exit code that goes with it."""

    message: str
    exit_code: int


Event = Ready | WeightsWanted | BrokenOff | Failed
Steps = Generator[WeightsWanted, None, _T]
"""Sampling as a generator: it goes on when it is asked for its next event, and returns what it has sampled."""


class Ongoing(Generic[_T]):
    """Sampling that is under way."""

    def __init__(self, steps: Steps[_T]):
        self._steps = steps
        self._results: list[_T] = []

    def wait(self) -> Ready | WeightsWanted:
        """Sample until all is there, or no server is left. FipoError: why it cannot go on."""
        try:
            return next(self._steps)
        except StopIteration as end:
            self._results.append(end.value)
            return Ready()

    @property
    def result(self) -> _T:
        """What was sampled, once `wait` has said Ready."""
        return self._results[0]

    def to_the_end(self, supply: Callable[[], None]) -> _T:
        """The result. `supply` is called whenever no server is left: it brings some back, or raises."""
        while not isinstance(self.wait(), Ready):
            supply()
        return self.result
