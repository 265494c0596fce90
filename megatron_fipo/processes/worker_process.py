"""The parent's end of a worker process, in which code runs that may hang or crash: start, send, receive, kill.

Rewards and environments of the user's own run in such processes. JSON lines both ways, by processes/worker_child.py.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_fipo.errors import ConfigError, FipoError

_START_TIMEOUT_S = 120.0
_KILL_TIMEOUT_S = 10.0
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
# A worker handles text that a model wrote: it gets what Python needs to start, and no tokens or keys but those that the
# configuration names.
_INHERITED_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV")


class WorkerHung(Exception):
    """No answer within the deadline."""


class WorkerDied(Exception):
    """The process ended while it owed an answer."""


@dataclass(frozen=True)
class Job:
    """What a worker process is started for."""

    name: str
    """Completes "the … process", such as "verifier"."""
    key: str
    """The configuration's key of the code that it runs."""
    code: str
    """That key's value."""
    module: str
    """`python -m` of it; its first argument is the socket's descriptor."""
    arguments: Sequence[str]
    variables: Sequence[str]
    """Names of environment variables that it gets beside those that Python needs."""
    error: type[FipoError]
    """Raised where it cannot be started, or is asked for when it has been retired."""
    closed: str
    """What is said in the second case."""


class WorkerProcess:
    """One worker, restarted on demand. Used by one thread, except for `retire`."""

    def __init__(self, job: Job):
        self.job = job
        self.greeting: dict[str, Any] = {}
        """What it said of itself, once it has started."""
        self.lives = 0
        """How often it has been started: what it held in an earlier life is gone."""
        self._lock = threading.Lock()
        self._retired = False
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._connection: socket.socket | None = None
        self._received = b""

    def ensure_started(self, timeout_s: float = _START_TIMEOUT_S) -> None:
        """Starts the process unless it runs, and waits until it is warm.

        Raises:
            ConfigError: the code of the job cannot be used.
            FipoError: the job's `error`: the process does not come up, because of a WorkerHung or a WorkerDied.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.kill()
        with self._lock:
            if self._retired:
                raise self.job.error(self.job.closed)
            self._spawn()
        try:
            (started,) = self.receive(timeout_s)
        except (WorkerHung, WorkerDied) as error:
            output = self._last_stderr_line()
            self.kill()
            what = f"the {self.job.name} process for {self.job.key}={self.job.code}"
            raise self.job.error(f"{what} did not start in {timeout_s:.0f} s: {output}") from error
        if "refused" in started:
            self.kill()
            raise ConfigError(started["key"], started["refused"], started["remedy"])
        self.greeting = started
        self.lives += 1

    def _spawn(self) -> None:
        self._connection, theirs = socket.socketpair()
        self._received = b""
        # A file, since nobody reads a pipe while the process runs; closed in kill().
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        passed_on = (*_INHERITED_VARIABLES, *self.job.variables)
        environment = {name: os.environ[name] for name in passed_on if name in os.environ}
        search_path = [_PACKAGE_PARENT, os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, search_path))
        environment["OMP_NUM_THREADS"] = environment["OPENBLAS_NUM_THREADS"] = "1"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.job.module, str(theirs.fileno()), *self.job.arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
                # A group of its own, so that what code of the user's has started ends with it.
                process_group=0,
            )

    def send(self, items: list[dict[str, Any]], timeout_s: float) -> None:
        """Hands over a batch; the worker reads it whole before it works on it, so this never waits for an answer."""
        assert self._connection is not None
        self._connection.settimeout(timeout_s)
        try:
            self._connection.sendall(json.dumps(items).encode() + b"\n")
        except TimeoutError as error:
            raise WorkerHung from error
        except OSError as error:
            raise WorkerDied from error

    def receive(self, timeout_s: float) -> list[dict[str, Any]]:
        """The answers that have arrived, in order; waits for at least one, at most `timeout_s` seconds."""
        assert self._connection is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            self._connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                data = self._connection.recv(1 << 16)
            except TimeoutError as error:
                raise WorkerHung from error
            except OSError as error:
                raise WorkerDied from error
            if not data:
                raise WorkerDied
            self._received += data
        *lines, self._received = self._received.split(b"\n")
        return [_read(line) for line in lines]

    def kill(self) -> None:
        """Ends the process if there is one, whatever it is doing; it may be started again."""
        with self._lock:
            if self._process is not None:
                _kill_group(self._process.pid)
                self._process.wait(_KILL_TIMEOUT_S)
            for resource in (self._connection, self._stderr):
                if resource is not None:
                    resource.close()
            self._process = self._connection = self._stderr = None

    def retire(self) -> None:
        """From any thread: ends the process for good. A `receive` under way raises WorkerDied."""
        with self._lock:
            self._retired = True
            if self._process is not None:
                _kill_group(self._process.pid)

    def _last_stderr_line(self) -> str:
        assert self._stderr is not None
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _read(line: bytes) -> Any:
    """An answer. Halves of surrogate pairs are escapes in its texts: JSON can hold them, and no file or message can."""
    answer = json.loads(line)
    return _as_utf8(answer) if rb"\ud" in line else answer


def _as_utf8(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, list):
        return [_as_utf8(each) for each in value]
    if isinstance(value, dict):
        return {_as_utf8(name): _as_utf8(each) for name, each in value.items()}
    return value


def _kill_group(leader: int) -> None:
    """SIGKILL to a process and to what it has started, whether it still lives or not."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
