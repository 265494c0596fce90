"""Which directory a run has, and what it goes on from there: rank 0 looks, takes it, and tells the others."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch.distributed

from megatron_fipo.config import RunConfig
from megatron_fipo.errors import FipoError
from megatron_fipo.policy import checkpoint
from megatron_fipo.tracking.metrics import METRICS_FILE
from megatron_fipo.tracking.run_lock import RunLock


@dataclass(frozen=True)
class RunDirectory:
    """A run's place on storage that all ranks share."""

    path: Path
    resume_from: Path | None
    """The checkpoint that the run goes on from."""
    lock: RunLock | None
    """What keeps other runs out; on rank 0, None elsewhere."""

    @property
    def step(self) -> int:
        """The step that the run goes on from, 0 for a fresh one."""
        return checkpoint.step_of(self.resume_from) if self.resume_from else 0


def take_directory(config: RunConfig, stack: ExitStack) -> RunDirectory:
    """Take the run's directory until `stack` is left; every rank calls this together.

    Rank 0's view for all: under torchrun and srun each rank has read its own clock for the directory's name, and on
    shared storage one node may see a checkpoint later than another.

    Raises:
        FipoError: on every rank alike, if another run has it, or holds one that `run.resume` does not go on from.
    """
    lock, told = None, ["", "", ""]
    if torch.distributed.get_rank() == 0:
        path = Path(config.directory)
        try:
            lock = _take(path, stack)
            found = _checkpoint(config, path)
            told = [str(path), str(found) if found else "", ""]
        except FipoError as error:
            told[2] = str(error)
    torch.distributed.broadcast_object_list(told, src=0)
    if told[2]:
        raise FipoError(told[2])
    return RunDirectory(Path(told[0]), Path(told[1]) if told[1] else None, lock)


def _take(path: Path, stack: ExitStack) -> RunLock:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FipoError(f"run.directory={path} cannot be made: {error}") from error
    return stack.enter_context(RunLock(path, lambda text: print(text, flush=True)))


def _checkpoint(config: RunConfig, path: Path) -> Path | None:
    found = checkpoint.newest(path / "checkpoints")
    if config.resume == "never" and (found or (path / METRICS_FILE).exists()):
        raise FipoError(f"{path} already holds a run (give another run.directory, or run.resume=auto)")
    return found if config.resume == "auto" else None
