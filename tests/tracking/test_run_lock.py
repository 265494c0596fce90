"""A run's lease on its directory: who is kept out, who takes over, and what each is told.

Why: two runs in one directory double metrics.jsonl and share partial checkpoints, and a requeued job must not be kept
out by its own dead predecessor. Real processes hold and lose the lease. Another machine is a lock file that names one.
Not covered: a shared file system of several machines.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_fipo.errors import FipoError
from megatron_fipo.tracking.run_lock import RunLock
from tests.rollout.engines import wait_until

HOLD = """
import sys, time
from pathlib import Path
from megatron_fipo.tracking.run_lock import RunLock
with RunLock(Path(sys.argv[1]), print, lease_s=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(directory: Path, lease_s: float = 1.0) -> subprocess.Popen[str]:
    """A process that holds the directory, once it does."""
    command = [sys.executable, "-c", HOLD, str(directory), str(lease_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and "held\n" in iter(process.stdout.readline, "")
    return process


def taken(directory: Path, lease_s: float = 1.0) -> list[str]:
    """What a run that gets the directory is told."""
    notes: list[str] = []
    with RunLock(directory, notes.append, lease_s):
        pass
    return notes


def test_a_directory_is_held_and_left(tmp_path: Path) -> None:
    assert taken(tmp_path) == taken(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_living_run_keeps_the_second_out_and_a_dead_one_does_not(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    process = holder(tmp_path)
    try:
        expected = f"in use by the run with process {process.pid} on .*, Slurm job 4711: give this run another"
        with pytest.raises(FipoError, match=expected):
            taken(tmp_path)
        with pytest.raises(FipoError, match=expected):
            RunLock(tmp_path, print).refuse_if_taken()
        time.sleep(2)
        with pytest.raises(FipoError, match="in use by"):
            taken(tmp_path)  # longer than its lease: it renews it
    finally:
        process.kill()
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, 10, "the end of the holder")
        RunLock(tmp_path, print).refuse_if_taken()  # nobody has taken leave of it yet, and it is dead all the same
        process.wait()
    RunLock(tmp_path, print).refuse_if_taken()
    (note,) = taken(tmp_path)
    assert re.search(f"process {process.pid} on .* has ended without leaving .*; this run takes its place", note)


def of_another_machine(directory: Path) -> None:
    """Make the held lock one of a machine that nobody can ask."""
    lock = directory / "run.lock"
    owner = json.loads((directory / "run.lock.json").read_text())
    text = lock.read_text()
    assert owner["host"] in text
    lock.write_text(text.replace(owner["host"], "elsewhere"))
    (directory / "run.lock.json").write_text(json.dumps(owner | {"host": "elsewhere"}))


@pytest.mark.slow
def test_another_machines_silent_run_is_waited_for_and_succeeded(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.kill()
    process.wait()
    of_another_machine(tmp_path)
    started = time.monotonic()
    waiting, succeeding = taken(tmp_path)
    assert time.monotonic() - started >= 1.0, "it was given a whole lease to show itself"
    assert "waiting up to 2 s to see whether" in waiting and "on elsewhere is still alive" in waiting
    assert "on elsewhere has ended without leaving" in succeeding


@pytest.mark.slow
def test_a_run_whose_lease_was_taken_stops_writing(tmp_path: Path) -> None:
    """What a suspended run finds when it wakes up: its lock is gone, and somebody else's is there."""
    with RunLock(tmp_path, print, lease_s=0.6) as lock:
        lock.check()
        (tmp_path / "run.lock").unlink()
        process = holder(tmp_path, 0.6)
        try:
            deadline = time.monotonic() + 10
            with pytest.raises(FipoError, match=f"its lease was lost .*process {process.pid} on"):
                while time.monotonic() < deadline:
                    lock.check()
                    time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    assert (tmp_path / "run.lock.json").exists(), "the other run's"


@pytest.mark.slow
def test_a_lock_that_names_nobody_is_replaced_or_shown(tmp_path: Path) -> None:
    """What a crash leaves. An empty one could be a living run's, of an older filelock: nobody takes that."""
    (tmp_path / "run.lock").write_bytes(b"\xff half a li")
    (note,) = taken(tmp_path)
    assert "waiting up to 5 s to see whether another run is still alive" in note
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run.lock").touch()
    with pytest.raises(FipoError, match=r"run\.lock does not say whose it is: remove it if no run writes to"):
        taken(tmp_path)
    assert (tmp_path / "run.lock").exists()


def test_what_lies_in_the_owners_place_is_no_harm(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.lock.json")  # whose reader would wait for ever
    (note,) = taken(tmp_path)
    assert note.startswith("another run has ended without leaving")
    (tmp_path / "run.lock.json").write_text('{"pid": "1\\u001b[31m", "host": "a\\nb"}')
    (note,) = taken(tmp_path)
    assert note.startswith("another run has ended without leaving")
    (tmp_path / "run.lock.json").mkdir()
    with pytest.raises(FipoError, match=r"run\.lock\.json cannot be written: "):
        taken(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock.json"], "the lock itself is left"


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FipoError, match=r"file/run\.lock cannot be written"):
        taken(tmp_path / "file")
