"""Single functions of the launch library, each in its own bash.

Why: they handle cases that are too rare to test on a cluster. Not covered: whole jobs, which test_slurm.py runs.
"""

import subprocess
from pathlib import Path

import pytest

from tests.slurm.jobs import ROOT

pytestmark = pytest.mark.slow


def bash(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script that has the launch library's functions."""
    command = ["bash", "-c", f'. "{ROOT}/slurm/lib/launch.sh"\n{script}', "bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


SIGNAL_THEN_END = """
taken=
trap 'taken=1; kill -TERM "$child"; while kill -0 "$child" 2>/dev/null; do sleep 0.05; done' USR1
bash -c 'trap "exit 75" TERM; : >"$1"; while :; do sleep 0.05; done' child "$1" & child=$!
(while [ ! -e "$1" ]; do sleep 0.05; done; kill -USR1 $$) &
wait_for "$child"
echo "status $?, trap taken: $taken"
"""
"""The child ends within the trap, and so between the wait that the signal ended and the look whether it is there."""


def test_the_status_of_a_child_that_ends_as_a_signal_comes_is_its_own(tmp_path: Path) -> None:
    assert bash(SIGNAL_THEN_END, tmp_path / "ready").stdout == "status 75, trap taken: 1\n"


@pytest.mark.parametrize(("end", "status"), [("exit 3", 3), ("kill -KILL $BASHPID", 137)])
def test_the_status_of_a_child_without_any_signal(end: str, status: int) -> None:
    assert bash(f'({end}) & wait_for $!; echo "status $?"').stdout == f"status {status}\n"


CHOOSE = """
run_directory=$1 trainer_nodes=1 rollout_nodes=2
scontrol() { printf 'node3\\nnode5\\n'; [ "$*" = "show hostnames node[3,5]" ] || echo "not $*"; }
{ rollout_failure; good_nodes=(node1 node2 node3 node4 node5); failed_last; } 2>&1
echo "order: ${good_nodes[*]}"
good_nodes=(node1 node2 node3); failed_last
echo "without a spare: ${good_nodes[*]}"
failed_nodes=(); server_nodes=(node2 node3); addresses=$1/addresses; remember_failed $(silent_nodes)
good_nodes=(node1 node2 node3 node4); failed_last
echo "after a silent one: ${good_nodes[*]}"
"""


def test_nodes_whose_servers_failed_are_used_last(tmp_path: Path) -> None:
    """A spare node takes its place, if there is one. scontrol is replaced, since it needs a cluster."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rollout.err").write_text(
        "srun: warning: something\nsrun: error: node[3,5]: tasks 0,2: Exited with exit code 1\n"
    )
    (tmp_path / "addresses").mkdir()
    (tmp_path / "addresses" / "node3").write_text("http://node3:8000")
    told = bash(CHOOSE, tmp_path).stdout
    assert "the rollout step failed: " in told
    assert "used from now on only where no other is left: node3 node5\n" in told
    assert "order: node1 node2 node4 node3 node5\n" in told
    assert "without a spare: node1 node2 node3\n" in told
    assert "after a silent one: node1 node3 node4 node2\n" in told


def test_a_node_name_is_not_taken_for_another_that_begins_alike() -> None:
    script = 'failed_nodes=(node1); good_nodes=(node1 node10 node2); failed_last; echo "${good_nodes[*]}"'
    assert bash(script).stdout == "node10 node2 node1\n"
