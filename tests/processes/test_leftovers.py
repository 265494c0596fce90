"""Why: a killed run's shared memory is lost to the machine until somebody removes it, and whoever removes another run's
breaks that run. A real killed run is in tests/end_to_end/test_train.py.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_fipo.processes import leftovers


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """Stand-ins for /dev/shm and /tmp."""
    shared, temporary = tmp_path / "shm", tmp_path / "tmp"
    for directory in (shared, temporary):
        directory.mkdir()
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", shared)
    monkeypatch.setattr(leftovers.tempfile, "tempdir", str(temporary))
    yield shared, temporary


def dead_process() -> int:
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


def test_only_what_this_runs_dead_processes_left_is_removed(tmp_path: Path, places: tuple[Path, Path]) -> None:
    shared, temporary = places
    run, other = tmp_path / "run", tmp_path / "other"
    dead, living = dead_process(), os.getppid()

    def name(directory: Path, pid: int) -> str:
        return leftovers.prefix(directory).replace(f"-{os.getpid()}-", f"-{pid}-")

    left = [shared / f"{name(run, dead)}stage0", temporary / f"{name(run, dead)}abc", shared / f"{name(run, dead)}12ab"]
    left += [
        shared / f"sem.{name(run, dead)}xyz",
        shared / f"{name(run, os.getpid())}earlier",
    ]
    kept = [shared / f"{name(run, living)}stage1", shared / f"{name(other, dead)}stage0", shared / "psm_1234"]
    kept += [shared / f"my-{name(run, dead)}notes", shared / name(run, dead).removesuffix("-")]
    for path in left[:2] + kept[:2]:
        path.mkdir()
        (path / "000001.safetensors").touch()
    for path in left[2:] + kept[2:]:
        path.touch()
    precious = tmp_path / "precious"
    precious.mkdir()
    (shared / f"{name(run, dead)}link").symlink_to(precious)

    assert set(leftovers.remove_outside(run)) == {*left, shared / f"{name(run, dead)}link"}
    assert {*shared.iterdir(), *temporary.iterdir()} == set(kept)
    assert precious.is_dir()
    assert leftovers.remove_outside(run) == []


def test_a_young_process_of_a_dead_ones_number_does_not_protect(tmp_path: Path, places: tuple[Path, Path]) -> None:
    shared, _ = places
    segment = shared / leftovers.prefix(tmp_path).replace(f"-{os.getpid()}-", f"-{os.getppid()}-1")
    segment.touch()
    assert leftovers.remove_outside(tmp_path) == []
    os.utime(segment, (0, 0))
    assert leftovers.remove_outside(tmp_path) == [segment]


def test_only_partial_files_of_ours_are_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory in ("samples", "checkpoints/.step-000010.partial", "checkpoints/step-000005", "mine"):
        (tmp_path / directory).mkdir(parents=True)
    left = [tmp_path / ".summary.json.17.partial", tmp_path / "samples" / ".step-000001.txt.17.partial"]
    kept = [tmp_path / ".mine.partial", tmp_path / "a.17.partial", tmp_path / "mine" / ".x.17.partial"]
    for path in left + kept:
        path.touch()
    removed = leftovers.remove_partial_files(tmp_path)
    assert set(removed) == {*left, tmp_path / "checkpoints" / ".step-000010.partial"}
    assert all(path.exists() for path in kept) and (tmp_path / "checkpoints" / "step-000005").is_dir()
    leftovers.say_removed(tmp_path, removed)
    leftovers.say_removed(tmp_path, [])
    said = capsys.readouterr().out.splitlines()
    where = [f"1 in {tmp_path / place}" for place in (".", "checkpoints", "samples")]
    assert said == [f"removed what a killed run in {tmp_path} had left: {', '.join(where)}"]


MAKES_SHARED_MEMORY = """
import multiprocessing, os, sys
from multiprocessing import shared_memory
from pathlib import Path
from megatron_fipo.processes import leftovers

def show():
    segment = shared_memory.SharedMemory(create=True, size=16)
    print(segment.name, multiprocessing.current_process()._config["semprefix"], multiprocessing.util.get_temp_dir())
    segment.close()
    segment.unlink()

if __name__ == "__main__":
    import multiprocessing.util
    with leftovers.own_place(Path(sys.argv[1])):
        show()
        child = multiprocessing.get_context("fork").Process(target=show)
        child.start()
        child.join()
"""


def test_what_multiprocessing_makes_is_named_after_the_run(tmp_path: Path) -> None:
    """In Python's own words, since it is told by names that are not documented."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAKES_SHARED_MEMORY, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    output, _ = process.communicate(timeout=60)
    own = leftovers.prefix(tmp_path).replace(f"-{os.getpid()}-", f"-{process.pid}-")
    lines = [line.split() for line in output.splitlines()]
    assert len(lines) == 2
    for segment, semaphores, place in lines:
        assert segment.startswith(own) and semaphores == f"/{own}" and own in place
        assert not Path(place).exists()
