"""EnginePool: the vLLM servers of a run, and how each of them stands. It alone knows which may be called for what.

    STARTING ─► SERVING ◄─► AWAITING_WEIGHTS          samples; only gets weights
                   │  ▲        │  ▲
                   ▼  │        ▼  │
                   LOST ─► RESTARTING or AWAY          failed; ours, started again, or somebody else's
                     └───► GIVEN_UP                    failed too often, or for good

Whoever finds a server failing says so by `lose`, from any thread. `repair`, in the thread that started the servers,
warns once of each that was lost, and starts ours again. `admit`, before every weight update, takes back what answers
again. A server that has started again has its model directory's weights, which are the right ones only until an update
begins: later it waits for one.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import httpx

from megatron_fipo.config import RolloutConfig
from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.probes import probing, why_not_ready, why_unfit
from megatron_fipo.engines.starter import Starter
from megatron_fipo.engines.states import IN_SERVICE, RETURNING, Server, State
from megatron_fipo.errors import RolloutError
from megatron_fipo.weights.deadline import Deadline

PROBE_EVERY_S = 0.2
MAX_BAD_ANSWERS = 2
"""Answers that are not what was asked for, one after the other, that take a server out of service."""

logger = logging.getLogger(__name__)


class Run(Protocol):
    """Runs a coroutine to its end, as asyncio.run does."""

    def __call__(self, work: Coroutine[Any, Any, None], /) -> None: ...


class EnginePool:
    """The servers of one run. Made and closed on rank 0; a context manager that closes."""

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
        returns_routes: bool = False,
        run: Run = asyncio.run,
    ):
        """Nothing starts yet. `model_dir` is a Hugging Face directory; `max_position_embeddings` overrides its own.

        `warn` gets a line for each server that is lost or comes back. `beside_trainer`: a trainer on this machine has
        GPUs of its own. `returns_routes`: requests may ask for the experts that tokens go to. `run` runs a coroutine
        to its end.
        """
        self.config = config
        self.servers: list[Server] = []
        self.roster = 0
        """Changes with each server that leaves or enters service."""
        self.weight_version: int | None = None
        """The version that the last weight update published; None before one."""
        self._warn, self._beside_trainer, self._run = warn, beside_trainer, run
        self._told: list[Callable[[], None]] = []
        self._restarts = 0
        self._updated: list[tuple[Server, int]] | None = None
        """What the update that was begun last is for, each with the life that it was in; None before one."""
        self._admitted: list[tuple[Server, int]] = []
        """As that, of the last `admit`."""
        self._starter: Starter | None = None
        if config.addresses:
            token = os.environ.get(TOKEN_VARIABLE, "")
            if not token:
                raise RolloutError(
                    f"rollout.addresses is set, but the servers' token is not: put it in {TOKEN_VARIABLE}"
                )
            self.servers = [Server(address.rstrip("/")) for address in config.addresses]
        else:
            self._starter = Starter(
                config, model_dir, run_dir, seed, max_position_embeddings, returns_routes=returns_routes
            )
            token = self._starter.token
        self.headers = {"Authorization": f"Bearer {token}"}
        """What every request to a server has to carry."""

    # --- who may be called ----------------------------------------------------------------------------------------

    @property
    def serving(self) -> list[Server]:
        """The servers that sample."""
        return [server for server in self.servers if server.state is State.SERVING]

    @property
    def in_service(self) -> list[Server]:
        """The servers that control calls and weights go to: those that sample, and those that wait for weights."""
        return [server for server in self.servers if server.state in IN_SERVICE]

    @property
    def returning(self) -> list[Server]:
        """The servers that may come back into service."""
        return [server for server in self.servers if server.state in RETURNING]

    @property
    def serves_own_weights(self) -> bool:
        """Whether servers sample from the weights of their model directory: until an update begins."""
        return self.weight_version is None and self._updated is None

    def tell(self, changed: Callable[[], None]) -> None:
        """Have `changed` called, in whatever thread, whenever servers have left service or sample again."""
        self._told.append(changed)

    def losses_in_words(self) -> str:
        """Each server that is out of service, with the reason."""
        out = [server for server in self.servers if server.state not in IN_SERVICE]
        return "; ".join(f"{server.url}: {server.reason or server.state.value}" for server in out)

    # --- what happens to them -------------------------------------------------------------------------------------

    def lose(self, server: Server, reason: str, *, life: int | None = None, for_good: bool = False) -> bool:
        """A server has failed: nobody calls it from here on. False if it was out of service already.

        Args:
            life: the server's life that has failed, where that may be an earlier one.
            for_good: only a restart makes it fit again, so one that is not ours never returns.
        """
        if server.state not in IN_SERVICE or life not in (None, server.life):
            return False
        self._lose(server, reason)
        if server.process is None and for_good:
            server.losses = 1 + self.config.max_restarts
        self.roster += 1
        self._tell()
        return True

    def _tell(self) -> None:
        for changed in self._told:
            changed()

    def _lose(self, server: Server, reason: str) -> None:
        server.enter(State.LOST)
        server.reason, server.bad_answers = reason, 0
        server.life += 1
        server.losses += 1

    def answered(self, server: Server) -> None:
        """It has answered what was asked for."""
        server.bad_answers = 0

    def answered_wrongly(self, server: Server, life: int, problem: str) -> bool:
        """Its answer, in this life, is not what was asked for. Whether it is lost by that, since it has repeated it."""
        if life != server.life:
            return False
        server.bad_answers += 1
        if server.bad_answers < MAX_BAD_ANSWERS:
            return False
        return self.lose(server, f"its answers are not what was asked for: {problem}", for_good=True)

    def repair(self) -> bool:
        """Start the lost servers again that are ours, without waiting for them; whether any was lost since the last.

        Also what has died while it was starting again. In the thread that called `start`.

        Raises:
            RolloutError: one of ours is given up: lost more than `rollout.max_restarts` times in a row.
        """
        for server in self.returning:
            if (failure := server.failure()) is not None:
                self._lose(server, failure)
        lost = [server for server in self.servers if server.state is State.LOST]
        for server in lost:
            if server.process is not None:
                self._restart(server)
            else:
                server.enter(State.AWAY if self._may_return(server) else State.GIVEN_UP)
                again = "taken back when it answers" if server.state is State.AWAY else "left out from now on"
                self._warn(f"the vLLM server at {server.url} is out of service, {again}: {server.reason}")
        for server in self.servers:
            if server.process is not None and server.state is State.GIVEN_UP:
                raise RolloutError(server.reason)
        return bool(lost)

    def replace_failed(self) -> bool:
        """After a weight update that failed: `repair`; whether a server that was there at `admit` is lost."""
        self.repair()
        return any(server.life != life for server, life in self._admitted)

    def _restart(self, server: Server) -> None:
        assert self._starter is not None, "ours are started here"
        story, limit = self._starter.end(server), self.config.max_restarts
        if not self._may_return(server):
            server.enter(State.GIVEN_UP)
            helpless = f"rollout.max_restarts={limit} restarts did not help: "
            server.reason = story if server.losses == 1 else helpless + story
            return
        self._restarts += 1
        self._starter.start_again(server)
        server.enter(State.RESTARTING)
        self._warn(f"restart {server.losses} of at most {limit}: {story}")

    def _may_return(self, server: Server) -> bool:
        return server.losses <= self.config.max_restarts

    def is_back(self, server: Server) -> None:
        """A server that was out of service answers again, and is what the configuration says."""
        server.enter(State.SERVING if self.serves_own_weights else State.AWAITING_WEIGHTS)
        self.roster += 1
        self._warn(f"the vLLM server at {server.url} is back in service")
        self._tell()

    def give_up(self, server: Server, reason: str) -> None:
        """A server that was out of service has come back as another one than configured."""
        server.enter(State.GIVEN_UP)
        server.reason = reason
        self._warn(f"the vLLM server at {server.url} is left out from now on: {reason}")

    def begin_update(self) -> None:
        """From here until `end_update` no server samples: those in service get weights, or sleep."""
        self._updated = [(server, server.life) for server in self.in_service]
        for server in self.serving:
            server.enter(State.AWAITING_WEIGHTS)

    def note_version(self, version: int) -> None:
        """The servers in service have the weights of `version` now."""
        self.weight_version = version

    def end_update(self) -> None:
        """The servers that were in service when it began, and still are, sample from here on."""
        for server, life in self._updated or ():
            if server.state is State.AWAITING_WEIGHTS and server.life == life:
                server.enter(State.SERVING)
        self._tell()

    def prove(self, server: Server) -> None:
        """It has done its work for a while: earlier losses no longer count."""
        server.losses = 0

    def end_step(self) -> dict[str, float]:
        """Metrics of the step that ends, in which the servers in service have proven themselves."""
        for server in self.in_service:
            self.prove(server)
        restarts, self._restarts = self._restarts, 0
        return {"rollout_restarts": float(restarts), "rollout_servers": float(len(self.in_service))}

    # --- waiting for them -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the servers and returns without waiting. Does nothing for adopted ones.

        Call it in a thread that lives as long as the run: the servers end with the thread that started them.
        """
        if self._starter is not None:
            self.servers = self._starter.start(beside_trainer=self._beside_trainer)

    def wait_ready(self) -> None:
        """Waits until all servers that start answer, `rollout.start_timeout_s` at most; their weights are version 0.

        Raises:
            RolloutError: one has died, with the end of its log, or is not set up as the configuration says.
        """
        self._run(self._wait_ready())

    async def _wait_ready(self) -> None:
        deadline = Deadline(self.config.start_timeout_s)
        async with probing(self.headers) as http:
            while starting := [server for server in self.servers if server.state is State.STARTING]:
                problems = await asyncio.gather(*(why_not_ready(server, http, self.config) for server in starting))
                for server, problem in zip(starting, problems, strict=True):
                    if problem is None:
                        server.enter(State.SERVING)
                    elif (failure := server.failure()) is not None:
                        raise RolloutError(failure)
                    elif deadline.passed():
                        raise RolloutError(self._late(server, problem))
                if any(problems):
                    await asyncio.sleep(PROBE_EVERY_S)

    def _late(self, server: Server, problem: str) -> str:
        excerpt = f"; {server.log.excerpt()}" if server.log else ""
        return (
            f"the vLLM server at {server.url} was not ready within rollout.start_timeout_s="
            f"{self.config.start_timeout_s:g} s ({problem}){excerpt}"
        )

    def lose_unfit(self) -> None:
        """Servers that have died, or that somebody has started again, are lost and repaired. Nobody may have asked."""
        self._run(self._lose_unfit())

    async def _lose_unfit(self) -> None:
        async with probing(self.headers) as http:
            asked = self.in_service
            for server, reason in zip(asked, await asyncio.gather(*(why_unfit(s, http) for s in asked)), strict=True):
                if reason is not None:
                    self.lose(server, reason)
        self.repair()

    def admit(self) -> None:
        """Before a weight update: servers that fail by now are lost, and those that answer again are in service.

        Waits for restarted servers, and for others only if none is left, `rollout.start_timeout_s` in all.

        Raises:
            RolloutError: none is left then, or a restarted one is not ready.
        """
        self._run(self._admit())

    async def _admit(self) -> None:
        deadline = Deadline(self.config.start_timeout_s)
        await self._lose_unfit()
        async with probing(self.headers) as http:
            while awaited := await self._take_back(http):
                late, problem = awaited[0]
                if deadline.passed():
                    raise RolloutError(self._late(late, problem))
                await asyncio.sleep(PROBE_EVERY_S)
        if not self.in_service:
            raise RolloutError(f"no vLLM server is left: {self.losses_in_words()}")
        self._admitted = [(server, server.life) for server in self.in_service]

    async def _take_back(self, http: httpx.AsyncClient) -> list[tuple[Server, str]]:
        """Puts servers back that are ready; those that are worth waiting for, each with why it is not ready."""
        self.repair()
        asked = self.returning
        problems = await asyncio.gather(*(why_not_ready(server, http, self.config) for server in asked))
        absent: list[tuple[Server, str]] = []
        for server, problem in zip(asked, problems, strict=True):
            if problem is None:
                self.is_back(server)
            else:
                absent.append((server, problem))
        return [pair for pair in absent if pair[0].process is not None or not self.in_service]

    def close(self) -> None:
        """Ends the servers that were started here, with all their processes; adopted ones stay. May be called twice."""
        if self._starter is not None:
            self._starter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
