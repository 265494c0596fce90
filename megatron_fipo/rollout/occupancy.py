"""When the engines had something to sample, and how much."""

import time


class Occupancy:
    """Follows how many samples the servers have been asked for and not answered."""

    def __init__(self) -> None:
        self._samples = 0
        self._since = self._began = time.monotonic()
        self._busy = self._sample_seconds = 0.0
        self._stretches: list[tuple[float, float]] = []

    def add(self, samples: int) -> None:
        """So many more are out; fewer, if negative."""
        before, after = self._samples, self._samples + samples
        self._look()
        if before > 0 and after == 0:
            self._end_stretch()
        elif before == 0 and after > 0:
            self._began = self._since
        self._samples = after

    def take(self) -> list[tuple[float, float]]:
        """Stretches of time since the last call in which some were out: begin, in seconds since 1970, and seconds."""
        self._look()
        if self._samples > 0:
            self._end_stretch()
            self._began = self._since
        taken, self._stretches = self._stretches, []
        return taken

    def metrics(self) -> dict[str, float]:
        """Since the last call: seconds in which some were out, and how many were, on average over these."""
        self._look()
        busy, total, self._busy, self._sample_seconds = self._busy, self._sample_seconds, 0.0, 0.0
        return {"seconds_engines_busy": busy, "sequences_in_flight_mean": total / busy if busy else 0.0}

    def _look(self) -> None:
        now = time.monotonic()
        if self._samples > 0:
            self._busy += now - self._since
            self._sample_seconds += self._samples * (now - self._since)
        self._since = now

    def _end_stretch(self) -> None:
        seconds = self._since - self._began
        self._stretches.append((time.time() - seconds, seconds))
