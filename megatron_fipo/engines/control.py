"""vLLM's control plane over all servers in service at once: pause, sleep and weight updates."""

import asyncio
from typing import Any

import httpx

from megatron_fipo.engines.connections import tls
from megatron_fipo.engines.descriptors import NoDescriptors, raise_if_exhausted
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.engines.probes import engine_message, probing
from megatron_fipo.engines.scoring import score
from megatron_fipo.engines.starter import DEATH_GRACE_S
from megatron_fipo.engines.states import Server
from megatron_fipo.errors import RolloutError, WeightsRefused
from megatron_fipo.weights.deadline import Deadline
from megatron_fipo.weights.local_senders import memory_of
from megatron_fipo.weights.transport_records import BucketHeader, BucketMemory, JoinRequest, WorkerPlace, to_wire


class EngineControl:
    """Every method calls all servers in service concurrently and returns when all have answered.

    RolloutError as soon as one fails, with the engine's own words or the end of a dead server's log, or when the
    deadline passes, naming the servers that have not answered. The pool has lost then what failed, and what was busy
    with the same call, whose state nobody knows; it has lost none where engines refused the weights, as another would.
    Usable from any event loop.
    """

    def __init__(self, pool: EnginePool):
        self._pool = pool

    @property
    def roster(self) -> int:
        """Another number whenever servers have left or entered service since."""
        return self._pool.roster

    def admit(self) -> None:
        """See that every server that can is in service. RolloutError as by EnginePool.admit."""
        self._pool.admit()

    @property
    def workers_of_server(self) -> list[tuple[WorkerPlace, ...]]:
        """Where the engine workers of each server run, in the pool's order."""
        return [server.workers for server in self._pool.in_service]

    async def pause(self, deadline: Deadline) -> None:
        """Stops generation between two tokens. Requests that run, or come in, go on at `resume`.

        What becomes of their keys and values is rollout.kv_on_update's to say. With recompute all caches are emptied.
        With keep cached prefixes of older weights stay; a request that carries the version in `cache_salt` has no part
        in them.
        """
        self._pool.begin_update()
        if self._pool.config.shared_gpu:
            await self._have_all_asleep(deadline)
            # Room for new weights alone; first, because an engine that is awake already goes on generating after it.
            await self._call_all("/wake_up?tags=weights", deadline)
        # Said either way: the default empties them in mode keep too, which the route's description denies.
        clear = "true" if self._pool.config.kv_on_update == "recompute" else "false"
        await self._call_all(f"/pause?mode=keep&clear_cache={clear}", deadline)

    async def resume(self, deadline: Deadline) -> None:
        """Lets generation go on."""
        if self._pool.config.shared_gpu:
            await self._call_all("/wake_up?tags=kv_cache", deadline)
        await self._call_all("/resume", deadline)
        self._pool.end_update()

    async def sleep(self, deadline: Deadline) -> None:
        """Has the engines free their GPUs' memory until the next `pause` … `resume`, and aborts what still runs.

        Weights go to host memory (level 1) although an update brings others: what no update touches comes back too.
        """
        self._pool.begin_update()
        await self._call_all("/sleep?level=1&mode=abort", deadline)

    async def _have_all_asleep(self, deadline: Deadline) -> None:
        """Put those to sleep that have started again since the last update, with memory that the trainer needs now.

        Others sleep, or have only their weights since an update failed; to sleep twice is an error in vLLM.
        """
        async with probing(self._pool.headers) as http:

            async def is_awake(server: Server) -> bool:
                try:
                    answer = (await http.get(f"{server.url}/is_sleeping")).raise_for_status()
                except httpx.HTTPError:
                    return True  # the next call finds out what is wrong with it
                return not answer.json()["is_sleeping"]

            servers = self._pool.in_service
            awake = await asyncio.gather(*map(is_awake, servers))
        if any(awake):
            chosen = [server for server, is_it in zip(servers, awake, strict=True) if is_it]
            await self._call_all("/sleep?level=1&mode=abort", deadline, servers=chosen)

    async def join_transport(self, request_of_server: list[JoinRequest], deadline: Deadline) -> None:
        """Tells each server, in the pool's order, to join a sender's transport, whatever state it was left in."""
        await self._call_all("/collective_rpc", deadline, {"method": "abandon_weight_update"})
        bodies = [{"init_info": to_wire(request)} for request in request_of_server]
        if len(bodies) != (count := len(self._pool.in_service)):
            raise RolloutError(f"{count} servers are in service, and the weight update began with {len(bodies)}")
        await self._call_all("/init_weight_transfer_engine", deadline, bodies)

    async def start_weight_update(self, deadline: Deadline) -> None:
        """Prepares the engines for buckets."""
        await self._call_all("/start_weight_update", deadline)

    async def update_weights(self, header: BucketHeader, deadline: Deadline) -> None:
        """Makes the engines take one bucket; returns when all have it. Each is told of its own workers' memory."""
        if isinstance(header.place, BucketMemory):
            headers = [memory_of(header, header.place, server.workers) for server in self._pool.in_service]
            await self._call_all("/update_weights", deadline, [{"update_info": to_wire(each)} for each in headers])
            return
        await self._call_all("/update_weights", deadline, {"update_info": to_wire(header)})

    async def finish_weight_update(self, version: int, deadline: Deadline) -> None:
        """Puts the new weights into service as `version`."""
        await self._call_all("/finish_weight_update", deadline, {"weight_version": str(version)})
        self._pool.note_version(version)

    async def score(self, token_ids: list[int], deadline: Deadline) -> dict[str, list[float | None]]:
        """See `scoring.score`. It raises nothing: a server that fails is lost and left out."""
        return await score(self._pool, token_ids, deadline)

    async def _call_all(
        self,
        path: str,
        deadline: Deadline,
        body: dict[str, Any] | list[dict[str, Any]] | None = None,
        servers: list[Server] | None = None,
    ) -> None:
        """POST to every server in service, or to `servers`. `body` is for all, or one for each server."""
        servers = self._pool.in_service if servers is None else servers
        bodies = body if isinstance(body, list) else [body] * len(servers)
        # No limit: servers that join one group wait in the call until the last of them has got it.
        limits = httpx.Limits(max_connections=None)
        about: dict[str, Any] = {"headers": self._pool.headers, "timeout": None, "trust_env": False, "verify": tls()}
        async with httpx.AsyncClient(limits=limits, **about) as client:
            calls = {
                asyncio.ensure_future(self._call(client, server, path, content)): server
                for server, content in zip(servers, bodies, strict=True)
            }
            try:
                done, pending = await asyncio.wait(
                    calls, timeout=deadline.remaining(), return_when=asyncio.FIRST_EXCEPTION
                )
                self._lose_failed({calls[call]: call.exception() for call in done}, [calls[call] for call in pending])
                for call in done:
                    call.result()  # raises what the call has raised
            finally:
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
        if pending:
            silent = ", ".join(calls[call].url for call in pending)
            raise RolloutError(f"no answer to {path} from {silent} within {deadline.seconds:g} s in all")

    def _lose_failed(self, done: dict[Server, BaseException | None], pending: list[Server]) -> None:
        """A call that others were still busy with when it failed for one leaves their engines in an unknown state."""
        errors = {server: error for server, error in done.items() if error is not None}
        if any(isinstance(error, WeightsRefused | NoDescriptors) for error in errors.values()):
            return
        failed = {server: str(error) for server, error in errors.items()}
        late = "it was in the same weight update" if errors else "it did not answer in time"
        failed |= dict.fromkeys(pending, late)
        for server, reason in failed.items():
            # A failed call leaves the workers of one engine out of step with each other.
            self._pool.lose(server, reason, for_good=self._pool.config.tensor_parallel > 1)

    async def _call(self, client: httpx.AsyncClient, server: Server, path: str, body: Any) -> None:
        try:
            response = await client.post(server.url + path, json=body)
        except httpx.TransportError as error:
            raise_if_exhausted(error)
            await self._raise_if_dying(server)
            raise RolloutError(f"{server.url}{path}: {type(error).__name__}: {error}") from error
        if not response.is_success:
            await self._raise_if_dying(server)
            words = engine_message(response)
            if WeightsRefused.MARK in words:
                raise WeightsRefused(f"{server.url}{path}: {words.split(WeightsRefused.MARK, 1)[1]}")
            raise RolloutError(f"{server.url}{path} answered {response.status_code}: {words}")

    async def _raise_if_dying(self, server: Server) -> None:
        grace = Deadline(DEATH_GRACE_S)
        while server.process is not None and not grace.passed():
            if (failure := server.failure()) is not None:
                raise RolloutError(failure)
            await asyncio.sleep(0.05)
