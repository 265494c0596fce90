"""The launch library's check of nodes, on a real Slurm: how many it needs, and what it says of those that fail.

Why: it runs before every start, so an error in it stops every run. Not covered: GPUs and NCCL.
"""

import shlex
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT, Job

pytestmark = pytest.mark.slow
CHECK = """
. "$FIPO_ROOT/slurm/lib/launch.sh"
site_values
cd "$FIPO_ROOT"
run_directory={directory} trainer_nodes={nodes} gpus_per_node=1
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
check_nodes
echo "status $?, good: ${{good_nodes[*]}}"
"""


def check(cluster: Cluster, directory: Path, trainer_nodes: int) -> Job:
    """Check a job of one node, of which the run needs `trainer_nodes`."""
    script = CHECK.format(directory=shlex.quote(str(directory)), nodes=trainer_nodes)
    options = ["--parsable", "--nodes=1", "--exclusive", f"--output={directory}/job.out"]
    command = ["sbatch", *options, f"--export=ALL,FIPO_ROOT={ROOT}", f"--wrap=bash -c {shlex.quote(script)}"]
    job = Job(cluster, directory, cluster.run(*command).strip())
    job.wait_for("COMPLETED", "FAILED", timeout_s=120)
    return job


def test_one_node_is_enough_for_a_run_that_needs_one(cluster: Cluster, tmp_path: Path) -> None:
    """Its step has one task, for which Slurm's variables are read in another way than for several tasks."""
    job = check(cluster, tmp_path, 1)
    assert f"status 0, good: {cluster.names[0]}" in job.output, job.told()
    assert "cannot add numbers up" not in job.output


def test_too_few_nodes_are_left_to_the_caller(cluster: Cluster, tmp_path: Path) -> None:
    """There may be a request to stop, after which the job has to be requeued."""
    job = check(cluster, tmp_path, 2)
    assert "2 nodes are needed, and 1 were given, of which these are good:" in job.output, job.told()
    assert "status 1" in job.output
