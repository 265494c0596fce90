"""Runs a function on several gloo ranks: `run_ranks("package.module:function", world_size, arguments)`.

The ranks are forked from one process that has imported the function's module, so that megatron is imported once and not
once a rank. They are real processes with their own process group, sockets and output.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class RankFailure(AssertionError):
    """A rank failed or the deadline passed; the message has the output of the first rank that failed."""


def run_ranks(
    function: str, world_size: int, arguments: dict[str, Any] | None = None, timeout: float = 120
) -> list[Any]:
    """Call `module:function(**arguments)` on every rank and return what each returned, by rank.

    Arguments and results travel as JSON. RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set; joining the process
    group is the function's own business. After `timeout` seconds, or when one rank fails, all its processes are
    killed.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        command = [sys.executable, "-m", "tests.distributed_worker", function, str(world_size), directory]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONFAULTHANDLER": "1",
        }
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(json.dumps(arguments or {}), timeout=timeout)
        except subprocess.TimeoutExpired:
            waiting = [rank for rank in range(world_size) if not _result_path(directory, rank).exists()]
            tails = "\n".join(f"--- rank {rank}:\n{_tail(directory, rank)}" for rank in waiting)
            raise RankFailure(f"{function}: after {timeout} s these ranks were not done: {waiting}\n{tails}") from None
        finally:
            _kill_group(process)
        if process.returncode != 0:
            failed = Path(directory, "failed")
            if not failed.exists():
                raise RankFailure(f"{function} could not be started:\n{output}")
            rank, status = failed.read_text().split()
            raise RankFailure(f"{function}: rank {rank} failed with status {status}:\n{_tail(directory, int(rank))}")
        return [json.loads(_result_path(directory, rank).read_text()) for rank in range(world_size)]


def _kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _result_path(directory: str, rank: int) -> Path:
    return Path(directory, f"rank-{rank}.json")


def _tail(directory: str, rank: int, lines: int = 60) -> str:
    path = Path(directory, f"rank-{rank}.log")
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(no output)"
