"""A checkpoint on its way to the disk: begun by all ranks, written by processes beside them, committed by a rename.

Whatever fails on one rank fails on all, leaves nothing of this checkpoint and all of the one before.
"""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed

from megatron_fipo.errors import CheckpointError
from megatron_fipo.files import sync, write_atomically, write_json_atomically
from megatron_fipo.policy import checkpoint_manifest
from megatron_fipo.policy.checkpoint_files import FileWriters, Job, Written, write_file
from megatron_fipo.policy.checkpoint_places import place_of, remove, remove_all_but, unfinished
from megatron_fipo.policy.save_plan import SavePlan
from megatron_fipo.policy.together import no_garbage_collection, together
from megatron_fipo.weights.distributed_checkpoint import FORMAT

_T = TypeVar("_T")
_GIB = 2**30


class Saving:
    """One checkpoint. Every rank calls each method together, but for `abandon`."""

    def __init__(self, directory: Path, step: int, keep: int, timeout_s: float):
        """Nothing is done yet.

        Args:
            directory: the run's checkpoint directory.
            keep: newest checkpoints to leave there in the end; 0 leaves all.
            timeout_s: longest wait for the writing, which other ranks spend in a collective of that timeout.
        """
        self.target = place_of(directory, step)
        self.partial = unfinished(self.target)
        self._directory, self._step, self._keep = directory, step, keep
        self._timeout_s = 0.9 * timeout_s
        self._first = torch.distributed.get_rank() == 0
        self._bytes = 0
        self._plan: SavePlan | None = None
        self._writers: FileWriters | None = None

    def start(self, plan: SavePlan, write_small_files: Callable[[Path], None]) -> None:
        """Begin to write; what the plan holds may change afterwards.

        Args:
            plan: this rank's part.
            write_small_files: writes into the given directory what no rank's plan has; called in a process of rank 0.

        Raises:
            CheckpointError: there is no space for it, or something cannot be written.
        """
        total = torch.tensor([plan.nbytes], dtype=torch.int64)
        torch.distributed.all_reduce(total)
        self._bytes = int(total.item())
        self._plan = replace(plan, files=())  # which the writers hold while they need it, and this process does not
        self._guarded(self._make_room)
        rank = torch.distributed.get_rank()
        jobs: list[Job] = [
            partial(write_file, self.partial / f"__{rank}_{number}.distcp", items)
            for number, items in enumerate(plan.files)
        ]
        if self._first:
            jobs.append(partial(_write_small_files, self.partial, plan.common, write_small_files))
        self._guarded(lambda: self._write(jobs))

    def is_written(self) -> bool:
        """Whether `finish` would not have to wait for any rank's writing."""
        assert self._writers is not None
        done = torch.tensor([self._writers.are_done()], dtype=torch.int64)
        torch.distributed.all_reduce(done, op=torch.distributed.ReduceOp.MIN)
        return bool(done.item())

    def finish(self) -> Path:
        """Wait for what is being written, and put the checkpoint in its place.

        Returns:
            The complete checkpoint.

        Raises:
            CheckpointError: something could not be written.
        """
        writers = self._writers
        assert writers is not None
        mine = self._guarded(lambda: writers.wait(self._timeout_s))
        with no_garbage_collection():
            gathered: list[Written] = [mine] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, mine)
            self._guarded(lambda: self._commit(gathered))
        return self.target

    def abandon(self) -> None:
        """End this rank's writing; what is left of it is removed by the next save."""
        if self._writers is not None:
            self._writers.end()

    def _guarded(self, work: Callable[[], _T]) -> _T:
        try:
            return together(f"step {self._step} is not saved ({self._bytes / _GIB:.2f} GiB)", work)
        except CheckpointError:
            self.abandon()
            torch.distributed.barrier()  # nobody writes any more
            if self._first:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def _make_room(self) -> None:
        if not self._first:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.partial, ignore_errors=True)
        free = shutil.disk_usage(self._directory).free
        if free < self._bytes:
            raise CheckpointError(
                f"no space left in {self._directory}: {self._bytes / _GIB:.2f} GiB are needed, "
                f"{free / _GIB:.2f} GiB are free"
            )
        self.partial.mkdir()

    def _write(self, jobs: Sequence[Job]) -> None:
        self._writers = FileWriters(self.partial, jobs)

    def _commit(self, gathered: list[Written]) -> None:
        if not self._first:
            return
        assert self._plan is not None
        self._plan.write_metadata([list(written.results) for written in gathered])
        digests = {name: digest for written in gathered for name, digest in written.digests.items()}
        checkpoint_manifest.write(self.partial, digests)
        if self.target.exists():  # of a run that went back to an older checkpoint
            remove(self.target)
        self.partial.rename(self.target)
        sync(self._directory)
        with contextlib.suppress(OSError):  # this one is saved; the next save tries again
            remove_all_but(self._directory, self._keep)


def _write_small_files(directory: Path, common: bytes | None, write: Callable[[Path], None]) -> Written:
    write(directory)
    write_json_atomically(directory / "metadata.json", FORMAT)
    if common is not None:
        write_atomically(directory / "common.pt", common)
    return Written((), {})
