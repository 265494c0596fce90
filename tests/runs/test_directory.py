"""Why: what a run goes on from is looked at before anything of it is opened, whether its checksums are or not.

Not covered: who keeps whom out of a directory (tracking/test_run_lock.py), and whole runs (end_to_end/test_stops.py).
"""

import os
import re
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import Config, RunConfig
from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import FipoError
from megatron_fipo.runs.directory import Start, keep_settings, look, take_directory


def resumed_from(directory: Path) -> Path | None:
    """The checkpoint that a run in `directory` goes on from."""
    with ExitStack() as stack:
        return take_directory(Config(run=RunConfig(directory=str(directory))), stack).start.resume_from


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
    with pytest.raises(FipoError, match=rf"run\.directory: .*{name} is not a directory \(move it away"):
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


def begun_with(directory: Path, step: int, *overrides: str) -> None:
    """What a run leaves that began with these settings and has a checkpoint of `step`."""
    checkpoint = directory / "checkpoints" / f"step-{step:06d}"
    checkpoint.mkdir(parents=True)
    keep_settings(load_config(overrides), directory, 0, Start(None, {}, ()))


def judged(directory: Path, *overrides: str) -> Start:
    """What rank 0 says of a resume with these settings; a launcher has to agree."""
    config = load_config([*overrides, f"run.directory={directory}"])
    with ExitStack() as stack:
        try:
            look(config)
        except FipoError as error:
            with pytest.raises(FipoError, match=re.escape(str(error))):
                take_directory(config, stack)
            raise
        return take_directory(config, stack).start


def test_other_settings_are_refused_or_kept_beside_the_first(tmp_path: Path) -> None:
    begun_with(tmp_path, 2, "optimizer.lr=1e-5")
    lr, taken = "optimizer.lr=1e-6", "run.resume_changed=true"
    assert judged(tmp_path, "optimizer.lr=1e-5").changed == {}
    with pytest.raises(FipoError, match=r"was trained with other settings: optimizer\.lr: 1e-05 → 1e-06 \("):
        judged(tmp_path, lr)
    start = judged(tmp_path, lr, taken)
    assert start.warnings == ("resumes with other settings from step 2: optimizer.lr: 1e-05 → 1e-06",)
    keep_settings(load_config([lr]), tmp_path, 2, start)
    assert "lr: 1.0e-05" in (tmp_path / "config.yaml").read_text()
    assert "lr: 1.0e-06" in (tmp_path / "config-000002.yaml").read_text()
    # From now on these are the checkpoint's settings, and the first ones are a change.
    assert judged(tmp_path, lr).changed == {}
    (tmp_path / "checkpoints" / "step-000004").mkdir()
    assert judged(tmp_path, lr).changed == {}
    with pytest.raises(FipoError, match="1e-06 → 1e-05"):
        judged(tmp_path, "optimizer.lr=1e-5")
    # But not of a checkpoint from before them.
    (tmp_path / "config-000002.yaml").rename(tmp_path / "config-000003.yaml")
    (tmp_path / "checkpoints" / "step-000004").rmdir()
    assert judged(tmp_path, "optimizer.lr=1e-5").changed == {}


def test_many_differences_are_one_line_still(tmp_path: Path) -> None:
    begun_with(tmp_path, 2)
    with pytest.raises(FipoError, match=r"run\.seed: 0 → 1; .*; and 1 more \(give the same") as refused:
        judged(tmp_path, "run.seed=1", "algorithm=dapo", "optimizer=recipe", "reward=recipe")
    assert refused.value.exit_code == 2, "a job must not try it again"


@pytest.mark.parametrize("content", [None, "[1]\n", "{"])
def test_a_run_whose_settings_cannot_be_read_goes_on_with_a_warning(tmp_path: Path, content: str | None) -> None:
    sound(tmp_path)
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    (warning,) = judged(tmp_path).warnings
    assert "config.yaml" in warning and "would not be noticed" in warning


def test_a_launcher_makes_nothing(tmp_path: Path) -> None:
    look(load_config([f"run.directory={tmp_path / 'new'}"]))
    look(load_config([f"run.directory={tmp_path}"]))
    assert list(tmp_path.iterdir()) == []


def test_what_a_start_without_a_checkpoint_has_left_is_kept(tmp_path: Path) -> None:
    keep_settings(load_config(["run.seed=1"]), tmp_path, 0, Start(None, {}, ()))
    for name in ("metrics.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text('{"step": 0}\n')
    (warning,) = keep_settings(load_config(["run.seed=2"]), tmp_path, 0, Start(None, {}, ()))
    kept = sorted(path.name for path in tmp_path.glob("*-*"))
    assert [name.partition("-")[0] for name in kept] == ["config", "metrics", "validation"]
    assert all(name in warning for name in kept)
    assert "seed: 1" in (tmp_path / kept[0]).read_text() and "seed: 2" in (tmp_path / "config.yaml").read_text()
    assert (tmp_path / kept[1]).read_text() == '{"step": 0}\n'
    assert not (tmp_path / "metrics.jsonl").exists()
    # Nothing was written since: nothing is kept.
    assert keep_settings(load_config([]), tmp_path, 0, Start(None, {}, ())) == []
