"""Why: a comparison over algorithms and seeds is one command, and what is done stays done. Its runs are real ones here.

Not covered: mistakes in it, and its directories (tests/launch/test_sweep.py).
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_fipo.engines.pool import EnginePool
from tests.end_to_end import runs
from tests.end_to_end.runs import SMALL
from tests.engines.tokens import token_of

pytestmark = pytest.mark.slow


def test_a_sweep_goes_on_after_a_failure_and_where_it_stopped(server: EnginePool, tmp_path: Path) -> None:
    """A sweep of two seeds, of which the first cannot write its logs. The same command again completes the sweep.

    The second call is interrupted, which ends the run in progress, with the server that it has started, and the sweep.
    """
    settings = [*SMALL, "parallel=single", "run.steps=1", "checkpoint.every=1", "run.seed=1,2"]
    command = [sys.executable, "-m", "megatron_fipo", "train", "-m", *settings, f"run.directory={tmp_path}"]
    environment = os.environ | {"FIPO_ROLLOUT_TOKEN": token_of(server)}
    obstacle = tmp_path / "seed-1" / "logs"
    obstacle.parent.mkdir()
    obstacle.write_text("in the way")
    first = subprocess.run(
        [*command, *runs.on(server)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert first.returncode == 1, first.stdout + first.stderr
    lines = first.stdout.splitlines()
    assert re.match(r"\[1/2\] seed-1: failed after .*: run.directory: .* cannot be made", lines[1]), first.stdout
    assert re.match(r"\[2/2\] seed-2: done in ", lines[2]), first.stdout
    assert lines[3].split()[:3] == ["run", "steps", "reward"] and len(lines) >= 6
    assert first.stderr.count("\n") == first.stderr.count("warning: "), "nothing but warnings"

    obstacle.unlink()
    again = [*command, "run.steps=1000"]
    with subprocess.Popen(again, stdout=subprocess.PIPE, text=True) as second:
        runs.wait_until(lambda: len(runs.rows(tmp_path / "seed-1")) > 1, "two steps", timeout_s=200)
        time.sleep(0.1)
        second.send_signal(signal.SIGINT)
        said, _ = second.communicate(timeout=60)
    assert second.returncode == 130 and "[2/2]" not in said
    assert said.splitlines()[-1].endswith(f"run.directory={tmp_path}")
    runs.wait_until(lambda: not runs.processes_of(tmp_path), "the end of all processes", timeout_s=10)
    steps = len(runs.rows(tmp_path / "seed-1"))
    assert (tmp_path / "seed-1" / "checkpoints" / f"step-{steps:06d}").is_dir()
