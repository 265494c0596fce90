"""Which directory a run has, and what it goes on from there. On rank 0, which tells the others."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.config import RunConfig
from megatron_fipo.errors import CheckpointError, FipoError
from megatron_fipo.leftovers import remove_outside, remove_partial_files, say_removed
from megatron_fipo.policy.checkpoint_places import files_of, newest
from megatron_fipo.tracking.metrics import METRICS_FILE
from megatron_fipo.tracking.run_lock import RunLock

_DIRECTORIES = ("samples", "tensorboard", "validation")
"""What a run writes to after a while, and must not end then. Checkpoints and what lies beside them may be missing."""


@dataclass(frozen=True)
class RunDirectory:
    """What rank 0 found in a run's place on storage that all ranks share."""

    lock: RunLock
    """What keeps other runs out."""
    resume_from: Path | None
    """The checkpoint that the run goes on from."""


def take_directory(config: RunConfig, stack: ExitStack) -> RunDirectory:
    """Make the run's directory if need be, and keep other runs out of it until `stack` is left.

    Raises:
        FipoError: another run has it, it holds one that `run.resume` does not go on from, or something in the
            checkpoint to go on from is no file.
    """
    path = Path(config.directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FipoError(f"run.directory={path} cannot be made: {error}") from error
    for place in (path / name for name in _DIRECTORIES):
        if place.exists() and not place.is_dir():
            raise FipoError(f"{place} is no directory: move it away, or give another run.directory")
    lock = stack.enter_context(RunLock(path, lambda text: print(text, flush=True)))
    say_removed(path, remove_partial_files(path) + remove_outside(path))
    found = newest(path / "checkpoints")
    if config.resume == "never" and (found or (path / METRICS_FILE).exists()):
        raise FipoError(f"{path} already holds a run (give another run.directory, or run.resume=auto)")
    resume_from = found if config.resume == "auto" else None
    if resume_from is not None:
        try:
            files_of(resume_from)
        except (OSError, CheckpointError) as error:
            raise CheckpointError(f"{resume_from}: cannot be resumed from: {error}") from None
    return RunDirectory(lock, resume_from)
