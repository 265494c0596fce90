"""Why: the benchmark of whole updates is for GPUs, which this suite has not; a table paid for with GPU hours must not
fail on its last line. And what measures a command has to measure that one alone.

Not covered: CUDA's clock and memory.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import science
from benchmarks.policy import SHAPES, measure_apart, operations
from benchmarks.quick_start import read_or_run, table
from benchmarks.usage import Ended, run_measured
from megatron_fipo.comparison.groups import group_runs
from megatron_fipo.comparison.runs import find_runs
from megatron_fipo.records.credit import COUNTS, PRODUCED
from megatron_fipo.tracking.credit_file import credit_path, write_credit
from megatron_fipo.tracking.metrics import METRICS_FILE
from tests.comparison.fake_runs import make_run
from tests.credit_page.made_up import ABOUT, response


@pytest.mark.slow
def test_a_row_is_measured() -> None:
    row = measure_apart("tiny", 2, "off", packing=True)
    assert isinstance(row, dict), row
    assert row["padding"] == 0
    assert row["seconds"] > 0
    assert 0 < row["log_probs"] < 1 and 0 < row["loss"] < 1, "both ran forward and backward, inside the updates"


@pytest.mark.slow
def test_a_row_that_this_machine_cannot_run_says_why() -> None:
    assert "model.fp8" in str(measure_apart("tiny", 2, "tensorwise", packing=True))


@pytest.mark.slow
def test_the_tables_of_the_rollout_path_are_made() -> None:
    """Its made-up engines speak the route of the real ones: a change of the route must not leave them behind."""
    command = [sys.executable, "-m", "benchmarks.rollout_path", "--quick"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| arrays \| 3700 \|", done.stdout, re.M) and re.search(
        r"^\| 16 \| [\d.]+ \|", done.stdout, re.M
    )


@pytest.mark.matrix
def test_replayed_routers_are_compared() -> None:
    """Not in CI: it takes a minute, and what it measures is tested by tests/policy/test_router_replay.py."""
    command = [sys.executable, "-m", "benchmarks.router_replay", "--peak", "2", "--rates", "1e-6"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    differing = {row[0]: [float(cell) for cell in row[1:3]] for row in rows if row[0] in ("trainer", "rollout")}
    assert all(0 < more < 0.5 for more, _ in differing.values())
    assert differing["rollout"][1] < differing["trainer"][1] / 2, "log-probs come closer with the engine's experts"


def test_operations_are_six_a_weight_and_token() -> None:
    model_config = SHAPES["1.5b"].model_config
    assert operations(model_config, [1] * 1000) == pytest.approx(6 * 1.5436e9 * 1000, rel=1e-3)
    assert operations(model_config, [4096]) > 4096 * operations(model_config, [1]), "attention grows with the square"


class TestQuickStart:
    """The table over seeds; that its runs start is tests/end_to_end's matter."""

    def write(self, directory: Path, accuracy: float, **metrics: float) -> None:
        directory.mkdir()
        summary = {"accuracy_before": 0.1, "accuracy_after": accuracy, "response_length_after": 40.0}
        (directory / "summary.json").write_text(json.dumps(summary))
        rows = [{"accuracy": value, "ppo_kl": 0.001, "grad_norm": 0.5} | metrics for value in (0.25, 0.75)]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def test_cells_are_means_and_deviations_over_seeds(self, tmp_path: Path) -> None:
        weights = {"influence_weights_std": 0.06, "influence_clipfrac_low": 0.02, "influence_clipfrac_high": 0.03}
        self.write(tmp_path / "fipo_7b-1", 0.8, **weights)
        self.write(tmp_path / "fipo_7b-2", 0.9, **weights)
        self.write(tmp_path / "dapo-1", 0.7)
        runs = {
            "fipo_7b": [read_or_run(tmp_path / f"fipo_7b-{seed}", "fipo_7b", seed, []) for seed in (1, 2)],
            "dapo": [read_or_run(tmp_path / "dapo-1", "dapo", 1, [])],
        }
        lines = table(runs).splitlines()
        assert lines[0] == "| | fipo_7b | dapo |"
        assert "| held-out after | 0.850 ± 0.071 | 0.700 |" in lines
        assert "| accuracy over all steps | 0.500 ± 0.000 | 0.500 |" in lines
        assert "| f at a bound, % | 5.000 ± 0.000 | – |" in lines

    def test_a_run_that_fails_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match=re.escape(f"the run in {tmp_path / 'x'} ended with")):
            read_or_run(tmp_path / "x", "no_such_algorithm", 1, [])


class TestScience:
    """A campaign of many hours is cut off and goes on: what is finished must count once, and what is not must not."""

    LOW, HIGH = [0, 1, 2, 1] * 5, [3, 4, 4, 3] * 5

    def write(self, directory: Path, arm: str, seed: int, last: list[int], metrics: dict[str, float]) -> Path:
        place = directory / f"{arm}-{seed}"
        settings = ["experiment=tiny_influence", *science.ARMS[arm], f"run.seed={seed}"]
        make_run(place, {0: self.LOW, 10: self.LOW, 20: last}, *settings)
        rows = [{"step": step, "accuracy": 0.5, "ppo_kl": 0.001 * step} | metrics for step in range(1, 21)]
        (place / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
        (place / "summary.json").write_text(json.dumps({"steps": 20}))
        return place

    def test_the_tables_are_those_worked_out_by_hand(self, tmp_path: Path) -> None:
        for seed, low in ((1, 0.02), (2, 0.04)):
            weights = {"influence_weights_std": 0.06, "influence_clipfrac_low": low, "influence_clipfrac_high": 0.03}
            self.write(tmp_path, "fipo", seed, self.HIGH, weights | {"grad_norm": 2.0 * seed})
            self.write(tmp_path, "dapo", seed, self.LOW, {"grad_norm": 5.0 * seed})
        found = science.tables(group_runs(find_runs([tmp_path])), 0.8).splitlines()
        cells = {row[1]: row[2:-1] for line in found if len(row := [cell.strip() for cell in line.split("|")]) > 2}
        assert cells["mean [95 % interval]"] == ["dapo (seeds: 2)", "fipo (seeds: 2)"]
        assert cells["step that first reached 0.8"] == ["none of 2 runs", "20 (2 of 2 runs)"]
        # Equal seeds have no interval: (0.25 + 0.25) / 2 and (0.25 + 0.875) / 2, each over half of the run.
        assert "| held-out accuracy, mean over the run | 0.250 | 0.406 |" in found
        assert "| f at a bound, % | – | 6.0 [" in "\n".join(found)
        assert any(line.startswith("| policy KL × 10³, largest step | 20.00 | 20.00 |") for line in found)
        assert cells["policy KL × 10³, fipo"] == ["3.000", "8.000", "13.000", "18.000"]
        assert cells["minus fipo"] == ["dapo"] and any(line.startswith("| gradient norm | +4.50 [") for line in found)
        assert found[-1].startswith("dapo is below fipo: -0.625 [")

    def test_what_the_filter_leaves_out_is_counted(self, tmp_path: Path) -> None:
        place = self.write(tmp_path, "fipo", 1, self.HIGH, {})
        (run,) = find_runs([place])
        assert science.beyond_c(run) is None
        recorded = response(1, 50)
        recorded.credit.values["log_ratio"][:] = np.log(9.9)
        recorded.credit.values["log_ratio"][:3] = np.log(10.1)
        write_credit(credit_path(place, 1), ABOUT, [recorded])
        assert science.beyond_c(run) == pytest.approx(3 / 50)

    def test_what_the_filter_changes_is_counted(self, tmp_path: Path) -> None:
        """The tokens up to the one that is left out, as far as its decayed log-ratio is not rounded away."""
        place = self.write(tmp_path, "fipo", 1, self.HIGH, {"influence_weights_std": 0.05})
        kept, dropped = response(1, 50), response(2, 50)
        for each in (kept, dropped):
            each.credit.values["log_ratio"][:] = 0.0
            each.credit.values["log_ratio"][9] = np.log(10.1)
        kept.credit.state[:], dropped.credit.state[:] = PRODUCED | COUNTS, PRODUCED
        write_credit(credit_path(place, 1), ABOUT, [kept, dropped])
        (run,) = find_runs([place])
        assert science.changed_by_filter(run) == pytest.approx(10 / 100), (
            "before the band, f is 10.1 at the token itself"
        )
        kept.credit.values["log_ratio"][9] = np.log(9.9)
        write_credit(credit_path(place, 1), ABOUT, [kept, dropped])
        assert science.changed_by_filter(run) == 0, "the control: with and without, it is in the sums"

    def test_the_first_step_that_differs_without_the_filter_is_found(self, tmp_path: Path) -> None:
        self.write(tmp_path, "fipo", 1, self.HIGH, {"loss": 0.25})
        place = self.write(tmp_path, "no_filter", 1, self.HIGH, {"loss": 0.25})
        lines = (place / METRICS_FILE).read_text().splitlines()
        lines[7:9] = [line.replace("0.25", "0.26") for line in lines[7:9]]
        (place / METRICS_FILE).write_text("\n".join(lines) + "\n")
        (said,) = science.same_until(group_runs(find_runs([tmp_path])).groups)
        assert said == "Seed 1: with and without the filter the same run for 7 of 20 steps."

    def test_a_finished_run_is_not_repeated(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.write(tmp_path, "fipo", 1, self.HIGH, {})
        assert science.run_once(tmp_path, "fipo", 1, 60, ["no_such.key=1"])
        assert not (tmp_path / "fipo-1/output.txt").exists() and not capsys.readouterr().out

    def test_a_run_that_was_cut_off_is_repeated(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The control: here the training is begun, and refuses the key."""
        (self.write(tmp_path, "fipo", 1, self.HIGH, {}) / "summary.json").unlink()
        assert not science.run_once(tmp_path, "fipo", 1, 60, ["no_such.key=1"])
        assert "no_such" in (tmp_path / "fipo-1/output.txt").read_text()
        assert capsys.readouterr().out.startswith("fipo-1: ended with ")

    def test_intervals_are_of_numbers_of_any_size(self) -> None:
        """Those of scores end at 1."""
        values = np.array([[10.0], [12.0], [14.0]])
        found = science.interval_of(values)
        small = science.interval_of(values / 1000)
        assert found.mean == pytest.approx(12) and found.low is not None and found.high is not None
        assert 5 < found.low < 10 and 14 < found.high < 20
        assert small.high == pytest.approx(found.high / 1000)
        difference = science.interval_of(values, np.array([[1.0], [2.0], [3.0]]))
        assert difference.mean == pytest.approx(10) and difference.excludes_zero()


class TestUsage:
    """Limits of memory and time in other tests are worth what `run_measured` is."""

    def test_memory_is_the_commands_own(self) -> None:
        """Neither this process's nor an earlier command's, which the kernel's figure for all children has."""
        held = b"x" * (200 << 20)
        subprocess.run([sys.executable, "-c", "b'x' * (200 << 20)"], check=True)
        assert python("pass").peak_bytes < 100 << 20
        assert 100 << 20 < python("b'x' * (100 << 20)").peak_bytes < 200 << 20
        del held

    def test_time_is_the_commands_own(self) -> None:
        burn = "import time\nwhile time.process_time() < {}: pass"
        subprocess.run([sys.executable, "-c", burn.format(0.5)], check=True)
        assert python("pass").cpu_seconds < 0.4
        assert python(burn.format(0.5)).cpu_seconds >= 0.5

    def test_output_and_status_are_the_commands(self) -> None:
        ended = python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
        assert (ended.returncode, ended.stdout, ended.stderr) == (3, "out\n", "err\n")
        assert python("import os; os.kill(os.getpid(), 9)").returncode == -9

    def test_what_takes_too_long_is_ended(self) -> None:
        with pytest.raises(subprocess.TimeoutExpired):
            python("import time; time.sleep(60)", timeout_s=0.5)


def python(code: str, timeout_s: float = 60) -> Ended:
    return run_measured([sys.executable, "-c", code], timeout_s)
