"""Why: someone who comes back to a run asks how it stands and what the model writes before anything else.

Runs are made of a few numbers here; the checkpoint is a directory with a manifest, as a run writes one.
"""

import json
from pathlib import Path

import pytest

from megatron_fipo import inspect
from megatron_fipo.policy import checkpoint_manifest
from tests.comparison.fake_runs import make_run
from tests.tracking.groups import make_group


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert inspect.main(arguments) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = make_run(tmp_path / "run", {0: [1, 0], 12: [4, 2]}, "algorithm=dapo", last_step=12)
    checkpoint = directory / "checkpoints" / "step-000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights.bin").write_bytes(b"x" * 1_500_000)
    checkpoint_manifest.write(checkpoint, {})
    return directory


def test_how_a_run_stands(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, str(run))
    assert text.startswith(f"{run}: not finished, step 12 of 20")
    assert "algorithm.name" in text and "dapo" in text and "run.steps" in text
    assert len([line for line in text.splitlines() if line.split()[:1] == ["12"]]) == 1
    assert "step    12  avg@k 0.750" in text and "step-000010  1.5 MB\n" in text


def test_only_the_newest_rows_are_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.split()[0] for line in shown(capsys, str(run), "--rows", "3").splitlines() if line.endswith(" 5.0")]
    assert rows == ["10", "11", "12"]


def test_a_damaged_checkpoint_is_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "every file has its checksum" in shown(capsys, str(run), "--verify")
    weights = run / "checkpoints" / "step-000010" / "weights.bin"
    weights.write_bytes(b"y" + weights.read_bytes()[1:])
    assert "DAMAGED: weights.bin is damaged" in shown(capsys, str(run), "--verify")


def test_what_the_model_wrote(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = shown(capsys, str(run), "--step", "3", code=2)
    assert refused.count("\n") == 1 and "tracking.samples_per_step" in refused
    from megatron_fipo.tracking.rollout_log import log_rollouts

    group = make_group("19", "9")
    for step in (1, 2, 5):
        log_rollouts(run, step, [group], 2, str)
    assert group.problem.text in shown(capsys, str(run), "--step", "2")
    assert "there are those of 1–2, 5" in shown(capsys, str(run), "--step", "3", code=2)
    assert "steps 1–2, 5" in shown(capsys, str(run))


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}))
    assert "has no config.yaml" in shown(capsys, str(tmp_path), code=2)
