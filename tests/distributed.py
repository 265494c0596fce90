"""Runs a function on several gloo ranks: `run_ranks("package.module:function", world_size, arguments)`.

The ranks are forked from one process that has imported the function's module, and serves the next call too: importing
megatron takes longer than most functions do. They are real processes with their own process group, sockets and output.
"""

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMPORT_TIMEOUT_S = 120
KEPT = 2
"""Workers that are kept: each holds what it has imported, and a test file asks for one or two modules."""


class RankFailure(AssertionError):
    """A rank failed or the deadline passed; the message has the output of the first rank that failed."""


def run_ranks(
    function: str,
    world_size: int,
    arguments: dict[str, Any] | None = None,
    timeout: float = 120,
    worker_of: str | None = None,
) -> list[Any]:
    """Call `module:function(**arguments)` on every rank and return what each returned, by rank.

    Arguments and results travel as JSON. RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set; joining the process
    group is the function's own business. After `timeout` seconds, or when one rank fails, all its processes are
    killed. The worker is that of the function's module, or of the module `worker_of`, which some test has asked for.
    """
    worker = _worker(worker_of or function.split(":")[0])
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        request = {"function": function, "world_size": world_size, "arguments": arguments or {}, "directory": directory}
        try:
            status = worker.call(request, timeout)
        except TimeoutError:
            waiting = [rank for rank in range(world_size) if not _result_path(directory, rank).exists()]
            tails = "\n".join(f"--- rank {rank}:\n{_tail(directory, rank)}" for rank in waiting)
            raise RankFailure(f"{function}: after {timeout} s these ranks were not done: {waiting}\n{tails}") from None
        except EOFError:
            raise RankFailure(f"{function}: the process that forks the ranks ended:\n{worker.output()}") from None
        if status != 0:
            failed = Path(directory, "failed")
            if not failed.exists():
                raise RankFailure(f"{function} could not be started:\n{worker.output()}")
            rank, code = failed.read_text().split()
            raise RankFailure(f"{function}: rank {rank} failed with status {code}:\n{_tail(directory, int(rank))}")
        return [json.loads(_result_path(directory, rank).read_text()) for rank in range(world_size)]


class Worker:
    """A process that has imported `module` under this process's environment, and forks ranks when it is asked."""

    def __init__(self, module: str, environment: dict[str, str]):
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed_worker", module],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        try:
            self._answer(IMPORT_TIMEOUT_S)
        except TimeoutError:
            self.close()
            raise RankFailure(f"{module} was not imported after {IMPORT_TIMEOUT_S} s:\n{self.output()}") from None
        except EOFError:
            self.close()
            raise RankFailure(f"{module} could not be imported:\n{self.output()}") from None

    @property
    def is_there(self) -> bool:
        return self._process.poll() is None

    def call(self, request: dict[str, Any], timeout: float) -> int:
        """The exit status of a request's ranks, all of whose processes are gone then. TimeoutError after `timeout`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        group = int(self._answer(IMPORT_TIMEOUT_S))
        try:
            return int(self._answer(timeout))
        except BaseException:
            self.close()  # what it answers next would be of this request
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    def output(self) -> str:
        """What the process itself has printed so far."""
        self._output.seek(0)
        return self._output.read()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        with self._process:  # waits for it and closes its pipes
            pass

    def _answer(self, timeout: float) -> str:
        """The next line that the process answers. EOFError when it has ended."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                raise TimeoutError
        if not (line := self._process.stdout.readline()):
            raise EOFError
        return line


_workers: dict[str, Worker] = {}


def _worker(module: str) -> Worker:
    """The worker of this module and of the environment as it is now, the latest of those that are kept."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONFAULTHANDLER": "1",
    }
    key = json.dumps([module, environment], sort_keys=True)
    worker = _workers.pop(key, None)
    if worker is None or not worker.is_there:
        worker = Worker(module, environment)
    _workers[key] = worker
    while len(_workers) > KEPT:
        _workers.pop(next(iter(_workers))).close()
    return worker


@atexit.register
def _close_workers() -> None:
    for worker in _workers.values():
        worker.close()


def _result_path(directory: str, rank: int) -> Path:
    return Path(directory, f"rank-{rank}.json")


def _tail(directory: str, rank: int, lines: int = 60) -> str:
    path = Path(directory, f"rank-{rank}.log")
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(no output)"
