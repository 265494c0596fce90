"""Trainer and engines in turns on all nodes of a job, on a real Slurm.

Why: here alone engines of several nodes sleep, wake and get weights from a sender on their own node. Not covered: GPUs,
where sleeping frees memory (tests/gpu), and CUDA IPC.
"""

import json
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import TINY, call
from tests.slurm.test_slurm import START_S, steps

pytestmark = pytest.mark.slow

STEPS = 3
COLOCATED = (
    *TINY,
    "cluster.rollout_nodes=0",
    "rollout.servers=0",
    "rollout.shared_gpu=true",
    "rollout.weight_transfer=shared_memory",
    "rollout.checksum_every=1",
    f"run.steps={STEPS}",
)


def test_trainer_and_engines_take_turns_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """Two pipeline stages on two nodes: each node's engine needs tensors of the other node's rank."""
    run = tmp_path / "run"
    job = call(cluster, tmp_path, "fipo_32b.sh", [*COLOCATED, f"run.directory={run}"])
    assert "NumNodes=2" in cluster.run("scontrol", "show", "job", job.number), "the nodes of the trainer are enough"
    job.wait_for("COMPLETED", "FAILED", timeout_s=START_S)
    assert job.state == "COMPLETED", job.told()
    assert steps(run) == list(range(1, STEPS + 1))
    nodes = (run / "nodes.txt").read_text().split()
    assert sorted(path.name for path in (run / "addresses").iterdir()) == sorted(nodes)
    assert len({path.read_text().split(":")[1] for path in (run / "addresses").iterdir()}) == 2, "each on its own node"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["rollout_servers"] == 2 and row["weights_checked"] > 20
        # Both engines have the whole of both stages' new weights: a stale or missing tensor changes these.
        assert 0 < row["probe_diff_max"] < 1e-3 and 0 < row["log_prob_diff_mean"] < 1e-3
    for node in nodes:
        log = (run / "rollout" / node / "logs" / "rollout-0.log").read_text(errors="replace")
        # Once while the policy is built, and once for each step's updates.
        assert log.count("to fall asleep") == STEPS + 1, "the control: it has slept"
