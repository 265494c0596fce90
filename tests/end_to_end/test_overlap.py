"""Whole runs in which sampling goes on while the policy is updated, on real servers that fail on the way.

Why: what overlaps is lost, or trained on twice, at moments that no test of a part has: a weight update under running
requests, a checkpoint in the middle of samples, a server that dies while nobody waits for it. That no schedule breaks
the bound is tests/rollout/test_ledger.py, hundreds of kills tests/rollout/test_collector_kills.py, learning and speed
docs/overlap.md. Not covered: CUDA, several machines.
"""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import runs
from tests.end_to_end.runs import SMALL

pytestmark = pytest.mark.slow
OVERLAPS = (*SMALL, "algorithm.tis_cap=2", "rollout.stream_tokens=2", "rollout.max_num_seqs=8")
"""More samples than a server has places, and each sent in parts: at every moment some have begun."""


def check_rows(rows: list[dict[str, float]], steps: int, k: int) -> None:
    """What must hold of every step in fp32, however stale its tokens are."""
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert row["ppo_kl_first"] == 0.0, "old log-probs are the trainer's own"
        assert row["lag_max"] <= k
        assert row["updates_skipped"] == 0 and row["grad_norm"] > 0
        assert row.get("log_prob_diff_max", 0) < 1e-4, "of tokens that the present weights sampled"
        assert row["probe_diff_max"] < 1e-4
        assert row["tickets_trained"] == 8 * row["step"] and row["tickets_failed"] == row["tickets_discarded"] == 0
        ended = sum(row[f"tickets_{end}"] for end in ("trained", "rejected", "in_flight"))
        assert row["tickets_opened"] == ended, "a prompt was lost, or counted twice"
    assert max(row["lag_max"] for row in rows) == k, "the control: it overlapped"


def begun(checkpoint: Path) -> list[dict[str, Any]]:
    """The samples in a checkpoint that had not ended."""
    tickets = json.loads((checkpoint / "rollout/ledger.json").read_text())["tickets"]
    parts = [row for ticket in tickets if "parts" in ticket for row in ticket["parts"]["responses"]]
    return [row for row in parts if row["finish_reason"] == "begun"]


def test_a_resume_goes_on_with_every_sample_that_had_begun(tmp_path: Path) -> None:
    """At k = 2, after everything was killed at once. Samples that had begun are continued, token by token."""
    settings = [*OVERLAPS, "rollout.max_off_policy_steps=2", "checkpoint.every=1", "checkpoint.keep=0"]

    def with_begun() -> list[Path]:
        """Checkpoints after step 2 whose samples had not all ended: the tiny model's seldom take long."""
        complete = sorted((tmp_path / "checkpoints").glob("step-*"))
        return [path for path in complete if int(path.name[-6:]) > 2 and begun(path)]

    with runs.started(tmp_path, *settings, "run.steps=1000") as process:
        runs.wait_until(with_begun, "a checkpoint in the middle of samples", timeout_s=200)
        runs.kill_all(process, tmp_path)
    runs.wait_until(lambda: not runs.processes_of(tmp_path), "the end of the killed run's processes", timeout_s=30)
    newest = with_begun()[-1]
    saved = int(newest.name[-6:])
    for later in (tmp_path / "checkpoints").glob("step-*"):
        if int(later.name[-6:]) > saved:
            shutil.rmtree(later)
    partial = begun(newest)
    assert partial, "the control: samples were on their way"
    runs.run(tmp_path, *settings, f"run.steps={saved + 3}")
    rows = runs.rows(tmp_path)
    check_rows(rows, steps=saved + 3, k=2)
    continued = sum(row["tokens_continued"] for row in rows if row["step"] > saved)
    assert continued == sum(row["tokens"] for row in partial), "none of their tokens was sampled again"


@pytest.mark.matrix  # test_servers.py has servers that die and hang
def test_servers_that_die_or_hang_cost_no_prompt_and_a_stop_waits_for_no_answer(tmp_path: Path) -> None:
    """At k = 1: a server is killed, its successor hangs, and the next hangs where a stop is asked for."""
    settings = [*OVERLAPS, "rollout.max_off_policy_steps=1", "run.steps=1000", "rollout.hang_timeout_s=8"]
    with runs.started(tmp_path, *settings) as process:
        runs.wait_until(lambda: len(runs.rows(tmp_path)) >= 2, "step 2", timeout_s=200)
        runs.kill_servers_of(tmp_path)
        runs.wait_until(lambda: restarts(tmp_path) == 1, "a step with another server", timeout_s=120)
        stop_servers(tmp_path)
        runs.wait_until(lambda: restarts(tmp_path) == 2, "a step with a third server", timeout_s=120)
        stop_servers(tmp_path)
        (tmp_path / "stop").touch()
        assert process.wait(timeout=120) == 75, "no answer is waited for, which would take an hour"
    output = runs.output(tmp_path)
    assert "Traceback" not in output and "restart 1 of at most 3" in output
    rows = runs.rows(tmp_path)
    check_rows(rows, steps=len(rows), k=1)
    assert not (tmp_path / "stop").exists()
    (checkpoint,) = (tmp_path / "checkpoints").glob("step-*")
    assert int(checkpoint.name[-6:]) == len(rows)
    runs.wait_until(lambda: not runs.processes_of(tmp_path), "the end of all processes", timeout_s=30)


def restarts(directory: Path) -> float:
    """Servers that the steps so far have started again."""
    return sum(row["rollout_restarts"] for row in runs.rows(directory))


def stop_servers(directory: Path) -> None:
    """Have every process of the run's servers hang."""
    for process in runs.processes_of(directory):
        if "megatron_fipo.engines.server" in " ".join(process.cmdline()):
            for each in [*process.children(recursive=True), process]:
                each.send_signal(signal.SIGSTOP)
