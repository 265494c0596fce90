"""The limit of restarts without a new checkpoint (cluster.max_retries): its counting, and a real job that gives up.

Why: a run that can never start would otherwise keep its nodes, or be requeued, for ever. Not covered: a run that fails
after hours, for which the counting is the same.
"""

import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.jobs import ROOT, TINY, submit

pytestmark = pytest.mark.slow
COUNT = '. "$1"/slurm/lib/launch.sh; run_directory=$2; max_retries=2; count_attempt; echo started'


def start(run: Path) -> subprocess.CompletedProcess[str]:
    """What the launch library does at every start of a run, before anything else."""
    return subprocess.run(
        ["bash", "-c", COUNT, "bash", str(ROOT), str(run)], capture_output=True, text=True, timeout=30
    )


def attempts(run: Path) -> str:
    """Return what the job has counted; nothing at the moment when it starts again."""
    try:
        return (run / "attempts").read_text()
    except FileNotFoundError:
        return ""


def test_only_restarts_in_a_row_without_a_checkpoint_count(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    assert [start(tmp_path).returncode for _ in range(3)] == [0, 0, 0], "a start and its two restarts"
    (checkpoints / "step-000005").mkdir()
    assert [start(tmp_path).returncode for _ in range(3)] == [0, 0, 0], "the checkpoint begins the count anew"
    # What a save that was killed leaves is no checkpoint.
    (checkpoints / ".step-000010").mkdir()
    ended = start(tmp_path)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "giving up: 2 restarts in a row brought no new checkpoint (newest: step-000005;" in ended.stderr
    assert "cluster.max_retries=2" in ended.stderr


def test_a_job_that_gets_nowhere_gives_up_and_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """It is requeued before its first step, as by pre-emptions, one time more often than it may."""
    run = tmp_path / "run"
    overrides = [*TINY, "cluster.max_retries=1", f"run.directory={run}"]
    run.mkdir()
    (run / "attempts").write_text("7 \n")  # of an earlier job, which gave up: this one starts anew
    job = submit(cluster, tmp_path, "fipo_32b.sh", overrides, "--nodes=3")
    for restarts in range(2):
        wait_until(lambda count=restarts: attempts(run) == f"{count} \n", 60, job.told)
        cluster.run("scontrol", "requeue", job.number)
        job.wait_for("PENDING", timeout_s=60)
        job.start_again()
    job.wait_for("FAILED", "COMPLETED", timeout_s=60)
    assert job.state == "FAILED", job.told()
    assert "giving up: 1 restarts in a row brought no new checkpoint (newest: none;" in job.output
    assert (run / "job.txt").read_text().count("commit ") == 3
    assert "start 3," in (run / "job.txt").read_text()
