"""Why: a tracker is another's service, and a run of days must not end, or wait, because that service does.

The fakes fail and hang in each call. Controls: a tracker that works gets every row, and a fake that fails without the
thread around it does raise. Not covered: a tracker that ends the process.
"""

import threading
import time

import pytest

from megatron_fipo.config.configure import load_config
from megatron_fipo.tracking.metrics import MetricsWriter, read_rows
from megatron_fipo.tracking.trackers.background import BackgroundTracker, Trackers
from megatron_fipo.tracking.trackers.opening import open_trackers
from megatron_fipo.tracking.trackers.tensorboard import TensorBoard

KEY = "not-a-real-key-0123456789"


class Fake:
    """A tracker that keeps what it gets. `fails` raises, and `hangs` waits, in the call of that name."""

    def __init__(self, run=None, *, fails="", hangs="", until=None):
        self.rows, self.finished = [], False
        self._fails, self._hangs, self._until = fails, hangs, until or threading.Event()
        self._do("open")

    def _do(self, call):
        if call == self._hangs:
            self._until.wait(60)
        if call == self._fails:
            raise (SystemExit if call == "finish" else RuntimeError)(f"no\nservice for {KEY} at https://me:{KEY}@host/")

    def log(self, step, scalars):
        self._do("log")
        self.rows.append((step, scalars))

    def finish(self):
        self._do("finish")
        self.finished = True


def run_with(opens, rows=3, waiting=8, seconds=5.0):
    """Log some rows and close; return the warnings and how long all of it took."""
    warnings, started = [], time.monotonic()
    trackers = Trackers([BackgroundTracker("fake", opens, waiting)], warnings.append)
    for step in range(1, rows + 1):
        trackers.log(step, {"train/reward_mean": step / 2})
    trackers.close(seconds)
    return warnings, time.monotonic() - started


def test_a_tracker_that_works_gets_every_row_and_its_end():
    fake = Fake()
    warnings, _ = run_with(lambda: fake)
    assert fake.rows == [
        (1, {"train/reward_mean": 0.5}),
        (2, {"train/reward_mean": 1.0}),
        (3, {"train/reward_mean": 1.5}),
    ]
    assert fake.finished and warnings == []


@pytest.mark.parametrize(
    ("call", "what", "lost"),
    [
        ("open", "it could not be opened", 3),
        ("log", "it did not take step 1", 3),
        ("finish", "it could not be finished", 0),
    ],
)
def test_a_tracker_that_fails_warns_once_and_counts(monkeypatch, call, what, lost):
    monkeypatch.setenv("FAKE_API_KEY", KEY)
    warnings, _ = run_with(lambda: Fake(fails=call))
    assert warnings[0].startswith(f"tracking.to: fake: {what}: ") and "no service for ***" in warnings[0]
    assert [f"lacks {lost} rows" in line for line in warnings[1:]] == [True] * bool(lost)
    assert all(KEY not in line and "\n" not in line for line in warnings)


def test_the_same_failure_raises_without_the_thread():
    """The control of the test above: the fake does fail, and does show its key."""
    with pytest.raises(RuntimeError, match=KEY):
        Fake(fails="open")
    with pytest.raises(SystemExit):
        Fake(fails="finish").finish()


@pytest.mark.parametrize("call", ["open", "log", "finish"])
def test_a_tracker_that_hangs_neither_blocks_nor_is_waited_for(call):
    until = threading.Event()
    try:
        warnings, seconds = run_with(
            lambda: Fake(hangs=call, until=until), rows=50, seconds=0.2 if call != "finish" else 2
        )
    finally:
        until.set()
    assert seconds < 10
    lost = {"open": "lacks 50 rows", "log": "lacks "}.get(call)
    assert any("did not finish in time" in line or "has not taken the last 8 rows" in line for line in warnings)
    assert lost is None or lost in warnings[-1]


def test_a_run_with_a_broken_tracker_has_all_its_rows(tmp_path):
    """From configuration to files: the broken one beside TensorBoard, which works."""
    warnings = []
    config = load_config(["tracking.to=[tensorboard,wandb]"])
    broken = {"tensorboard": TensorBoard, "wandb": lambda run: Fake(run, fails="log")}
    writer = MetricsWriter(tmp_path, open_trackers(tmp_path, config, 0, warnings.append, broken))
    for step in (1, 2):
        writer.log_step(step, {"reward_mean": step})
    writer.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert list((tmp_path / "tensorboard").iterdir())
    assert warnings[0].startswith("tracking.to: wandb: it did not take step 1: RuntimeError")
    assert len(warnings) == 2 and "wandb lacks 2 rows" in warnings[1]
