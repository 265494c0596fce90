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
from megatron_fipo.tracking.trackers.mlflow_run import _experiment
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
        ("open", "it could not be opened, and is tried 4 times more", 3),
        ("log", "it did not take step 1", 3),
        ("finish", "it could not be finished", 0),
    ],
)
def test_a_tracker_that_fails_warns_once_and_counts(monkeypatch, call, what, lost):
    monkeypatch.setenv("FAKE_API_KEY", KEY)
    warnings, _ = run_with(lambda: Fake(fails=call))
    assert warnings[0].startswith(f"tracking.to: fake: {what}: ") and "no service for ***" in warnings[0]
    given_up = ["tracking.to: fake: it could not be opened in 2 attempts, and is given up"] * (call == "open")
    assert [line.partition(";")[0] for line in warnings[1 : 1 + len(given_up)]] == given_up
    assert [f"lacks {lost} rows" in line for line in warnings[1 + len(given_up) :]] == [True] * bool(lost)
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


@pytest.mark.parametrize("again", [(0.0, 0.0), (0.0,)], ids=["enough", "too few"])
def test_a_tracker_that_opens_later_gets_the_rows_that_waited(again):
    """Why: a service that was away for the minute of a run's start lacked the whole run. The control has one less."""
    fake, calls, ready, warnings = Fake(), [], threading.Event(), []

    def opens():
        calls.append(ready.wait(60))  # the rows are in the queue
        if len(calls) < 3:
            raise RuntimeError("away")
        return fake

    tracker = BackgroundTracker("fake", opens, opens_again_s=again)
    trackers = Trackers([tracker], warnings.append)
    for step in (1, 2, 3):
        trackers.log(step, {})
    ready.set()
    deadline = time.monotonic() + 60
    while tracker.late_attempt is None and tracker.lost < 3:
        assert time.monotonic() < deadline, "it was neither opened nor given up"
        time.sleep(0.01)
    trackers.close()
    assert len(calls) == len(again) + 1, "it is tried so often, and no more"
    assert warnings[0].startswith(
        f"tracking.to: fake: it could not be opened, and is tried {len(again)} times more: Ru"
    )
    if len(again) == 2:
        assert [step for step, _ in fake.rows] == [1, 2, 3] and fake.finished
        assert warnings[1:] == ["tracking.to: fake was opened at attempt 3"]
    else:
        assert fake.rows == [] and "in 2 attempts, and is given up" in warnings[1]
        assert "fake lacks 3 rows" in warnings[2]


def test_a_run_that_ends_does_not_wait_for_the_next_attempt():
    warnings, seconds = run_with(lambda: Fake(fails="open"), seconds=60.0)
    assert seconds < 30 and "lacks 3 rows" in warnings[2]


class Experiments:
    """MLflow's client, of a server on which another run makes the experiment between two calls of ours."""

    def __init__(self, *, other: bool):
        self._other, self._id = other, None

    def get_experiment_by_name(self, name):
        return self._id and type("Experiment", (), {"experiment_id": self._id})

    def create_experiment(self, name):
        if self._other:
            self._id = "of the other run"
            raise RuntimeError(f"{name} already exists")
        if self._id is None:
            raise RuntimeError("no server")


def test_runs_that_make_an_experiment_at_the_same_time_share_it():
    assert _experiment(Experiments(other=True), "fipo") == "of the other run"
    with pytest.raises(RuntimeError, match="no server"):
        _experiment(Experiments(other=False), "fipo")


def test_a_run_with_a_broken_tracker_has_all_its_rows(tmp_path):
    """From configuration to files: the broken one beside TensorBoard, which works."""
    warnings = []
    config = load_config(["tracking.to=[tensorboard,wandb]"])
    broken = {"tensorboard": TensorBoard, "wandb": lambda run: Fake(run, fails="log")}
    trackers = open_trackers(tmp_path, config, 0, warnings.append, broken)
    writer = MetricsWriter(tmp_path, trackers)
    for step in (1, 2):
        writer.log_step(step, {"reward_mean": step})
    trackers.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert list((tmp_path / "tensorboard").iterdir())
    assert warnings[0].startswith("tracking.to: wandb: it did not take step 1: RuntimeError")
    assert len(warnings) == 2 and "wandb lacks 2 rows" in warnings[1]
