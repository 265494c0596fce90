"""What a user sees first of a step that failed on several nodes: the log of the task that failed first, by a real srun.

Why: the failures that follow, of tasks that wait for the first, fill screens. Not covered: the trainer's own messages.
"""

import shlex
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT, Job

pytestmark = pytest.mark.slow
TASK = """
echo "task $SLURM_PROCID is here"
if [ "$SLURM_PROCID" = 2 ]; then echo "the reason"; exit 3; fi
sleep 60
"""
STEP = """
. "$FIPO_ROOT/slurm/lib/launch.sh"
site_values
run_directory={directory}
mkdir "$run_directory/logs"
step --ntasks=4 --ntasks-per-node=2 --label --output="$run_directory/logs/trainer-%N.log" \\
  bash -c {task} 2>"$run_directory/logs/trainer.err"
highest=$?
echo "status $(first_status trainer $highest), srun's $highest"
first_failure trainer
"""


def test_the_task_that_failed_first_is_shown(cluster: Cluster, tmp_path: Path) -> None:
    script = STEP.format(directory=shlex.quote(str(tmp_path)), task=shlex.quote(TASK))
    options = [
        "--parsable",
        "--nodes=2",
        "--exclusive",
        f"--output={tmp_path}/job.out",
        "--export=ALL,FIPO_ROOT=" + str(ROOT),
    ]
    number = cluster.run("sbatch", *options, f"--wrap=bash -c {shlex.quote(script)}").strip()
    job = Job(cluster, tmp_path, number)
    job.wait_for("COMPLETED", "FAILED", timeout_s=60)
    assert "status 3, srun's 143" in job.output, job.told()
    node = cluster.names[1]
    assert f"trainer task 2 on {node} failed first; the end of {tmp_path}/logs/trainer-{node}.log:" in job.output
    assert "2: the reason" in job.output
    assert "task 3 is here" not in job.output, "the control: its neighbour's lines are left out"
    assert "0: task 0 is here" in (tmp_path / "logs" / f"trainer-{cluster.names[0]}.log").read_text()
