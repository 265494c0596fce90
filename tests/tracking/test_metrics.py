"""Metrics on disk after a crash and a resume: no step is missing or repeated. TensorBoard's own reader reads them."""

import json
import math
import os

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import DataError
from megatron_fipo.tracking.metrics import MetricsWriter, cut_after_step, read_rows
from megatron_fipo.tracking.trackers.opening import open_trackers


def writer_of(directory, resumed_step=0):
    trackers = open_trackers(directory, load_config(), resumed_step, pytest.fail)
    return MetricsWriter(directory, trackers, resumed_step), trackers


def steps_of(directory, name="metrics.jsonl"):
    return [row["step"] for row in read_rows(directory / name)]


def test_one_row_a_step_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.log_step(1, {"step": 1, "reward_mean": 0.5, "groups_kept": 4, "grad_norm": np.float32(0.25)})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "reward_mean": 0.5,
        "groups_kept": 4,
        "grad_norm": 0.25,
    }
    row = writer.log_step(2, {"grad_norm": math.inf, "ppo_kl": math.nan})
    assert row == read_rows(tmp_path / "metrics.jsonl")[1]
    assert read_rows(tmp_path / "metrics.jsonl")[1] == {"step": 2, "grad_norm": None, "ppo_kl": None}
    with pytest.raises(TypeError, match="finish_reason is of type str, not a number"):
        writer.log_step(3, {"finish_reason": "stop"})
    assert steps_of(tmp_path) == [1, 2]


def test_resume_repeats_and_loses_no_step(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.log_validation(0, {"accuracy": 0.1})
    for step in (1, 2, 3):
        writer.log_step(step, {"reward_mean": step})
        writer.log_validation(step, {"accuracy": step / 10})
    # Killed inside the fourth step's row; the newest checkpoint is that of step 2.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rewa')
    resumed = MetricsWriter(tmp_path, resumed_step=2)
    assert steps_of(tmp_path) == [1, 2]
    assert steps_of(tmp_path, "validation.jsonl") == [0, 1, 2]
    resumed.log_step(3, {"reward_mean": 33})
    assert [row["reward_mean"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 33]


def test_without_a_checkpoint_the_run_starts_over(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.log_validation(0, {"accuracy": 0.1})
    writer.log_step(1, {})
    MetricsWriter(tmp_path)
    assert steps_of(tmp_path) == steps_of(tmp_path, "validation.jsonl") == []


def test_a_broken_row_inside_the_file_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nbroken\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        cut_after_step(path, 3)
    assert "broken" in path.read_text()


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    writer, trackers = writer_of(tmp_path)
    for step in (1, 2, 3):
        writer.log_step(step, {"reward_mean": step, "grad_norm": math.nan})
    trackers.close()
    resumed, trackers = writer_of(tmp_path, resumed_step=2)
    resumed.log_step(3, {"reward_mean": 33})
    resumed.log_validation(3, {"accuracy": 0.5})
    trackers.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("train/reward_mean")] == [(1, 1), (2, 2), (3, 33)]
    assert shown.Scalars("validation/accuracy")[0].value == 0.5
    assert "train/grad_norm" not in shown.Tags()["scalars"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"reward_mean": 1}\n', "line 1: not the row of a step"),
        (b'{"step": "2"}\n', "line 1: not the row of a step"),
        (b"[1]\n", "line 1: not the row of a step"),
        (b"[" * 100_000 + b"\n" + b"{}", "line 1: not JSON"),
        (b'{"step": 1}\n\xff\n', "cannot be read: .*utf-8"),
    ],
)
def test_what_is_no_row_is_an_error_and_stays(tmp_path, content, words):
    """A resume removes rows from the file, and must not remove rows that it cannot read."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        cut_after_step(path, 3)
    assert path.read_bytes() == content


def test_what_is_no_file_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")  # whose reader would wait for ever
    (tmp_path / "validation.jsonl").mkdir()
    for name in ("metrics.jsonl", "validation.jsonl"):
        with pytest.raises(DataError, match=f"{name} is not a file"):
            cut_after_step(tmp_path / name, 3)
