"""Why: the benchmark of whole updates is for GPUs, which this suite has not; a table paid for with GPU hours must not
fail on its last line. And what measures a command has to measure that one alone.

Not covered: CUDA's clock and memory.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.policy import SHAPES, measure_apart, operations
from benchmarks.quick_start import read_or_run, table
from benchmarks.usage import Ended, run_measured


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
