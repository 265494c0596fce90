"""The run's own files: configuration without passwords, environment, summary, readable samples, report."""

import json
import re

import yaml

from megatron_fipo.config import Config, TrackingConfig
from megatron_fipo.tracking.kept_samples import keep_samples
from megatron_fipo.tracking.metrics import MetricsWriter
from megatron_fipo.tracking.report import write_report
from megatron_fipo.tracking.run_files import write_config, write_environment, write_summary
from tests.tracking.groups import make_group


def test_config_holds_every_key_and_no_password(tmp_path):
    config = Config()
    config.rollout.addresses = ["http://me:secret@node1:8000", "http://node2:8000"]
    write_config(tmp_path, config)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["rollout"]["addresses"] == ["http://***@node1:8000", "http://node2:8000"]
    assert written["algorithm"]["clip_ratio_high"] == config.algorithm.clip_ratio_high
    assert written["algorithm"]["future_kl"] is None


def test_environment_names_the_versions(tmp_path):
    write_environment(tmp_path, world_size=4)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["world_size"] == 4
    assert re.match(r"\d+\.\d+", environment["packages"]["torch"])


def test_kept_samples_show_worst_and_best(tmp_path):
    groups = [make_group("7777778" + "9", "9", name=f"p{index}") for index in range(10)]
    path = keep_samples(tmp_path, 12, groups, count=6)
    assert path == tmp_path / "samples" / "step-000012.txt"
    rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["problem"] for row in rows] == ["p0"] * 4 + ["p9"] * 2
    assert [row["reward"] for row in rows] == [-1, -1, -1, 1, -1, 1]
    assert (
        rows[3] | {"step": 12, "response": "I say 9", "length": 3, "finish_reason": "stop", "weight_version": 4}
        == rows[3]
    )
    text = path.read_text()
    assert "problem p0 (toy) · right answer 9 · 1 of 8 right" in text and "I say 9" in text


def test_kept_samples_run_no_escape_sequence(tmp_path):
    group = make_group("9", "9")
    group.text = ["\x1b[2Jgone\x9b31m\r"]
    text = keep_samples(tmp_path, 1, [group], count=1).read_text()
    assert "\\x1b[2Jgone\\x9b31m\\r" in text and "\x1b" not in text


def test_nothing_to_keep(tmp_path):
    assert keep_samples(tmp_path, 1, [make_group("9", "9")], count=0) is None
    assert keep_samples(tmp_path, 1, [], count=8) is None
    assert not (tmp_path / "samples").exists()


def test_report_before_and_after_the_end(tmp_path):
    page = write_report(tmp_path).read_text()
    assert "under way: 0 steps" in page and "<svg" not in page
    writer = MetricsWriter(tmp_path, TrackingConfig(tensorboard=False))
    writer.log_validation(0, {"accuracy": 0.25})
    for step in (1, 2):
        writer.log_step(step, {"reward_mean": step / 3, "seconds_sample": 2.0, "grad_norm": None})
    write_summary(
        tmp_path, {"accuracy_before": 0.25, "accuracy_after": None, "steps": 2, "seconds": 200.0, "note": "<b>"}
    )
    page = write_report(tmp_path).read_text()
    assert "The run is finished" in page and "3 min 20 s" in page and "&lt;b&gt;" in page and "<b>" not in page
    panels = ["Reward", "Accuracy", "Seconds in each phase"]
    assert page.count("<svg") == len(panels) and all(panel in page for panel in panels)
    # Self-contained: nothing is fetched.
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    # A run that goes on after its end is under way again.
    writer.log_step(3, {"reward_mean": 1.0})
    assert "under way: 3 steps" in write_report(tmp_path).read_text()
