"""Where a run's checkpoints lie: complete ones as step-000010, all else under names that begin with a dot."""

import os
import re
import shutil
import stat
import threading
from pathlib import Path

from megatron_fipo.errors import CheckpointError

_COMPLETE = re.compile(r"step-([0-9]{6,10})")  # no run has more steps than ten digits


def place_of(directory: Path, step: int) -> Path:
    """Where the checkpoint after so many steps lies when it is complete."""
    return directory / f"step-{step:06d}"


def unfinished(checkpoint: Path) -> Path:
    """Where a checkpoint lies before it is complete."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def newest(directory: Path) -> Path | None:
    """The complete checkpoint of the highest step in a run's checkpoint directory, or None."""
    found = complete(directory)
    return found[-1] if found else None


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints in a run's directory of them, by step."""
    if not directory.is_dir():
        return []
    matches = [(match, path) for path in directory.iterdir() if (match := _COMPLETE.fullmatch(path.name))]
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches)]


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def files_of(checkpoint: Path) -> dict[str, int]:
    """Sizes of all files at any depth, by their names from `checkpoint` on.

    Raises:
        CheckpointError: something is neither a file nor a directory: a link leads out of the checkpoint, and whoever
            opens a pipe waits for ever.
        OSError: a directory cannot be read.
    """
    sizes: dict[str, int] = {}
    directories = [checkpoint]
    while directories:
        for entry in os.scandir(directories.pop()):
            path, found = Path(entry.path), entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                directories.append(path)
            elif stat.S_ISREG(found.st_mode):
                sizes[path.relative_to(checkpoint).as_posix()] = found.st_size
            else:
                kind = "a link" if stat.S_ISLNK(found.st_mode) else "a pipe, a socket or a device"
                raise CheckpointError(f"{path.relative_to(checkpoint)} is {kind}, and should be a file")
    return sizes


def remove(checkpoint: Path) -> None:
    """Remove a complete checkpoint, which is never seen half removed; its bytes go later. Raises OSError."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    # Large files take a while. At its end a process waits for this thread.
    threading.Thread(target=shutil.rmtree, args=(doomed,), kwargs={"ignore_errors": True}).start()


def remove_all_but(directory: Path, keep: int) -> None:
    """Remove all complete checkpoints but the `keep` newest; 0 keeps all. Raises OSError."""
    for old in complete(directory)[:-keep] if keep else ():
        remove(old)
