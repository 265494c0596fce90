"""Single functions of the launch library, in a bash of their own.

Why: what they guard against is too rare to wait for on a cluster. Not covered: the jobs that they are parts of, which
test_slurm.py runs.
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
