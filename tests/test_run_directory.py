"""Why: what a run goes on from is looked at before anything of it is opened, whether its checksums are or not.

Not covered: who keeps whom out of a directory (tracking/test_run_lock.py), and whole runs (end_to_end/test_stops.py).
"""

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import RunConfig
from megatron_fipo.errors import FipoError
from megatron_fipo.run_directory import take_directory


def resumed_from(directory: Path) -> Path | None:
    """The checkpoint that a run in `directory` goes on from."""
    with ExitStack() as stack:
        return take_directory(RunConfig(directory=str(directory)), stack).resume_from


def sound(directory: Path) -> Path:
    """As much of a checkpoint as is looked at."""
    checkpoint = directory / "checkpoints" / "step-000002"
    (checkpoint / "inner").mkdir(parents=True)
    for name in (".metadata", "trainer.json", "inner/file"):
        (checkpoint / name).touch()
    return checkpoint


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as place:
        place.bind(str(path))


def a_link_out(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("name", [".metadata", "trainer.json", "inner/file", "extra"])
@pytest.mark.parametrize("harm", [a_pipe, a_socket, a_link_out, a_link_to_itself])
def test_what_is_no_file_is_refused_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, harm: Callable[[Path], Any]
) -> None:
    checkpoint = sound(tmp_path)
    assert resumed_from(tmp_path) == checkpoint, "the control"
    (checkpoint / name).unlink(missing_ok=True)
    monkeypatch.chdir(checkpoint)  # a socket's path is short
    harm(Path(name))
    with pytest.raises(FipoError, match=f"step-000002: cannot be resumed from: {name} is a .*, and should be a file$"):
        resumed_from(tmp_path)


@pytest.mark.parametrize("name", ["samples", "tensorboard"])
def test_what_is_in_the_way_of_later_files_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(FipoError, match=f"{name} is no directory: move it away"):
        resumed_from(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert resumed_from(tmp_path) is None


def test_a_checkpoint_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-000002").touch()
    with pytest.raises(FipoError, match=r"step-000002: cannot be resumed from: .*Not a directory"):
        resumed_from(tmp_path)


@pytest.mark.parametrize("name", ["step-" + "9" * 20, "step-٩٩٩٩٩٩", "step-000009.old", "step-9"])
def test_what_no_run_has_named_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    checkpoint = sound(tmp_path)
    (tmp_path / "checkpoints" / name).mkdir()
    assert resumed_from(tmp_path) == checkpoint


def test_a_checkpoint_may_lie_elsewhere_as_a_whole(tmp_path: Path) -> None:
    checkpoint = sound(tmp_path)
    checkpoint.rename(tmp_path / "archive")
    checkpoint.symlink_to(tmp_path / "archive")
    assert resumed_from(tmp_path) == checkpoint
