"""A clock that jumps from one event to the next, and what was done when."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

Action = Callable[[float], None]


class Clock:
    """Events in order of their times; those of one time in the order in which they were set."""

    def __init__(self) -> None:
        self._events: list[tuple[float, int, Action]] = []
        self._count = 0

    def at(self, time: float, action: Action) -> None:
        """Call `action` with the time, then."""
        self._count += 1
        heapq.heappush(self._events, (time, self._count, action))

    def next(self) -> bool:
        """Do what comes next; False if nothing does."""
        if not self._events:
            return False
        time, _, action = heapq.heappop(self._events)
        action(time)
        return True


@dataclass(frozen=True)
class Span:
    """Something was done from `start` to `end`, in seconds, in a lane of the timeline."""

    lane: str
    what: str
    start: float
    end: float
