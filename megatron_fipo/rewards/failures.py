"""The first failed checks of a run in full: what was raised, over which response, in a file of its directory."""

import json
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

FAILURES_FILE = "reward_failures.jsonl"
_MOST_ROWS = 100
LONGEST_NOTED = 2000
"""Characters of a response that are kept: its end."""
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Failure:
    """A check that came to no verdict."""

    problem: str
    """The problem's id."""
    data_source: str
    ground_truth: str
    response: str
    """Its end where it is long."""
    outcome: str
    """timeout or crash."""
    error: str
    """What was wrong, in one line."""
    traceback: str = ""
    """Empty where the rule raised nothing."""


class FailureLog:
    """Takes them from several threads; keeps up to 100 for each start of a run, in a file of about 1 MiB at most."""

    def __init__(self, directory: Path | None = None):
        """`directory` is the run's; None keeps no file."""
        self._path = None if directory is None else directory / FAILURES_FILE
        self._lock = threading.Lock()
        self._first: Failure | None = None
        self._rows = 0
        self._is_shown = False

    def add(self, failure: Failure) -> None:
        """Remember one. A file that cannot be written costs the record, not the run."""
        with self._lock:
            if self._first is None or (failure.traceback and not self._first.traceback):
                self._first = failure
            self._rows += 1
            if self._path is None or self._rows > _MOST_ROWS:
                return
            with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
                if file.tell() < _MOST_BYTES:
                    file.write(json.dumps(asdict(failure)) + "\n")

    def traceback_to_show(self) -> str | None:
        """The first traceback, once."""
        with self._lock:
            if self._is_shown or self._first is None or not self._first.traceback:
                return None
            self._is_shown = True
            return self._first.traceback

    def summary(self) -> str:
        """The first failure and where the others are, in a few words; empty without one."""
        with self._lock:
            if self._first is None:
                return ""
            place = f"; {self._path} has its traceback" if self._path and self._first.traceback else ""
            return f"the first: {self._first.error}{place}"
