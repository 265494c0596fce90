"""Writes a rank's files of a checkpoint in processes of its own, with a checksum of each.

They are forked, so that they begin at once with what the rank has in memory at that moment: on the CPU the fork itself
is the copy, page by page as training goes on. They use neither the GPU nor the process group, end with their rank, and
answer with what they wrote or with the error that stopped them.
"""

import errno
import gc
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.storage import WriteResult

from megatron_fipo.errors import CheckpointError, one_line
from megatron_fipo.policy.save_plan import Item
from megatron_fipo.processes import die_with_parent

@dataclass(frozen=True)
class Digest:
    """Size in bytes and checksum of a file."""

    size: int
    checksum: str
    """XXH3 of 128 bits, in hexadecimal digits."""


@dataclass(frozen=True)
class Written:
    """What a process has written, or a rank's processes together."""

    results: tuple[WriteResult, ...]
    """Where torch's metadata has to look for each tensor."""
    digests: dict[str, Digest]
    """By the files' names."""


class FileWriters:
    """The processes that write some files of a checkpoint."""

    def __init__(self, directory: Path, files: Sequence[tuple[str, Sequence[Item]]]):
        """Start a process for each of `files`, a name and what goes into it."""
        self._directory = directory
        self._started = [_start(directory, name, items) for name, items in files]

    def are_done(self) -> bool:
        """Whether every process has answered or ended."""
        return all(answer.poll() for _, answer in self._started)

    def wait(self, timeout_s: float) -> Written:
        """What they wrote.

        Raises:
            CheckpointError: one could not write, was killed, or is not done after `timeout_s`, and all have ended.
        """
        deadline = time.monotonic() + timeout_s
        results: list[WriteResult] = []
        digests: dict[str, Digest] = {}
        try:
            for process, answer in self._started:
                written = self._answer(process, answer, max(deadline - time.monotonic(), 0))
                results += written.results
                digests |= written.digests
        finally:
            self.end()
        return Written(tuple(results), digests)

    def end(self) -> None:
        """End the processes, done or not."""
        for process, answer in self._started:
            process.kill()
            process.join()
            answer.close()
        self._started = []

    def _answer(self, process: Any, answer: Connection, timeout_s: float) -> Written:
        if not answer.poll(timeout_s):
            raise CheckpointError(f"{self._directory} is not written after {timeout_s:.0f} s")
        try:
            found = answer.recv()
        except EOFError:
            process.join()
            raise CheckpointError(
                f"the process that writes to {self._directory} ended with status {process.exitcode}"
                f"{', perhaps for lack of memory' if process.exitcode == -signal.SIGKILL else ''}"
            ) from None
        if isinstance(found, Written):
            return found
        raise CheckpointError(found)


def space_error(path: Path, error: OSError) -> str:
    """One line for a file that could not be written, with the space that is left if that is the reason."""
    said = f"{error.filename or path} could not be written: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        said += f" ({shutil.disk_usage(path.parent).free / 2**30:.2f} GiB are free)"
    return said


def digest_of(path: Path) -> Digest:
    """Read a file for its digest. Raises OSError."""
    checksum, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(1 << 20))
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
            size += count
    return Digest(size, checksum.hexdigest())


def _start(directory: Path, name: str, items: Sequence[Item]) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("fork")
    answer, says = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(says, os.getpid(), directory / name, items), daemon=True)
    process.start()
    says.close()
    return process, answer


def _run(says: Connection, rank_process: int, path: Path, items: Sequence[Item]) -> None:
    """Write the file, and say what came of it."""
    gc.disable()  # what it collected here could be the GPU's, which belongs to the rank
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(rank_process)
    try:
        said: Written | str = _write(path, items)
    except OSError as error:
        said = space_error(path, error)
    except Exception as error:
        said = f"{path} could not be written: {one_line(error)}"
    says.send(said)


def _write(path: Path, items: Sequence[Item]) -> Written:
    transforms = _StorageWriterTransforms()
    results = []
    with path.open("wb") as file:
        stream = _Hashing(file)
        for item, data in items:
            kept = _alone(data)
            try:
                results.append(
                    _write_item(transforms, stream, kept, item, path.name, SerializationFormat.TORCH_SAVE)  # type: ignore[arg-type]
                )
            except Exception:
                if stream.failure is not None:  # torch tells of its own confusion instead
                    raise stream.failure from None
                raise
        file.flush()
        os.fsync(file.fileno())
    return Written(tuple(results), {path.name: Digest(stream.tell(), stream.checksum.hexdigest())})


def _alone(data: Any) -> Any:
    """A tensor in a storage of its own: all of a storage would be written, whatever part of it is the tensor."""
    if isinstance(data, torch.Tensor) and data.untyped_storage().nbytes() != data.nbytes:
        return data.clone()
    return data


class _Hashing:
    """A file to write from front to back, with a checksum of what has been written, and its failure if there is one."""

    def __init__(self, file: Any):
        self.checksum = xxhash.xxh3_128()
        self.failure: OSError | None = None
        self._file, self._size = file, 0

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self.checksum.update(data)
        view = memoryview(data)
        self._size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()
