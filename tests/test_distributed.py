"""The multi-process helper itself: a test that hangs or fails on one rank must say so, and leave no process behind.

Does not cover joining a process group; every test that uses the helper does.
"""

import os
import time
from pathlib import Path

import pytest

from tests.distributed import RankFailure, run_ranks


def who(offset: int) -> list[int]:
    return [int(os.environ["RANK"]) + offset, int(os.environ["WORLD_SIZE"])]


def fail_on_rank_one(directory: str) -> None:
    Path(directory, os.environ["RANK"]).write_text(str(os.getpid()))
    if os.environ["RANK"] == "1":
        while not Path(directory, "0").exists():
            time.sleep(0.01)
        raise ValueError("the reason")
    time.sleep(60)


def hang() -> None:
    time.sleep(60)


REMEMBERED: list[str] = []


def remember() -> tuple[list[str], int]:
    """What earlier calls have left, and the process that this rank's parent was forked from."""
    before = [*REMEMBERED]
    REMEMBERED.append("called")
    parent = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1]
    return before, int(parent)


def test_results_come_back_by_rank() -> None:
    assert run_ranks("tests.test_distributed:who", 3, {"offset": 10}, timeout=30) == [[10, 3], [11, 3], [12, 3]]


def test_one_failure_ends_all_ranks_and_shows_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match=r"rank 1 failed(.|\n)*ValueError: the reason"):
        run_ranks("tests.test_distributed:fail_on_rank_one", 2, {"directory": str(tmp_path)}, timeout=30)
    assert _gone(int((tmp_path / "0").read_text()))


def test_a_deadline_names_the_ranks_that_hang() -> None:
    with pytest.raises(RankFailure, match=r"after 2 s these ranks were not done: \[0, 1\]"):
        run_ranks("tests.test_distributed:hang", 2, timeout=2)


def test_calls_share_imports_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank is forked from a process that the calls before it have not changed, unless the environment is another."""
    (first, first_parent), (second, second_parent) = (
        run_ranks("tests.test_distributed:remember", 1, timeout=30)[0] for _ in range(2)
    )
    assert (first, second) == ([], [])
    assert first_parent == second_parent
    monkeypatch.setenv("FIPO_TEST_OTHER", "environment")
    assert run_ranks("tests.test_distributed:remember", 1, timeout=30)[0][1] != first_parent


def test_a_module_that_cannot_be_imported_is_quoted() -> None:
    with pytest.raises(RankFailure, match=r"tests.no_such_module could not be imported:(.|\n)*ModuleNotFoundError"):
        run_ranks("tests.no_such_module:function", 1)


def _gone(process_id: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False
