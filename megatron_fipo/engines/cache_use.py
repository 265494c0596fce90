"""How full the servers' caches were in a step, and how many sequences they had no room left for."""

import asyncio

import httpx

from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.engines.probes import cache_use
from megatron_fipo.engines.states import Server


class CacheUseOfSteps:
    """Asks servers at the end of each step. One that does not answer is left out: others find out what it has."""

    def __init__(self, pool: EnginePool):
        self._pool = pool
        self._counted: dict[str, tuple[int, int]] = {}
        """Preemptions of each server when it was asked last, and the life that it was in."""

    async def take(self, http: httpx.AsyncClient) -> dict[str, float]:
        """Metrics since the last call, over all servers: preemptions, and the largest share of a cache in use.

        None where no server says. What a lost server had counted since is not known.
        """
        servers = self._pool.in_service
        lives = [server.life for server in servers]
        found = await asyncio.gather(*(cache_use(server, http) for server in servers))
        told = [(server, life, use) for server, life, use in zip(servers, lives, found, strict=True) if use is not None]
        if not told:
            return {}
        preemptions = sum(self._since(server, life, use.preemptions) for server, life, use in told)
        return {"preemptions": preemptions, "kv_cache_peak": max(use.peak for _, _, use in told)}

    def _since(self, server: Server, life: int, count: int) -> int:
        """A server that was started again begins at 0."""
        last_life, last = self._counted.get(server.url, (life, 0))
        self._counted[server.url] = life, count
        return count - last if life == last_life and count >= last else count
