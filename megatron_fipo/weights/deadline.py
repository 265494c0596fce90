"""One deadline for an operation of many steps, so that no step waits for ever and none gets a fresh allowance."""

import time


class Deadline:
    """`seconds` from now; passed down to every wait of one operation."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - time.monotonic())

    def passed(self) -> bool:
        """Whether no time is left."""
        return self.remaining() == 0.0
