"""Why: an evaluation that runs for a day is killed once, and what it says must be what training's validation would say.

One evaluation of the embedded model goes through; another, of the same weights as a run's distributed checkpoint, is
killed in its middle and started again. Real servers, verifiers and conversion; then both are compared, as a user would.

Not covered: GPUs, and servers that fail, which the client's tests have.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.compare import main as compare
from megatron_fipo.config.configure import load_config
from megatron_fipo.tracking.problem_files import read_problems
from megatron_fipo.tracking.run_files import write_config
from megatron_fipo.weights.conversion import to_megatron
from tests.end_to_end import runs

pytestmark = pytest.mark.slow

SAMPLES = 4
SETTINGS = (f"validation.samples={SAMPLES}", "rollout.max_num_seqs=32")

WATCHED = """
import json, runpy, sys
from megatron_fipo import cli
sys.argv = ["megatron-fipo", "evaluate", *sys.argv[1:]]
cli.main()
print(json.dumps([name for name in ("torch", "megatron.core", "transformers", "vllm") if name in sys.modules]))
"""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def texts(found: list[dict[str, Any]]) -> dict[tuple[str, int], str]:
    return {(row["problem"], i): sample["text"] for row in found for i, sample in enumerate(row["samples"])}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of an evaluation that went through, in a process that says what it has imported; and its output."""
    place = tmp_path_factory.mktemp("evaluation") / "whole"
    command = [sys.executable, "-c", WATCHED, f"evaluation.directory={place}", *SETTINGS]
    done = subprocess.run(command, cwd=place.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return place, done.stdout


def test_the_embedded_model_is_evaluated(whole: tuple[Path, str], tmp_path: Path) -> None:
    place, said = whole
    assert json.loads(said.splitlines()[-1]) == [], "neither torch nor Megatron-Core in an evaluation"
    assert f"avg@{SAMPLES}" in said
    rows = lines(place / "samples.jsonl")
    results = json.loads((place / "results.json").read_text())["scores"]["all"]
    assert results["problems"] == len(rows) == len(read_problems(place / "problems.parquet"))
    assert {len(row["samples"]) for row in rows} == {SAMPLES}
    right = sum(sample["accuracy"] for row in rows for sample in row["samples"])
    assert results["avg_at_k"]["value"] == pytest.approx(right / SAMPLES / len(rows))
    assert results["avg_at_k"]["low"] < results["avg_at_k"]["value"] < results["avg_at_k"]["high"]
    assert results["pass_at"]["1"]["value"] == pytest.approx(results["avg_at_k"]["value"])
    assert 0.05 < results["avg_at_k"]["value"] < 0.4, "the embedded model guesses mostly, and is right now and then"

    # A finished one says its results again, and samples nothing.
    settings = [f"evaluation.directory={place}", *SETTINGS]
    output = runs.finish(runs.start(tmp_path / "again", *settings, module="megatron_fipo.evaluate"), tmp_path / "again")
    assert f"avg@{SAMPLES}" in output and "servers" not in output
    refused = runs.start(tmp_path / "other", *settings, "run.seed=4", module="megatron_fipo.evaluate")
    assert "error: evaluation.directory: " in runs.finish(refused, tmp_path / "other", exit_code=2)


@pytest.mark.matrix  # tests/evaluation has lines cut short
def test_a_killed_evaluation_of_a_checkpoint_goes_on(whole: tuple[Path, str], tmp_path: Path) -> None:
    """The same weights as a run's checkpoint; killed, with all of its processes, when some problems are done."""
    rows = lines(whole[0] / "samples.jsonl")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    to_megatron(resolve_embedded("embedded:tiny"), run / "checkpoints" / "step-000007")
    write_config(run, load_config(SETTINGS))
    settings = [f"model.path={run}", "rollout.max_num_seqs=32"]  # the rest is the run's
    process = runs.start(tmp_path / "log", *settings, module="megatron_fipo.evaluate")
    try:
        runs.wait_until(lambda: list((run / "evaluations").glob("*/samples.jsonl")), "samples", timeout_s=200)
        (broken,) = (run / "evaluations").iterdir()
        runs.wait_until(lambda: len(lines_complete(broken / "samples.jsonl")) > 5, "problems", timeout_s=200)
    finally:
        runs.end(process)
    before = lines_complete(broken / "samples.jsonl")
    assert 5 < len(before) < len(rows), "the control: it was killed in the middle"
    runs.wait_until(lambda: not runs.processes_of(broken), "the end of its processes", timeout_s=30)

    output = runs.finish(runs.start(tmp_path / "log", *settings, module="megatron_fipo.evaluate"), tmp_path / "log")
    assert f"{len(before)} problems were finished by an earlier start" in output
    after = lines(broken / "samples.jsonl")
    assert after[: len(before)] == before
    assert sorted(row["problem"] for row in after) == sorted(row["problem"] for row in rows)
    one, other = texts(rows), texts(after)
    same = sum(one[key] == other[key] for key in one) / len(one)
    assert same > 0.95, "the same seeds and weights; a batch of another size flips a token now and then"
    assert broken.name.startswith("run-step-000007-") and not (broken / "model").exists()

    assert compare([str(whole[0]), str(broken), "--output", str(tmp_path / "comparison")]) == 0
    page = (tmp_path / "comparison" / "comparison.html").read_text()
    assert "run-step-000007 and tiny cannot be told apart" in page


def lines_complete(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that is being written, but for one that is not whole."""
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
