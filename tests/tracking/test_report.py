"""Why: the report is what most people look at of a run, also of one that is under way, was resumed or has failed; and
keeping it up to date must cost a run next to nothing.

Not covered here: how it looks, and that it shows these numbers; test_report_in_a_browser.py does that.
"""

import json
import time
from pathlib import Path

import pytest

from megatron_fipo.config.configure import load_config
from megatron_fipo.tracking.console import Span
from megatron_fipo.tracking.metrics import MetricsWriter
from megatron_fipo.tracking.report import Report

ROW = {"reward_mean": 0.25, "seconds_sample": 1.5, "seconds_step": 4.0, "unknown": 1.0}


def new_report(directory: Path, warn=pytest.fail) -> Report:
    return Report(directory, load_config([f"run.directory={directory}", "run.steps=3", "validation.samples=2"]), warn)


def data(directory: Path) -> dict:
    text = (directory / "report-data.js").read_text()
    return json.loads(text.removeprefix("report.show(").removesuffix(");\n"))


def test_the_first_step_is_in_the_numbers_at_once(tmp_path):
    with new_report(tmp_path) as report:
        assert data(tmp_path)["state"]["kind"] == "running" and data(tmp_path)["training"] == {"step": []}
        report.add_step({"step": 1, **ROW}, [Span("sample", 1e9, 1.5)])
        written = data(tmp_path)
        report.finish(200.0, [Span("checkpoint", 1e9 + 2, 0.5)])
    shown = {"step": [1], "reward_mean": [0.25], "seconds_sample": [1.5], "seconds_step": [4.0]}
    assert written["training"] == shown
    assert written["spans"] == [["sample", 1e9, 1.5]]
    assert data(tmp_path)["state"] == {"kind": "finished", "words": "3 min 20 s"} and len(data(tmp_path)["spans"]) == 2


def test_the_whole_page_needs_no_other_file(tmp_path):
    (tmp_path / "config.yaml").write_text("name: <b>\n")
    with new_report(tmp_path) as report:
        report.add_step({"step": 1, **ROW}, [])
        report.finish(200.0, [])
    page = (tmp_path / "report.html").read_text()
    assert '"reward_mean":[0.25]' in page and "name: &lt;b&gt;" in page
    assert "<script src" not in page and '<link rel="stylesheet"' not in page


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [(ValueError("a </script> thing"), "failed", "ValueError: a </script> thing"), (SystemExit(75), "stopped", "")],
)
def test_a_run_that_ends_early_says_so(tmp_path, error, kind, words):
    with pytest.raises(type(error)), new_report(tmp_path) as report:
        report.add_step({"step": 1, **ROW}, [])
        raise error
    assert data(tmp_path)["state"] == {"kind": kind, "words": words}
    page = (tmp_path / "report.html").read_text()
    assert f'"kind":"{kind}"' in page and "a </script>" not in page


def test_a_resumed_run_has_the_steps_before(tmp_path):
    before = MetricsWriter(tmp_path)
    before.log_validation(0, {"accuracy": 0.5, "accuracy/b": 0.5, "accuracy/a": 0.25})
    for step in (1, 2, 3):
        before.log_step(step, ROW)
    resumed = MetricsWriter(tmp_path, resumed_step=2)
    with new_report(tmp_path) as report:
        report.add_step(resumed.log_step(3, ROW | {"reward_mean": None}), [])
        assert data(tmp_path)["training"]["step"] == [1, 2, 3]
        assert data(tmp_path)["training"]["reward_mean"] == [0.25, 0.25, None]
        assert data(tmp_path)["held_out"] == {"step": [0], "accuracy": [0.5]}
        assert list(data(tmp_path)["sources"]) == ["a", "b"]


def test_a_long_run_is_drawn_as_means(tmp_path):
    with new_report(tmp_path) as report:
        for step in range(1, 2502):
            report.add_step({"step": step, "reward_mean": float(step), "entropy": 1.0 if step == 2 else None}, [])
        report.finish(200.0, [])
    shown = data(tmp_path)
    assert shown["steps_per_point"] == 3 and len(shown["training"]["step"]) == 834
    assert shown["training"]["reward_mean"][0] == 2.0 and shown["training"]["step"][-1] == 2501
    assert shown["training"]["entropy"][:2] == [1.0, None]


def test_writing_takes_a_hundredth_of_the_time_at_most(tmp_path, monkeypatch):
    """However slow the storage is: here a write takes 50 ms, and steps follow each other at once."""
    writes = []

    def slow_write(path, content):
        time.sleep(0.05)
        writes.append(path.name)

    monkeypatch.setattr("megatron_fipo.tracking.report.write_atomically", slow_write)
    report = new_report(tmp_path)
    ended = time.monotonic() + 0.5
    for step in range(1, 10_000):
        report.add_step({"step": step, **ROW}, [])
        if time.monotonic() > ended:
            break
    assert writes == ["report-data.js"]
    assert report._next_at - time.monotonic() > 4.0


def test_a_report_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "report-data.js").mkdir()
    warnings = []
    with new_report(tmp_path, warnings.append) as report:
        report.add_step({"step": 1, **ROW}, [])
    assert len(warnings) == 3 and "report.html is not up to date" in warnings[0]
