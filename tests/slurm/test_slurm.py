"""The launch scripts on a real Slurm: nodes with their own addresses, a trainer on two of them and vLLM on a third.

Why: a job that only works on one machine, loses a step at a requeue, or finds a typing mistake after an hour in the
queue is a mistake that nothing else would show. Not covered: GPUs, containers, and time limits that Slurm enforces
itself (its USR1 is sent by hand here).
"""

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing, wait_until

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
TINY = (
    "experiment=tiny",
    "cluster.gpus_per_node=1",
    "cluster.trainer_nodes=2",
    "cluster.rollout_nodes=1",
    "rollout.weight_transfer=process_group",
    "algorithm.prompts_per_step=8",
    "algorithm.samples_per_prompt=4",
    "algorithm.mini_batch_prompts=4",
    "algorithm.filter_groups.enable=false",
    "validation.every=0",
    "checkpoint.every=0",
    f"run.steps={STEPS}",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with Cluster(nodes=4) as running:
        running.environment |= {"FIPO_PYTHON": sys.executable, "FIPO_SITE": "/dev/null"}
        yield running


def submit(cluster: Cluster, directory: Path, *overrides: str) -> str:
    options = ["--parsable", "--nodes=3", f"--output={directory}/job.out", "slurm/fipo_32b.sh"]
    return cluster.run("sbatch", *options, *overrides, cwd=ROOT).strip()


def output(directory: Path) -> str:
    path = directory / "job.out"
    return path.read_text(errors="replace") if path.exists() else ""


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_bad_override_is_refused_before_a_node_is_used(cluster: Cluster, tmp_path: Path) -> None:
    """Called by itself the script refuses without a job; given to sbatch, the job ends before its first step."""
    bad = [*TINY, f"run.directory={tmp_path / 'run'}", "run.stepz=3"]
    command = [str(ROOT / "slurm" / "fipo_32b.sh"), *bad]
    ended = subprocess.run(command, cwd=tmp_path, env=cluster.environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, "run.stepz" in ended.stderr) == (2, True), ended.stderr
    assert cluster.run("squeue", "-h") == ""

    job = submit(cluster, tmp_path, *bad)
    wait_until(lambda: cluster.state(job) in ("FAILED", "COMPLETED"), 60, cluster.log)
    assert cluster.state(job) == "FAILED"
    assert "run.stepz" in output(tmp_path)
    assert not (tmp_path / "run").exists()


def test_requeued_run_goes_on_where_it_stopped_on_other_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """USR1: the step is finished and saved; a node goes down; the job comes back on others and ends the run."""
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, *TINY, f"run.directory={run}")

    def told() -> str:
        return f"{cluster.state(job)}\n{output(tmp_path)[-4000:]}\n{cluster.log()}"

    wait_until(lambda: len(steps(run)) >= 2, 250, told)
    token = run / "rollout.token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text().strip() not in output(tmp_path) + (run / "job.txt").read_text()
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: cluster.state(job) == "PENDING", 60, told)
    saved = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())
    assert saved == len(steps(run)) < STEPS, "the control: it stopped, and at the end of a step"

    used = (run / "nodes.txt").read_text().split()
    cluster.run("scontrol", "update", f"nodename={used[0]}", "state=down", "reason=test")
    cluster.run("scontrol", "update", f"jobid={job}", "starttime=now")
    wait_until(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), 250, told)
    assert cluster.state(job) == "COMPLETED", told()
    assert steps(run) == list(range(1, STEPS + 1)), "a step was lost or repeated"
    assert f"resumed from {run}/checkpoints/step-{saved:06d}" in output(tmp_path)
    assert used[0] not in (run / "nodes.txt").read_text().split()
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS
    assert (run / "job.txt").read_text().count("commit ") == 2


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck() -> None:
    scripts = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "slurm").rglob("*.sh"))]
    assert len(scripts) >= 5
    ended = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout
