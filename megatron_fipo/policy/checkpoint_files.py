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
from collections.abc import Callable, Sequence
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
from megatron_fipo.processes.ending import die_with_parent

_NO_LIMIT_S = 1e6
"""For processes whose parent is itself waited for with a deadline, and takes them along when it ends."""

_NICENESS = 5
"""Added by each process to its parent's: training goes first where there are too few cores for both."""


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

    def and_also(self, other: "Written") -> "Written":
        """Both together."""
        return Written(self.results + other.results, self.digests | other.digests)


Job = Callable[[], Written]
"""Writes something and says what. Raises OSError where it cannot."""


class FileWriters:
    """The processes that write some files of a checkpoint."""

    def __init__(self, directory: Path, jobs: Sequence[Job]):
        """Start a process for each of `jobs`: the first one's, which starts the others.

        A fork of a rank takes as long as its page tables are large, and training waits for this one.

        Args:
            directory: what errors name where no file is known.
        """
        self._directory = directory
        self._started = [_start(directory, jobs)] if jobs else []

    def are_done(self) -> bool:
        """Whether every process has answered or ended."""
        return all(answer.poll() for _, answer in self._started)

    def wait(self, timeout_s: float) -> Written:
        """What they wrote.

        Raises:
            CheckpointError: one could not write, was killed, or is not done after `timeout_s`, and all have ended.
        """
        deadline = time.monotonic() + timeout_s
        written = Written((), {})
        try:
            for process, answer in self._started:
                written = written.and_also(self._answer(process, answer, max(deadline - time.monotonic(), 0)))
        except BaseException:
            self.end()
            raise
        # They have only to end, which takes them a while and nobody waits for.
        self._started = []
        return written

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


def digest_of(path: Path) -> Digest:
    """Read a file for its digest. Raises OSError."""
    checksum, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(1 << 20))
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
            size += count
    return Digest(size, checksum.hexdigest())


def _start(directory: Path, jobs: Sequence[Job]) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("fork")
    answer, says = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(says, os.getpid(), directory, jobs))
    process.start()
    says.close()
    return process, answer


def _run(says: Connection, parent: int, directory: Path, jobs: Sequence[Job]) -> None:
    """Do the first of the jobs while other processes do the rest, and say what came of all."""
    gc.disable()  # what it collected here could be the GPU's, which belongs to the rank
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)
    os.nice(_NICENESS)
    others = FileWriters(directory, jobs[1:])
    try:
        said: Written | str = jobs[0]().and_also(others.wait(_NO_LIMIT_S))
    except CheckpointError as error:
        said = str(error)
    except OSError as error:
        said = _space_error(directory, error)
    except Exception as error:
        said = f"{directory} could not be written: {one_line(error)}"
    others.end()
    says.send(said)


def write_file(path: Path, items: Sequence[Item]) -> Written:
    """Write a file of tensors, and flush it to the disk. Raises OSError, which names it."""
    try:
        with path.open("wb") as file:
            stream = _Hashing(file)
            results = tuple(_append(stream, path.name, item, data) for item, data in items)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return Written(results, {path.name: Digest(stream.tell(), stream.checksum.hexdigest())})


def _append(stream: "_Hashing", name: str, item: Any, data: Any) -> WriteResult:
    file: Any = stream
    try:
        return _write_item(_StorageWriterTransforms(), file, _alone(data), item, name, SerializationFormat.TORCH_SAVE)
    except Exception:
        if stream.failure is not None:  # torch tells of its own confusion instead
            raise stream.failure from None
        raise


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


def _space_error(directory: Path, error: OSError) -> str:
    """One line for what could not be written, with the space that is left if that is the reason."""
    said = f"{error.filename or directory} could not be written: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        said += f" ({shutil.disk_usage(directory).free / 2**30:.2f} GiB are free)"
    return said
