"""The servers that a run starts on its machine: started, started again on their ports, and ended with all they began.

A started server gets a free port on `rollout.host`, a random token through its environment, a log file under
`run_dir/logs/`, and dies with the thread that started it.
"""

import atexit
import os
import secrets
import socket
import time
from contextlib import ExitStack
from pathlib import Path

from megatron_fipo.config import RolloutConfig
from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.early_server import take_early
from megatron_fipo.engines.server_log import ServerLog
from megatron_fipo.engines.server_options import server_arguments, server_environment, visible_devices
from megatron_fipo.engines.server_process import end_processes, start_process
from megatron_fipo.engines.states import Server
from megatron_fipo.processes.leftovers import own_place, server_names
from megatron_fipo.weights.deadline import Deadline

DEATH_GRACE_S = 1.0
"""How long a server whose connection broke is watched for its end, which explains more than the broken connection."""


class Starter:
    """Starts the servers of one run. All calls come from one thread, which lives as long as the run."""

    def __init__(
        self,
        config: RolloutConfig,
        model_dir: Path,
        run_dir: Path,
        seed: int,
        max_position_embeddings: int | None,
        *,
        returns_routes: bool = False,
    ):
        """Nothing starts yet. `max_position_embeddings` overrides the model's own; `returns_routes`: the option."""
        # The token is given where others, such as the trainer on another node, have to know it.
        self.token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(32)
        self._config, self._run_dir, self._log_dir = config, run_dir, run_dir / "logs"
        self._options, self._returns_routes = (model_dir, seed, max_position_embeddings), returns_routes
        self._reserved: list[socket.socket] = []
        self._servers: list[Server] = []
        self._places = ExitStack()

    def start(self, *, beside_trainer: bool) -> list[Server]:
        """All servers of the configuration, which load; `beside_trainer`: a trainer here has GPUs of its own."""
        atexit.register(self.close)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        names = server_names(self._run_dir, self._places.enter_context(own_place(self._run_dir)))
        devices = visible_devices(self._config, beside_trainer=beside_trainer)
        for index in range(self._config.servers):
            self._servers.append(self._start(index, devices[index] if devices else None, names))
        return list(self._servers)

    def _start(self, index: int, devices: list[str] | None, names: dict[str, str]) -> Server:
        host, port = self._config.host, self._reserve_port()
        options = server_arguments(self._config, *self._options, returns_routes=self._returns_routes)
        command = ["--host", host, "--port", str(port), *options]
        environment = server_environment(self._config, devices) | names | {TOKEN_VARIABLE: self.token}
        log = ServerLog(self._log_dir / f"rollout-{index}.log")
        process = take_early(command, environment, log.path) or start_process(command, environment, log.path)
        shown = f"[{host}]" if ":" in host else host
        return Server(f"http://{shown}:{port}", process, log, command, environment)

    def _reserve_port(self) -> int:
        """A free port, kept bound but not listening: nobody else is given it, before the server listens and after."""
        family = socket.AF_INET6 if ":" in self._config.host else socket.AF_INET
        holder = socket.socket(family, socket.SOCK_STREAM)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((self._config.host, 0))
        self._reserved.append(holder)
        return int(holder.getsockname()[1])

    def end(self, server: Server) -> str:
        """End a server that has failed, with all its processes; the story of its end, with that of its log."""
        assert server.process is not None and server.log is not None
        # A dying server breaks its connections first and has an exit status later.
        grace = Deadline(DEATH_GRACE_S)
        while (failure := server.failure()) is None and not grace.passed():
            time.sleep(0.05)
        story = failure or f"the vLLM server at {server.url} failed: {server.reason}; {server.log.excerpt()}"
        end_processes([server.process], server.segments, at_once=True)
        return story

    def start_again(self, server: Server) -> None:
        """Start an ended server on its port, without waiting for it."""
        assert server.log is not None
        server.log = ServerLog(server.log.path)
        server.process = start_process(server.command, server.environment, server.log.path)

    def close(self) -> None:
        """End what was started, with all its processes. May be called twice."""
        atexit.unregister(self.close)
        for holder in self._reserved:
            holder.close()
        self._reserved.clear()
        segments = {segment for server in self._servers for segment in server.segments}
        end_processes([server.process for server in self._servers if server.process is not None], segments)
        self._places.close()
