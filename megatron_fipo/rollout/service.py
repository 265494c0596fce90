"""The rollout service: vLLM API servers that a run starts on this machine and watches, or ones that already run.

A started server gets a free port on `rollout.host`, a random token through its environment, a log file under
`run_dir/logs/`, and dies with this process. `start` returns at once, so that the trainer can build its model while the
servers load; `wait_ready` waits for them.

A server that fails later goes out of service by `lose`: one of ours is started again at once, on its port. `admit`,
before every weight update, puts back into service whatever answers again. In between the others carry on.
"""

import atexit
import logging
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from megatron_fipo.config import RolloutConfig
from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.server_log import ServerLog
from megatron_fipo.engines.server_options import server_arguments, server_environment, visible_devices
from megatron_fipo.engines.server_process import end_processes, family, shared_files, start_process
from megatron_fipo.errors import RolloutError
from megatron_fipo.leftovers import own_place, server_names
from megatron_fipo.weights.deadline import Deadline

PROBE_TIMEOUT_S = 10.0
PROBE_EVERY_S = 0.2
DEATH_GRACE_S = 1.0
"""How long a server whose connection broke is watched for its end, which explains more than the broken connection."""
INITIAL_VERSION = 0
WORKERS_HEALTH = {"method": "check_health"}
"""A call for /collective_rpc, which workers that hang do not answer while /health still does."""

logger = logging.getLogger(__name__)


@dataclass
class Server:
    """One vLLM API server. `process` and `log` are None when somebody else started it."""

    url: str
    process: subprocess.Popen[bytes] | None = None
    log: ServerLog | None = None
    command: list[str] = field(default_factory=list)
    """Options that it was started with, and"""
    environment: dict[str, str] = field(default_factory=dict)
    """its environment: what it is started with again."""
    lost: str | None = None
    """Why it is out of service; None while it is in service."""
    losses: int = 0
    """How often it was lost since the last step that it took part in."""
    segments: set[Path] = field(default_factory=set)
    """Shared memory of its processes, which outlives them if they are killed."""

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
        warn: Callable[[str], None] = logger.warning,
        *,
        beside_trainer: bool = True,
    ):
        """Nothing starts yet. `model_dir` is a Hugging Face directory; `max_position_embeddings` overrides its own.

        `warn` gets a line for each server that is lost or comes back. `beside_trainer`: a trainer on this machine has
        GPUs of its own.
        """
        self.config = config
        self.roster = 0
        """Changes with each server that leaves or enters service."""
        self.weight_version: int | None = None
        """The version that the last weight update put into service; None before one."""
        self._model_dir, self._run_dir, self._log_dir, self._seed = model_dir, run_dir, run_dir / "logs", seed
        self._max_position_embeddings = max_position_embeddings
        self._warn, self._beside_trainer = warn, beside_trainer
        self._restarts = 0
        self._reserved: list[socket.socket] = []
        self._names: dict[str, str] = {}
        self._places = ExitStack()
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
    def in_service(self) -> list[Server]:
        """The servers that sample and get weights."""
        return [server for server in self.servers if server.lost is None]

    def note_version(self, version: int) -> None:
        """Every server in service has the weights of `version` now."""
        self.weight_version = version

    @property
    def headers(self) -> dict[str, str]:
        """What every request to a server has to carry."""
        return {"Authorization": f"Bearer {self._token}"}

    def start(self) -> None:
        """Starts the servers and returns without waiting. Does nothing for adopted ones.

        Call it in a thread that lives as long as the run: the servers end with the thread that started them.
        """
        if self.config.addresses:
            return
        atexit.register(self.close)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._names = server_names(self._run_dir, self._places.enter_context(own_place(self._run_dir)))
        devices = visible_devices(self.config, beside_trainer=self._beside_trainer)
        for index in range(self.config.servers):
            self.servers.append(self._start_server(index, devices[index] if devices else None))

    def _start_server(self, index: int, devices: list[str] | None) -> Server:
        host, port = self.config.host, self._reserve_port()
        options = server_arguments(self.config, self._model_dir, self._seed, self._max_position_embeddings)
        command = ["--host", host, "--port", str(port), *options]
        environment = server_environment(self.config, devices) | self._names | {TOKEN_VARIABLE: self._token}
        log = ServerLog(self._log_dir / f"rollout-{index}.log")
        process = start_process(command, environment, log.path)
        shown = f"[{host}]" if ":" in host else host
        return Server(f"http://{shown}:{port}", process, log, command, environment)

    def _reserve_port(self) -> int:
        """A free port, kept bound but not listening: nobody else is given it, before the server listens and after."""
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
        with self._http() as client:
            for server in self.servers:
                while (problem := self._not_ready(server, client)) is not None:
                    self.check()
                    if deadline.passed():
                        raise RolloutError(self._late(server, problem))
                    time.sleep(PROBE_EVERY_S)

    def _late(self, server: Server, problem: str) -> str:
        excerpt = f"; {server.log.excerpt()}" if server.log else ""
        return (
            f"the vLLM server at {server.url} was not ready within rollout.start_timeout_s="
            f"{self.config.start_timeout_s:g} s ({problem}){excerpt}"
        )

    def _http(self) -> httpx.Client:
        return httpx.Client(headers=self.headers, timeout=PROBE_TIMEOUT_S, trust_env=False)

    def _not_ready(self, server: Server, client: httpx.Client) -> str | None:
        """None when it answers and is labelled; else why not yet. RolloutError when it is another than configured."""
        try:
            response = client.get(f"{server.url}/health")
            if response.status_code == httpx.codes.UNAUTHORIZED:
                raise RolloutError(f"the server at {server.url} refused the token in {TOKEN_VARIABLE}")
            response.raise_for_status()
            self._check_workers(server, client)
            client.post(f"{server.url}/collective_rpc", json=WORKERS_HEALTH).raise_for_status()
            version = {"new_version": str(INITIAL_VERSION)}
            client.post(f"{server.url}/update_weight_version", json=version).raise_for_status()
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"
        if server.process is not None:
            server.segments = shared_files(family(server.process))
        return None

    def _check_workers(self, server: Server, client: httpx.Client) -> None:
        response = client.get(f"{server.url}/get_world_size")
        if response.status_code == httpx.codes.NOT_FOUND:
            raise RolloutError(
                f"the server at {server.url} has no routes for weight updates: "
                "start it with python -m megatron_fipo.engines.server"
            )
        workers = response.raise_for_status().json()["world_size"]
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

    def lose(self, server: Server, reason: str, *, for_good: bool = False) -> None:
        """Takes a server out of service, with a warning; one of ours is started again. Nothing if it is out already.

        `for_good` is for a server that only a restart makes fit again: one that is not ours never returns.
        RolloutError when one of ours has been lost more than `rollout.max_restarts` times in a row.
        """
        if server.lost is not None:
            return
        server.lost = reason
        self.roster += 1
        if server.process is None:
            server.losses = 1 + (self.config.max_restarts if for_good else server.losses)
            again = "taken back when it answers" if self._may_return(server) else "left out from now on"
            self._warn(f"the vLLM server at {server.url} is out of service, {again}: {reason}")
        else:
            self.restart(server, reason)

    def restart(self, server: Server, reason: str) -> None:
        """Ends one of our servers with all its processes and starts it again on its port, without waiting for it.

        Call it in the thread that called `start`. RolloutError when it was lost more than `rollout.max_restarts` times.
        """
        assert server.process is not None and server.log is not None
        # A dying server breaks its connections first and has an exit status later.
        grace = Deadline(DEATH_GRACE_S)
        while (failure := server.failure()) is None and not grace.passed():
            time.sleep(0.05)
        story = failure or f"the vLLM server at {server.url} failed: {reason}; {server.log.excerpt()}"
        end_processes([server.process], server.segments, at_once=True)
        server.losses += 1
        if not self._may_return(server):
            limit = f"rollout.max_restarts={self.config.max_restarts}"
            raise RolloutError(story if server.losses == 1 else f"{limit} restarts did not help: {story}")
        self._restarts += 1
        server.log = ServerLog(server.log.path)
        server.process = start_process(server.command, server.environment, server.log.path)
        self._warn(f"restart {server.losses} of at most {self.config.max_restarts}: {story}")

    def _may_return(self, server: Server) -> bool:
        return server.losses <= self.config.max_restarts

    def admit(self) -> None:
        """Before a weight update: servers that fail by now are lost, and those that answer again are in service.

        Waits for restarted servers, and for others only if none is left, `rollout.start_timeout_s` in all. RolloutError
        if none is left then, or a restarted one is not ready.
        """
        deadline = Deadline(self.config.start_timeout_s)
        self.lose_unfit()
        with self._http() as client:
            while awaited := self._readmit(client):
                late, problem = awaited[0]
                if deadline.passed():
                    raise RolloutError(self._late(late, problem))
                time.sleep(PROBE_EVERY_S)
        if not self.in_service:
            raise RolloutError(f"no vLLM server is left: {self.losses_in_words()}")

    def lose_unfit(self) -> None:
        """Servers that have died since the last weight update, or that somebody has started again, are lost."""
        with self._http() as client:
            for server in self.in_service:
                if (reason := self._unfit(server, client)) is not None:
                    self.lose(server, reason)

    def _readmit(self, client: httpx.Client) -> list[tuple[Server, str]]:
        """Puts servers back that are ready; those that are worth waiting for, each with why it is not ready."""
        absent: list[tuple[Server, str]] = []
        for server in self.servers:
            if server.lost is None or not self._may_return(server):
                continue
            if (failure := server.failure()) is not None:
                self.restart(server, failure)
            if (problem := self._not_ready(server, client)) is not None:
                absent.append((server, problem))
                continue
            server.lost = None
            self.roster += 1
            self._warn(f"the vLLM server at {server.url} is back in service")
        return [pair for pair in absent if pair[0].process is not None or not self.in_service]

    def _unfit(self, server: Server, client: httpx.Client) -> str | None:
        """Why a server that should be in service can neither sample nor get weights."""
        if (failure := server.failure()) is not None:
            return failure
        try:
            version = client.get(f"{server.url}/weight_info").raise_for_status().json()["weight_version"]
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"
        # Ours are numbers.
        return None if version.isdigit() else "somebody has started it again"

    def losses_in_words(self) -> str:
        """Each server that is out of service with the reason."""
        return "; ".join(f"{server.url}: {server.lost}" for server in self.servers if server.lost is not None)

    def end_step(self) -> dict[str, float]:
        """Metrics of the step that ends, in which the servers in service have proven themselves."""
        for server in self.in_service:
            server.losses = 0
        restarts, self._restarts = self._restarts, 0
        return {"rollout_restarts": float(restarts), "rollout_servers": float(len(self.in_service))}

    def close(self) -> None:
        """Ends the servers that were started here, with all their processes; adopted ones stay. May be called twice."""
        atexit.unregister(self.close)
        for holder in self._reserved:
            holder.close()
        self._reserved.clear()
        segments = {segment for server in self.servers for segment in server.segments}
        end_processes([server.process for server in self.servers if server.process is not None], segments)
        self._places.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
