"""The processes of one vLLM server that is started here: begun with its token, ended with all that they started."""

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Set
from pathlib import Path

import psutil

from megatron_fipo.engines.early_server import PARENT_VARIABLE
from megatron_fipo.processes.leftovers import SHARED_MEMORY

STOP_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


def start_process(arguments: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Starts `python -m megatron_fipo.engines.server ARGUMENTS`, its output appended to `log`.

    It ends with the thread that calls this.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_fipo.engines.server", *arguments],
            env=environment | {PARENT_VARIABLE: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C in a terminal reaches its whole process group; the servers end when we close them.
            start_new_session=True,
        )


def end_processes(
    processes: list[subprocess.Popen[bytes]], segments: Set[Path] = frozenset(), *, at_once: bool = False
) -> None:
    """SIGTERM to each server, then SIGKILL to whatever is left of its process tree after STOP_TIMEOUT_S.

    Afterwards their shared memory is deleted: what they have in use, and `segments`, which those that are dead already
    had. `at_once` leaves the SIGTERM out, for servers that have nothing to lose.
    """
    trees = [member for process in processes for member in family(process)]
    shared = shared_files(trees) | segments
    alive = trees
    if not at_once:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        _, alive = psutil.wait_procs(trees, timeout=STOP_TIMEOUT_S)
        for straggler in alive:
            logger.warning("process %d of a vLLM server did not end in time and is killed", straggler.pid)
    for straggler in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            straggler.kill()
    psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)
    for process in processes:
        process.poll()
    # A killed process leaves its segments, and memory in them is gone until somebody deletes them.
    for path in shared:
        path.unlink(missing_ok=True)


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A server and all processes that it started; none if it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    return []


def shared_files(processes: list[psutil.Process]) -> set[Path]:
    """The shared-memory segments that vLLM's processes have in use among themselves."""
    files: set[Path] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            files.update(Path(mapping.path) for mapping in process.memory_maps())
    return {path for path in files if path.parent == SHARED_MEMORY}
