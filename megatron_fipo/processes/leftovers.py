"""Name and remove the shared memory and sockets that a run creates outside its directory.

A killed process cannot remove them. Each name begins with a hash of the run's directory and the id of the process that
created it. Once that process is dead, nobody needs them, and the next run in the same directory removes them.
"""

import contextlib
import hashlib
import multiprocessing
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import psutil

SHARED_MEMORY = Path("/dev/shm")
NAMES_VARIABLE = "FIPO_NAMES"
"""Variable that tells a run's servers how to name their shared memory."""

# Files of write_atomically, and a checkpoint that is being written or removed.
_PARTIAL = re.compile(r"\..+\.\d+\.partial|\.step-\d+(\.removed)?\.partial")
_PARTIAL_PLACES = (".", "samples", "credit", "validation", "checkpoints", "huggingface")
_CLOCKS_S = 60.0
_LONGEST_SOCKET_PATH = 107
_RANDOM_CHARACTERS = 8


def prefix(run_directory: Path) -> str:
    """Return the beginning of all names that this process creates outside the directory of its run."""
    return f"{_of_run(run_directory)}{os.getpid()}-"


def _of_run(run_directory: Path) -> str:
    return f"megatron_fipo-{hashlib.sha256(str(run_directory.resolve()).encode()).hexdigest()[:12]}-"


def remove_partial_files(run_directory: Path) -> list[Path]:
    """Remove the partial files of dead runs in this directory, which only the caller uses now. Return their paths."""
    found = [path for place in _PARTIAL_PLACES for path in (run_directory / place).glob(".*.partial")]
    return _remove(path for path in found if _PARTIAL.fullmatch(path.name))


def remove_outside(run_directory: Path) -> list[Path]:
    """Remove what dead processes of runs in this directory have left on this machine. Return the paths.

    Call it before this process creates anything there itself.
    """
    own, left = re.compile(rf"(?:sem\.)?{_of_run(run_directory)}(\d+)-.*"), []
    for place in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        for path in place.glob(f"*{_of_run(run_directory)}*"):
            if (match := own.fullmatch(path.name)) and _is_left(path, int(match[1])):
                left.append(path)
    return _remove(left)


def say_removed(run_directory: Path, removed: list[Path]) -> None:
    """Print one line about the removed files, if there are any."""
    if not removed:
        return
    places = Counter(path.parent for path in removed)
    where = ", ".join(f"{count} in {place}" for place, count in sorted(places.items()))
    print(f"removed what a killed run in {run_directory} had left: {where}", flush=True)


def _is_left(path: Path, pid: int) -> bool:
    """Return whether it is this user's and its process is dead: it is gone, or a younger process has its id."""
    try:
        found = path.lstat()
        if found.st_uid != os.getuid():
            return False
        return pid == os.getpid() or psutil.Process(pid).create_time() > found.st_mtime + _CLOCKS_S
    except psutil.NoSuchProcess:
        return True
    except OSError:  # it has been removed meanwhile
        return False


def _remove(paths: Iterator[Path] | list[Path]) -> list[Path]:
    removed = []
    for path in paths:
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(path)
    return removed


@contextlib.contextmanager
def own_place(run_directory: Path) -> Iterator[Path]:
    """Provide a directory for sockets and other files of this process and its servers. It is removed at the end.

    From now on, what multiprocessing creates in this process and its children is named after the run too.
    """
    place = Path(tempfile.mkdtemp(prefix=prefix(run_directory)))
    _settings_of_multiprocessing()["tempdir"] = str(place)
    name_shared_memory(prefix(run_directory))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def server_names(run_directory: Path, place: Path) -> dict[str, str]:
    """Return variables that put a server's sockets into `place` and name its shared memory after this process.

    TMPDIR is not set, so a few other, empty temporary files stay in the usual place. With TMPDIR set, a restarted
    engine did not answer for longer than `rollout.hang_timeout_s`.
    """
    usual = tempfile.gettempdir()
    fits = len(str(place)) + 1 + 36 <= _LONGEST_SOCKET_PATH  # vLLM's sockets are named by UUIDs
    return {
        NAMES_VARIABLE: prefix(run_directory),
        "VLLM_RPC_BASE_PATH": str(place) if fits else usual,
    }


def name_shared_memory(beginning: str) -> None:
    """Make multiprocessing begin the names of shared memory and semaphores in this way, here and in children.

    There is no public setting for it. If another Python stores the names elsewhere, they stay as they are.
    """
    _settings_of_multiprocessing()["semprefix"] = f"/{beginning}"
    module: Any = shared_memory
    module._SHM_NAME_PREFIX = f"/{beginning}"
    module._SHM_SAFE_NAME_LENGTH = len(f"/{beginning}") + _RANDOM_CHARACTERS


def _settings_of_multiprocessing() -> dict[str, Any]:
    process: Any = multiprocessing.current_process()
    return process._config
