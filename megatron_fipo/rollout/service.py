"""The rollout service: vLLM API servers that a run starts on this machine and watches, or ones that already run.

A started server gets a free port on `rollout.host`, a random token through its environment, a log file under
`run_dir/logs/`, and dies with this process. `start` returns at once, so that the trainer can build its model while the
servers load; `wait_ready` waits for them.
"""

import atexit
import contextlib
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

from megatron_fipo.config import RolloutConfig
from megatron_fipo.errors import RolloutError
from megatron_fipo.rollout.access import TOKEN_VARIABLE
from megatron_fipo.rollout.server import PARENT_VARIABLE
from megatron_fipo.rollout.server_log import ServerLog
from megatron_fipo.rollout.server_options import server_arguments, server_environment, visible_devices
from megatron_fipo.weights.deadline import Deadline

STOP_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 10.0
PROBE_EVERY_S = 0.2
INITIAL_VERSION = 0
SHARED_MEMORY = Path("/dev/shm")

logger = logging.getLogger(__name__)


@dataclass
class Server:
    """One vLLM API server. `process` and `log` are None when somebody else started it."""

    url: str
    process: subprocess.Popen[bytes] | None = None
    log: ServerLog | None = None

    def failure(self) -> str | None:
        """What happened to it, with the end of its log; None while it runs, or when that cannot be known."""
        if self.process is None or self.log is None or self.process.poll() is None:
            return None
        code = self.process.returncode
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"the vLLM server at {self.url} {how}; {self.log.excerpt()}"


class RolloutService:
    """Owns the servers of one run. Made and closed on rank 0; a context manager that closes."""

    def __init__(
        self,
        config: RolloutConfig,
        model_dir: Path,
        run_dir: Path,
        seed: int,
        max_position_embeddings: int | None = None,
    ):
        """Nothing starts yet. `model_dir` is a Hugging Face directory; `max_position_embeddings` overrides its own."""
        self.config = config
        self._model_dir, self._log_dir, self._seed = model_dir, run_dir / "logs", seed
        self._max_position_embeddings = max_position_embeddings
        self._reserved: list[socket.socket] = []
        if config.addresses:
            self._token = os.environ.get(TOKEN_VARIABLE, "")
            if not self._token:
                raise RolloutError(
                    f"rollout.addresses is set, but the servers' token is not: put it in {TOKEN_VARIABLE}"
                )
            self.servers = [Server(address.rstrip("/")) for address in config.addresses]
        else:
            # Given where others, such as the trainer on another node, have to know it.
            self._token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(32)
            self.servers = []

    @property
    def headers(self) -> dict[str, str]:
        """What every request to a server has to carry."""
        return {"Authorization": f"Bearer {self._token}"}

    @property
    def started_here(self) -> bool:
        """Whether the servers hold `model_dir`'s weights for sure; adopted ones may hold those of an earlier run."""
        return not self.config.addresses

    def start(self) -> None:
        """Starts the servers and returns without waiting. Does nothing for adopted ones.

        Call it in a thread that lives as long as the run: the servers end with the thread that started them.
        """
        if self.config.addresses:
            return
        atexit.register(self.close)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        devices = visible_devices(self.config)
        for index in range(self.config.servers):
            self.servers.append(self._start_server(index, devices[index] if devices else None))

    def _start_server(self, index: int, devices: list[str] | None) -> Server:
        port = self._reserve_port()
        host = self.config.host
        arguments = server_arguments(self.config, self._model_dir, self._seed, self._max_position_embeddings)
        log = ServerLog(self._log_dir / f"rollout-{index}.log")
        environment = server_environment(self.config, devices)
        environment |= {TOKEN_VARIABLE: self._token, PARENT_VARIABLE: str(os.getpid())}
        with log.path.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron_fipo.rollout.server", "--host", host, "--port", str(port), *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal reaches its whole process group; the servers end when we close them.
                start_new_session=True,
            )
        shown = f"[{host}]" if ":" in host else host
        return Server(f"http://{shown}:{port}", process, log)

    def _reserve_port(self) -> int:
        """A free port, kept bound but not listening, so that nobody else is given it before the server listens."""
        family = socket.AF_INET6 if ":" in self.config.host else socket.AF_INET
        holder = socket.socket(family, socket.SOCK_STREAM)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((self.config.host, 0))
        self._reserved.append(holder)
        return int(holder.getsockname()[1])

    def wait_ready(self) -> None:
        """Waits until all servers answer, `rollout.start_timeout_s` at most, and labels their weights version 0.

        Raises RolloutError with the end of its log for a server that died, and for one that is not set up as the
        configuration says.
        """
        deadline = Deadline(self.config.start_timeout_s)
        with httpx.Client(headers=self.headers, timeout=PROBE_TIMEOUT_S, trust_env=False) as client:
            for server in self.servers:
                self._wait_for(server, client, deadline)
                self._check_workers(server, client)
                version = {"new_version": str(INITIAL_VERSION)}
                _answer(client.post(f"{server.url}/update_weight_version", json=version), server)
        for holder in self._reserved:
            holder.close()
        self._reserved.clear()

    def _wait_for(self, server: Server, client: httpx.Client, deadline: Deadline) -> None:
        problem = "no answer yet"
        while not deadline.passed():
            self.check()
            try:
                response = client.get(f"{server.url}/health")
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == httpx.codes.UNAUTHORIZED:
                    raise RolloutError(f"the server at {server.url} refused the token in {TOKEN_VARIABLE}")
                if response.is_success:
                    return
                problem = f"/health answered {response.status_code}"
            time.sleep(PROBE_EVERY_S)
        excerpt = f"; {server.log.excerpt()}" if server.log else ""
        raise RolloutError(
            f"the vLLM server at {server.url} was not ready within rollout.start_timeout_s="
            f"{self.config.start_timeout_s:g} s ({problem}){excerpt}"
        )

    def _check_workers(self, server: Server, client: httpx.Client) -> None:
        response = client.get(f"{server.url}/get_world_size")
        if response.status_code == httpx.codes.NOT_FOUND:
            raise RolloutError(
                f"the server at {server.url} has no routes for weight updates: "
                "start it with python -m megatron_fipo.rollout.server"
            )
        workers = _answer(response, server)["world_size"]
        if workers != self.config.tensor_parallel:
            raise RolloutError(
                f"the server at {server.url} has {workers} workers, but rollout.tensor_parallel is "
                f"{self.config.tensor_parallel}"
            )

    def check(self) -> None:
        """RolloutError with the end of its log if a started server has died."""
        for server in self.servers:
            if (failure := server.failure()) is not None:
                raise RolloutError(failure)

    def close(self) -> None:
        """Ends the servers that were started here, with all their processes; adopted ones stay. May be called twice."""
        atexit.unregister(self.close)
        for holder in self._reserved:
            holder.close()
        self._reserved.clear()
        _end_processes([server.process for server in self.servers if server.process is not None])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _answer(response: httpx.Response, server: Server) -> Any:
    if not response.is_success:
        raise RolloutError(f"{server.url}{response.request.url.path} answered {response.status_code}: {response.text}")
    return response.json()


def _end_processes(processes: list[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to each server, then SIGKILL to whatever is left of its process tree after STOP_TIMEOUT_S."""
    trees: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(process.pid)
            trees += [root, *root.children(recursive=True)]
    shared = _shared_files(trees)
    for process in processes:
        if process.poll() is None:
            process.terminate()
    _, alive = psutil.wait_procs(trees, timeout=STOP_TIMEOUT_S)
    for straggler in alive:
        logger.warning("process %d of a vLLM server did not end in time and is killed", straggler.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            straggler.kill()
    psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)
    for process in processes:
        process.poll()
    # A killed process leaves its segments, and memory in them is gone until somebody deletes them.
    for path in shared:
        path.unlink(missing_ok=True)


def _shared_files(processes: list[psutil.Process]) -> set[Path]:
    """The shared-memory segments that vLLM's processes have in use among themselves."""
    files: set[Path] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            files.update(Path(mapping.path) for mapping in process.memory_maps())
    return {path for path in files if path.parent == SHARED_MEMORY}
