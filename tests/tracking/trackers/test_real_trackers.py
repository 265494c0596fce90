"""Why: fakes cannot show that W&B, MLflow and trackio take what is sent, or that a resume continues the same run.

The real packages run here, without a network: W&B offline, MLflow into files, trackio into its own database. Those that
are not installed are skipped by name. Not covered: their services.
"""

import functools
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from megatron_fipo.tracking.trackers.background import BackgroundTracker, Trackers
from megatron_fipo.tracking.trackers.opening import TRACKERS
from megatron_fipo.tracking.trackers.protocol import TrackedRun
from megatron_fipo.tracking.trackers.run_ids import RUN_IDS_FILE, keep_id, kept_id
from tests.distributed import ROOT

pytestmark = pytest.mark.slow
KEY = "0fed" * 10  # W&B wants 40 characters


def log(name, directory, steps, resumed_step=0):
    """One start of a run: it logs some steps, as a run does, and ends."""
    settings = {"run": {"seed": 1}, "reward": {"rule": "exact_match"}, "data": {"train": []}}
    run = TrackedRun(directory, "mine", "some project", True, resumed_step, settings)
    trackers = Trackers([BackgroundTracker(name, functools.partial(TRACKERS[name], run))], pytest.fail)
    for step in steps:
        trackers.log(step, {"train/reward_mean": step / 2, "validation/accuracy/a:b": 0.5})
    trackers.close(120)
    return kept_id(directory, name)


def test_wandb_offline_continues_the_same_run_and_keeps_the_key_to_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    first = log("wandb", tmp_path, [1, 2, 3])
    assert log("wandb", tmp_path, [3, 4], resumed_step=2) == first
    parts = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [part.name.rpartition("-")[2] for part in parts] in ([first], [first, first])
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"reward_mean" in path.read_bytes() for path in written), "the control: it is all plain bytes"
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


_HANGS = """
import pathlib, sys
from megatron_fipo.config.configure import load_config
from megatron_fipo.tracking.trackers.opening import open_trackers
trackers = open_trackers(pathlib.Path(sys.argv[1]), load_config(["tracking.to=[wandb]"]), 0, print)
trackers.log(1, {"train/reward_mean": 1.0})
trackers.close(3)
"""


def test_a_service_that_never_answers_does_not_keep_the_process(tmp_path):
    """W&B's exit handler waits for its service: without `end_service`, for the rest of 90 s."""
    pytest.importorskip("wandb")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = os.environ | {"WANDB_BASE_URL": address, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}
        command, began = [sys.executable, "-c", _HANGS, str(tmp_path)], time.monotonic()
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert ended.returncode == 0 and time.monotonic() - began < 60
    assert "wandb: it did not finish in time" in ended.stdout and "wandb lacks 1 rows" in ended.stdout
    assert KEY not in ended.stdout + ended.stderr


def test_mlflow_in_files_continues_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow.tracking import MlflowClient

    first = log("mlflow", tmp_path, [1, 2, 3])
    assert log("mlflow", tmp_path, [3, 4], resumed_step=2) == first
    client = MlflowClient((tmp_path / "mlflow").as_uri())
    values = client.get_metric_history(first, "train/reward_mean")
    assert sorted((value.step, value.value) for value in values) == [(1, 0.5), (2, 1), (3, 1.5), (3, 1.5), (4, 2)]
    run = client.get_run(first)
    assert run.info.status == "FINISHED" and run.data.params["run.seed"] == "1"
    assert "validation/accuracy/a_b" in run.data.metrics


def test_trackio_continues_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    first = log("trackio", tmp_path, [1, 2, 3])
    assert log("trackio", tmp_path, [3, 4], resumed_step=2) == first


def test_a_broken_file_of_ids_is_named(tmp_path):
    keep_id(tmp_path, "wandb", "a")
    keep_id(tmp_path, "mlflow", "b")
    assert json.loads((tmp_path / RUN_IDS_FILE).read_text()) == {"wandb": "a", "mlflow": "b"}
    for content, words in (("{", "is not JSON"), ('{"wandb": 1}', "does not map trackers to ids")):
        (tmp_path / RUN_IDS_FILE).write_text(content)
        with pytest.raises(ValueError, match=rf"{RUN_IDS_FILE} {words}.*remove it"):
            kept_id(tmp_path, "wandb")
