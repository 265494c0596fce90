"""What looks after the servers while they sample: it loses those that fall silent, and takes back those that return."""

import asyncio
from collections.abc import Callable

import httpx

from megatron_fipo.engines.descriptors import NoDescriptors
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.engines.probes import silence, why_not_ready
from megatron_fipo.engines.states import RETURNING, Server, State
from megatron_fipo.errors import RolloutError

WATCH_EVERY_S = 10.0


class Watch:
    """One task per server, for as long as requests are out."""

    def __init__(self, pool: EnginePool, http: httpx.AsyncClient, changed: Callable[[], None]):
        """Start watching, in a running loop. `changed` is called when a server has left or entered service."""
        self._pool, self._http, self._changed = pool, http, changed
        self._gone: dict[Server, tuple[int, asyncio.Future[str]]] = {}
        """What tells of a server's end in this life."""
        self._tasks = [asyncio.ensure_future(self._follow(server)) for server in pool.servers]

    async def stop(self) -> None:
        """End the tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def gone(self, server: Server, life: int) -> asyncio.Future[str]:
        """What has the reason once this life of the server has ended."""
        if server.life != life:
            ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            ended.set_result(server.reason)
            return ended
        self.look()
        if server not in self._gone:
            self._gone[server] = life, asyncio.get_running_loop().create_future()
        return self._gone[server][1]

    def look(self) -> None:
        """Tell of servers that the pool has lost by whatever else, such as a weight update that failed."""
        for server, (life, gone) in list(self._gone.items()):
            if server.life != life:
                del self._gone[server]
                gone.set_result(server.reason)

    def lose(self, server: Server, life: int, reason: str) -> None:
        """Have the pool lose a server in this life, and tell who waits for it."""
        if self._pool.lose(server, reason, life=life):
            self.left(server)

    def left(self, server: Server) -> None:
        """The pool has lost a server: its requests will not be answered."""
        self.look()
        self._changed()

    async def has_fallen_silent(self, server: Server, life: int, problem: str) -> bool:
        """Whether a server that has not answered because of `problem` is lost: it gives no sign of life either."""
        if server.life == life and (silent := await self._silence(server)) is not None:
            self.lose(server, life, f"{problem}; {silent}")
        return server.life != life

    async def _follow(self, server: Server) -> None:
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            life, version = server.life, self._pool.weight_version
            if server.state is State.SERVING:
                silent = await self._silence(server)
                # During a weight update it has no time to answer.
                if silent is not None and server.state is State.SERVING and self._pool.weight_version == version:
                    self.lose(server, life, silent)
            elif server.state in RETURNING and self._pool.serves_own_weights:
                # Later ones wait for the next weights, and are asked before those are sent.
                await self._take_back(server)

    async def _silence(self, server: Server) -> str | None:
        try:
            return await silence(server, self._http, self._pool.config.hang_timeout_s)
        except NoDescriptors:
            return None

    async def _take_back(self, server: Server) -> None:
        if server.failure() is not None:
            self._changed()  # who repairs the pool looks at it
            return
        try:
            problem = await why_not_ready(server, self._http, self._pool.config)
        except NoDescriptors:
            return
        except RolloutError as error:
            self._pool.give_up(server, str(error))
            return
        if problem is None and server.state in RETURNING:
            self._pool.is_back(server)
            self._changed()
