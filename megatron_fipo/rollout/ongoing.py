"""Sampling that is under way, as whoever waits for it sees it."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from megatron_fipo.rollout.events import Ready, WeightsWanted
from megatron_fipo.rollout.generator import EngineGenerator

_T = TypeVar("_T")


class Ongoing(Generic[_T]):
    """A coroutine that samples from servers: it goes on whenever the main loop turns, and ends with what it returns."""

    def __init__(self, engines: EngineGenerator, work: Coroutine[Any, Any, _T]):
        """It has begun from here on."""
        self._engines = engines
        self._task: asyncio.Task[_T] = engines.loop.begin(work)

    def wait(self) -> Ready | WeightsWanted:
        """Let it go on until all is there, or no server is left. Raises why it has ended before."""
        if not self._engines.loop.run(self._engines.until(self._task)):
            return self._engines.wanted()
        self._task.result()
        return Ready()

    def cancel(self) -> None:
        """It does not go on. Whoever waits for it hears of asyncio.CancelledError. In the loop's thread."""
        self._task.cancel()

    @property
    def result(self) -> _T:
        """What it returned, once `wait` has said Ready."""
        return self._task.result()

    def to_the_end(self, supply: Callable[[], None]) -> _T:
        """The result. `supply` is called whenever no server is left: it brings some back, or raises."""
        while not isinstance(self.wait(), Ready):
            supply()
        return self.result
