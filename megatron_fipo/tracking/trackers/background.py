"""Run trackers beside the loop: a tracker that fails, or hangs, never stops or delays a run.

Each tracker has a thread, in which it opens, logs and finishes, and a bounded queue before it. The loop only puts rows
into the queue. A row that finds it full is dropped and counted, and so is one whose `log` raises. A tracker that does
not open is tried again a few times. The numbers themselves are in metrics.jsonl, whatever happens here.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from megatron_fipo.tracking.secrets import without_credentials
from megatron_fipo.tracking.trackers.protocol import Tracker

ROWS_WAITING = 256
"""How many rows a queue has at most. A row of 200 numbers takes 20 KB."""
FINISH_S = 30.0
"""How long a run that ends waits for all of its trackers together, in s."""
OPENS_AGAIN_S = (15.0, 60.0, 240.0, 960.0)
"""How long a tracker waits before each further attempt to open, in s. Rows wait in the queue meanwhile."""
_LONGEST_WARNING = 400


class BackgroundTracker:
    """A tracker with its thread and its queue. All methods are for the thread of the loop, and none of them waits."""

    def __init__(
        self,
        name: str,
        opens: Callable[[], Tracker],
        waiting: int = ROWS_WAITING,
        abandon: Callable[[], None] = lambda: None,
        opens_again_s: Sequence[float] = OPENS_AGAIN_S,
    ) -> None:
        """`opens` is called in the tracker's thread, again after each of `opens_again_s` if it raises.

        `name` is for the thread and for messages.

        `abandon` is called if the tracker has not finished in time. It must not wait, and ends what would keep the
        process from its end.
        """
        self.name = name
        self._opens, self._waiting, self._abandon = opens, waiting, abandon
        self._opens_again_s = opens_again_s
        self._attempts = 0
        self._is_open = False
        self._rows: deque[tuple[int, Mapping[str, float]]] = deque()
        self._changed = threading.Condition()
        self._ends = False
        self._lost = 0
        self._has_failed = False
        self._news: deque[str] = deque()
        """What went wrong first, and that it is given up; not said yet."""
        # A thread that hangs must not keep the process.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Rows that the tracker did not get."""
        with self._changed:
            return self._lost

    @property
    def late_attempt(self) -> int | None:
        """Which attempt has opened the tracker, if it was not the first."""
        with self._changed:
            return self._attempts if self._is_open and self._attempts > 1 else None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Queue a row, or drop it if the queue is full."""
        with self._changed:
            if len(self._rows) < self._waiting:
                self._rows.append((step, scalars))
                self._changed.notify()
            else:
                self._lose(f"it has not taken the last {self._waiting} rows")

    def news(self) -> list[str]:
        """Return a line of warning after the first failure, and one when it is given up, each once."""
        with self._changed:
            said = [
                f"tracking.to: {self.name}: {words}; the run goes on, with all numbers in metrics.jsonl"
                for words in self._news
            ]
            self._news.clear()
            return said

    def end(self) -> None:
        """Have the tracker finish once its queue is empty."""
        with self._changed:
            self._ends = True
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Wait up to so long for the end. Rows that are still queued then are lost."""
        self._thread.join(max(seconds, 0))
        if self._thread.is_alive():
            self._abandon()
            with self._changed:
                self._lost += len(self._rows)
                self._rows.clear()
                self._fail("it did not finish in time")

    def _lose(self, trouble: str) -> None:
        self._lost += 1
        self._fail(trouble)

    def _fail(self, trouble: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._news.append(trouble)

    def _work(self) -> None:
        tracker = self._open()
        while (row := self._next()) is not None:
            try:
                if tracker is not None:
                    tracker.log(*row)
            except BaseException as error:
                self._note(f"it did not take step {row[0]}", error, lost=1)
            else:
                self._note_lost(tracker is None)
        try:
            if tracker is not None:
                tracker.finish()
        except BaseException as error:
            self._note("it could not be finished", error)

    def _open(self) -> Tracker | None:
        """Return the open tracker; None after the last attempt, which the end of the run brings forward."""
        is_last = False
        for wait_s in (*self._opens_again_s, None):
            with self._changed:
                self._attempts += 1
            try:
                tracker = self._opens()
            except BaseException as error:  # a package may call sys.exit
                # A package that is not there will not come.
                is_last = is_last or wait_s is None or isinstance(error, ImportError)
                again = "" if is_last else f", and is tried {len(self._opens_again_s)} times more"
                self._note(f"it could not be opened{again}", error)
            else:
                with self._changed:
                    self._is_open = True
                return tracker
            if is_last:
                with self._changed:
                    if self._attempts > 1:  # the first was said to be tried again
                        self._news.append(f"it could not be opened in {self._attempts} attempts, and is given up")
                break
            with self._changed:
                is_last = self._changed.wait_for(lambda: self._ends, wait_s)
        return None

    def _next(self) -> tuple[int, Mapping[str, float]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._ends)
            return self._rows.popleft() if self._rows else None

    def _note(self, what: str, error: BaseException, lost: int = 0) -> None:
        # The credentials go first: cut in the middle, one would not be found any more.
        said = " ".join(without_credentials(f"{type(error).__name__}: {error}").split())
        words = said if len(said) <= _LONGEST_WARNING else f"{said[:_LONGEST_WARNING]} …"
        with self._changed:
            self._lost += lost
            self._fail(f"{what}: {words}")

    def _note_lost(self, is_lost: bool) -> None:
        with self._changed:
            self._lost += is_lost


class Trackers:
    """All trackers of a run."""

    def __init__(self, trackers: Sequence[BackgroundTracker], warn: Callable[[str], None]) -> None:
        """`warn` is called with one line for each tracker that fails, and with one at the end if it lost rows."""
        self._trackers, self._warn = trackers, warn

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Give every tracker a row, which must not change any more."""
        for tracker in self._trackers:
            tracker.log(step, scalars)
        self._tell()

    def close(self, seconds: float = FINISH_S) -> None:
        """Let all trackers finish, in `seconds` together."""
        deadline = time.monotonic() + seconds
        for tracker in self._trackers:
            tracker.end()
        for tracker in self._trackers:
            tracker.join(deadline - time.monotonic())
        self._tell()
        for tracker in self._trackers:
            if attempt := tracker.late_attempt:
                self._warn(f"tracking.to: {tracker.name} was opened at attempt {attempt}")
            if lost := tracker.lost:
                self._warn(f"tracking.to: {tracker.name} lacks {lost} rows of this run; metrics.jsonl has all")

    def _tell(self) -> None:
        for tracker in self._trackers:
            for line in tracker.news():
                self._warn(line)
