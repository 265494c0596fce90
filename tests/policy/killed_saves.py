"""What the rank of test_killed_saves.py runs: a run that is killed again and again while it saves in the background."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from megatron_fipo.config import Config
from megatron_fipo.policy import checkpoint, checkpoint_manifest, checkpoint_places, platform
from megatron_fipo.policy.model import start_model_parallel
from megatron_fipo.processes.leftovers import remove_partial_files
from tests.policy import checkpoints
from tests.policy.checkpoints import RMSNorm

FIRST_STEP = 1


def kill_at(model_dir: str, directory: str, moments: int) -> list[dict[str, Any]]:
    """Start a run so often, each going on from what the one before left, and kill it at another moment of a save.

    Returns:
        By run: the moment within a save (of which 1 is all), what was left, and the step that the next run loaded. The
        last run is killed as soon as its save is done, so that one save is whole however slow the machine has become.
    """
    place = Path(directory)
    whole, _ = _run_until(model_dir, place, seconds=None)
    found = []
    for number in range(moments):
        moment = 1.2 * number / (moments - 1)
        last = number == moments - 1
        _, loaded = _run_until(model_dir, place, seconds=None if last else moment * whole)
        if found:
            found[-1]["loaded"] = loaded
        newest = checkpoint_places.newest(place)
        assert newest is not None
        left = sorted(path.name for path in place.iterdir())
        found.append({"moment": moment, "left": left, "newest": checkpoint_places.step_of(newest)})
    _, found[-1]["loaded"] = _run_until(model_dir, place, seconds=None)
    return found


def _run_until(model_dir: str, place: Path, seconds: float | None) -> tuple[float, int]:
    """A run that is killed so long after it began to save, or when that save is done. Seconds, and what it loaded."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reads)
            with os.fdopen(writes, "w", buffering=1) as says:
                _train(model_dir, place, says)
        finally:
            os._exit(1)
    os.close(writes)
    with os.fdopen(reads) as lines:
        loaded = int(_line(lines, "loaded"))
        _line(lines, "saving")
        started = time.monotonic()
        if seconds is None:
            _line(lines, "saved")
        else:
            time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        elapsed = time.monotonic() - started
        os.waitpid(child, 0)
        lines.read()  # until what the run has started is gone as well
    return elapsed, loaded


def _line(lines: Any, word: str) -> str:
    line = lines.readline()
    assert line.startswith(word), f"{line!r} instead of {word}"
    return line.removeprefix(word)


def _train(model_dir: str, place: Path, says: Any) -> None:
    """Resume, and then save without end; the state of step n is n everywhere, and changes while it is written."""
    os.environ["MASTER_PORT"] = "0"
    platform.start_process_group(60)
    start_model_parallel(Config().parallel, seed=0)
    remove_partial_files(place.parent)
    assert not list(place.glob(".*"))
    policy = checkpoints._policy(model_dir, RMSNorm)
    values = checkpoints._values(policy)
    step = FIRST_STEP
    if found := checkpoint_places.newest(place):
        assert checkpoint_manifest.verify(found) == ""
        checkpoint.load(policy, found)
        step = checkpoint_places.step_of(found)
        assert all(bool((value == step).all()) for value in values.values()), f"{found} is not of one moment"
    print("loaded", step, file=says)
    while True:
        step += 1
        _fill(values, step)
        print("saving", file=says)
        saving = checkpoint.start_saving(policy, place, step, {}, 2, Path(model_dir))
        while not saving.is_written():
            _fill(values, -1)  # as training changes it meanwhile
        saving.finish()
        print("saved", file=says)


def _fill(values: dict[str, torch.Tensor], number: int) -> None:
    for value in values.values():
        value.fill_(number)
