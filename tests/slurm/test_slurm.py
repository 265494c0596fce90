"""The launch scripts on a real Slurm: nodes with their own addresses, a trainer on two of them and vLLM on a third.

Why: no other test shows that a job only works on one machine, loses a step at a requeue, or reports a typing mistake
only after an hour in the queue. Not covered: GPUs, containers, and a pre-emption without grace time, after which a run
repeats the steps since its last checkpoint.
"""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.jobs import ROOT, TINY, Job, call, submit

STEPS = 12
START_S = 250
"""Patience with a start of the whole run on two slow cores."""
MINUTES_BEFORE_THE_LIMIT = 10

pytestmark = pytest.mark.slow


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def saved(run: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def test_a_bad_override_is_refused_before_a_node_is_used(cluster: Cluster, tmp_path: Path) -> None:
    """Called by itself the script refuses without a job; given to sbatch, the job ends before its first step."""
    bad = [*TINY, f"run.directory={tmp_path / 'run'}", "run.stepz=3"]
    command = [str(ROOT / "slurm" / "fipo_32b.sh"), *bad]
    ended = subprocess.run(command, cwd=tmp_path, env=cluster.environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, "run.stepz" in ended.stderr) == (2, True), ended.stderr
    assert cluster.run("squeue", "-h") == ""

    job = submit(cluster, tmp_path, "fipo_32b.sh", bad, "--nodes=3")
    job.wait_for("FAILED", "COMPLETED", timeout_s=60)
    assert job.state == "FAILED"
    assert "run.stepz" in job.output
    assert not (tmp_path / "run").exists()


def test_a_script_that_is_called_asks_for_what_the_run_wants(cluster: Cluster, tmp_path: Path) -> None:
    """The job requests as many nodes and GPUs as the run needs. An option of the site takes precedence."""
    wanted = [*TINY, "cluster.gpus_per_node=4"]
    for options, gpus in ((["--hold"], 4), (["--hold", "--gpus-per-node=2"], 2)):
        job = call(cluster, tmp_path, "fipo_32b.sh", wanted, *options)
        told = cluster.run("scontrol", "show", "job", job.number)
        cluster.run("scancel", job.number)
        assert "NumNodes=3" in told and f"TresPerNode=gres:gpu:{gpus}" in told.replace("gres/gpu", "gres:gpu"), told


def processes(module: str, run: Path) -> list[psutil.Process]:
    """The run's processes of that module, on all nodes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if module in command and f"run.directory={run}" in command and Path(command[0]).name.startswith("python"):
            found.append(process)
    return found


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Halt the trainer's ranks, so that a run of a few seconds still exists when its time is up or its node is lost."""
    ranks = processes("megatron_fipo.train", run)
    assert ranks
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGCONT)


def reach_the_time_limit(job: Job, run: Path) -> None:
    """Shorten the job's time, so that Slurm itself finds that it is nearly up, and sends USR1."""
    with held(run):
        job.update(timelimit=MINUTES_BEFORE_THE_LIMIT)
        wait_until(lambda: "asked to stop" in job.output, 90, job.told)


def pre_empt(job: Job, _: Path) -> None:
    """Submit a job of a higher priority that wants every node: Slurm sends USR1, and waits for GraceTime."""
    options = ["--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true"]
    urgent = Job(job.cluster, job.directory, job.cluster.run("sbatch", *options).strip())
    urgent.wait_for("COMPLETED", timeout_s=120)


@pytest.mark.timeout(900)  # two starts, each with the patience of a slow machine
@pytest.mark.parametrize("stop", [reach_the_time_limit, pytest.param(pre_empt, marks=pytest.mark.matrix)])
def test_a_run_goes_on_where_it_stopped_on_other_nodes(
    cluster: Cluster, tmp_path: Path, stop: Callable[[Job, Path], None]
) -> None:
    """It is stopped, and saves; then one of its nodes goes down, and it comes back on others."""
    run = tmp_path / "run"
    overrides = [*TINY, f"run.steps={STEPS}", f"run.directory={run}"]
    limits = ["--time=600", f"--signal=B:USR1@{60 * MINUTES_BEFORE_THE_LIMIT}"]
    job = submit(cluster, tmp_path, "fipo_32b.sh", overrides, "--nodes=3", *limits)
    wait_until(lambda: len(steps(run)) >= 2, START_S, job.told)
    token = run / "rollout.token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE((run / "addresses").stat().st_mode) == 0o700
    assert token.read_text().strip() not in job.output + (run / "job.txt").read_text()

    stop(job, run)
    job.wait_for("PENDING", timeout_s=60)
    first = saved(run)
    assert first == len(steps(run)) < STEPS, "the control: it stopped, and at the end of a step"
    used = (run / "nodes.txt").read_text().split()
    cluster.run("scontrol", "update", f"nodename={used[0]}", "state=down", "reason=test")
    job.update(timelimit=600)
    job.start_again()

    job.wait_for("COMPLETED", "FAILED", timeout_s=START_S)
    cluster.run("scontrol", "update", f"nodename={used[0]}", "state=resume")
    assert job.state == "COMPLETED", job.told()
    assert steps(run) == list(range(1, STEPS + 1)), "a step was lost or repeated"
    assert f"resumed from {run}/checkpoints/step-{first:06d}" in job.output
    assert used[0] not in (run / "nodes.txt").read_text().split()
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS
    assert (run / "job.txt").read_text().count("commit ") == 2


@pytest.mark.matrix  # test_servers.py has lost servers, test_retries.py lost nodes
def test_a_run_goes_on_without_a_rollout_node_that_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    """Everything of ours on it ends; the other node's server samples all, and nothing is started again."""
    run = tmp_path / "run"
    layout = ["cluster.trainer_nodes=1", "cluster.rollout_nodes=2", "parallel=single", f"run.steps={STEPS}"]
    job = submit(cluster, tmp_path, "fipo_32b.sh", [*TINY, *layout, f"run.directory={run}"], "--nodes=3")
    wait_until(lambda: len(steps(run)) >= 2, START_S, job.told)
    lost = (run / "nodes.txt").read_text().split()[-1]
    with held(run):
        (victim,) = [
            process
            for process in processes("megatron_fipo.launch.rollout_node", run)
            if process.environ()["SLURMD_NODENAME"] == lost
        ]
        victim.kill()
    job.wait_for("COMPLETED", "FAILED", timeout_s=START_S)
    assert job.state == "COMPLETED", job.told()
    assert steps(run) == list(range(1, STEPS + 1))
    assert f"srun: error: {lost}: task 1: Killed" in (run / "logs" / "rollout.err").read_text(), "the control"
    assert "starts again" not in job.output


@pytest.mark.parametrize("script", ["fipo_32b.sh", "dapo_32b.sh", "fipo_7b.sh", "convert.sh"])
def test_help_is_printed(script: str) -> None:
    ended = subprocess.run([str(ROOT / "slurm" / script), "--help"], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"slurm/{script}" in ended.stdout and "SBATCH" not in ended.stdout


def test_nothing_but_overrides_is_taken(tmp_path: Path) -> None:
    """Hydra's own options print other things than the launch library reads, which must not be taken for commands."""
    command = [str(ROOT / "slurm" / "fipo_32b.sh"), "--cfg=job"]
    environment = os.environ | {"FIPO_PYTHON": sys.executable, "FIPO_SITE": "/dev/null"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "only overrides" in ended.stderr and "not found" not in ended.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck() -> None:
    scripts = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "slurm").rglob("*.sh"))]
    assert len(scripts) >= 5
    ended = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout
