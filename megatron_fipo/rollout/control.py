"""vLLM's control plane over all servers of the service at once: pause, weight updates, cache resets, versions."""

import asyncio
from typing import Any

import httpx

from megatron_fipo.errors import RolloutError, WeightsRefused
from megatron_fipo.rollout.service import DEATH_GRACE_S, RolloutService, Server
from megatron_fipo.weights.deadline import Deadline


class ControlPlane:
    """Every method calls all servers in service concurrently and returns when all have answered.

    RolloutError as soon as one fails, with the engine's own words or the end of a dead server's log, or when the
    deadline passes, naming the servers that have not answered. Usable from any event loop.
    """

    def __init__(self, service: RolloutService):
        self._service = service
        self._failed: dict[str, str] = {}

    @property
    def roster(self) -> int:
        """Another number whenever servers have left or entered service since."""
        return self._service.roster

    def lose_failed(self) -> bool:
        """Takes the servers out of service that the last failing call leaves unfit for another; whether there are any.

        There are none when the call failed for another reason than a server's own failure: an engine refused the
        weights that it was sent, or the trainer gave up. RolloutError as by RolloutService.lose.
        """
        failed, self._failed = self._failed, {}
        for server in self._service.in_service:
            if server.url in failed:
                # A failed call leaves the workers of one engine out of step with each other.
                self._service.lose(server, failed[server.url], for_good=self._service.config.tensor_parallel > 1)
        return bool(failed)

    @property
    def workers_of_server(self) -> list[int]:
        """Engine workers of each server, in the service's order."""
        return [self._service.config.tensor_parallel for _ in self._service.in_service]

    async def pause(self, deadline: Deadline) -> None:
        """Stops generation between two tokens. Requests that run, or come in, go on at `resume`.

        What becomes of their keys and values is rollout.kv_on_update's to say. With recompute all caches are emptied.
        With keep cached prefixes of older weights stay; a request that carries the version in `cache_salt` has no part
        in them.
        """
        if self._service.config.shared_gpu:
            # Room for new weights alone; first, because an engine that is awake already goes on generating after it.
            await self._call_all("/wake_up?tags=weights", deadline)
        # Said either way: the default empties them in mode keep too, which the route's description denies.
        clear = "true" if self._service.config.kv_on_update == "recompute" else "false"
        await self._call_all(f"/pause?mode=keep&clear_cache={clear}", deadline)

    async def resume(self, deadline: Deadline) -> None:
        """Lets generation go on."""
        if self._service.config.shared_gpu:
            await self._call_all("/wake_up?tags=kv_cache", deadline)
        await self._call_all("/resume", deadline)

    async def sleep(self, deadline: Deadline) -> None:
        """Has the engines free their GPUs' memory until the next `pause` … `resume`, and aborts what still runs.

        Weights go to host memory (level 1) although an update brings others: what no update touches comes back too.
        """
        await self._call_all("/sleep?level=1&mode=abort", deadline)

    async def init_weight_transfer_engine(self, info_of_server: list[dict[str, Any]], deadline: Deadline) -> None:
        """Tells each server, in the service's order, how to join a weight plane."""
        await self._call_all("/init_weight_transfer_engine", deadline, [{"init_info": info} for info in info_of_server])

    async def start_weight_update(self, deadline: Deadline) -> None:
        """Prepares the engines for buckets, whatever an earlier trainer left them in."""
        await self._call_all("/collective_rpc", deadline, {"method": "abandon_weight_update"})
        await self._call_all("/start_weight_update", deadline)

    async def update_weights(self, update_info: dict[str, Any], deadline: Deadline) -> None:
        """Makes the engines take one bucket; returns when all have it."""
        await self._call_all("/update_weights", deadline, {"update_info": update_info})

    async def finish_weight_update(self, version: int, deadline: Deadline) -> None:
        """Puts the new weights into service as `version`."""
        await self._call_all("/finish_weight_update", deadline, {"weight_version": str(version)})
        self._service.note_version(version)

    async def versions(self, deadline: Deadline) -> list[int]:
        """The weight version of each server, in the service's order."""
        answers = await self._call_all("/weight_info", deadline, method="GET")
        return [int(answer["weight_version"]) for answer in answers]

    async def _call_all(
        self,
        path: str,
        deadline: Deadline,
        body: dict[str, Any] | list[dict[str, Any]] | None = None,
        method: str = "POST",
    ) -> list[Any]:
        """The servers' answers. `body` is for all, or one for each server."""
        servers = self._service.in_service
        bodies = body if isinstance(body, list) else [body] * len(servers)
        async with httpx.AsyncClient(headers=self._service.headers, timeout=None, trust_env=False) as client:
            calls = {
                asyncio.ensure_future(self._call(client, server, method, path, content)): server
                for server, content in zip(servers, bodies, strict=True)
            }
            try:
                done, pending = await asyncio.wait(
                    calls, timeout=deadline.remaining(), return_when=asyncio.FIRST_EXCEPTION
                )
                self._note_failed({calls[call].url: call.exception() for call in done}, [calls[c].url for c in pending])
                answers = {calls[call].url: call.result() for call in done}
            finally:
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
        if pending:
            silent = ", ".join(calls[call].url for call in pending)
            raise RolloutError(f"no answer to {path} from {silent} within {deadline.seconds:g} s in all")
        return [answers[server.url] for server in servers]

    def _note_failed(self, done: dict[str, BaseException | None], pending: list[str]) -> None:
        """A call that others were still busy with when it failed for one leaves their engines in an unknown state."""
        errors = {url: error for url, error in done.items() if error is not None}
        if any(isinstance(error, WeightsRefused) for error in errors.values()):
            return
        self._failed = {url: str(error) for url, error in errors.items()}
        late = "it was in the same weight update" if errors else "it did not answer in time"
        self._failed |= dict.fromkeys(pending, late)

    async def _call(self, client: httpx.AsyncClient, server: Server, method: str, path: str, body: Any) -> Any:
        try:
            response = await client.request(method, server.url + path, json=body)
        except httpx.TransportError as error:
            await self._raise_if_dying(server)
            raise RolloutError(f"{server.url}{path}: {type(error).__name__}: {error}") from error
        if not response.is_success:
            await self._raise_if_dying(server)
            words = engine_message(response)
            if WeightsRefused.MARK in words:
                raise WeightsRefused(f"{server.url}{path}: {words.split(WeightsRefused.MARK, 1)[1]}")
            raise RolloutError(f"{server.url}{path} answered {response.status_code}: {words}")
        return response.json()

    async def _raise_if_dying(self, server: Server) -> None:
        grace = Deadline(DEATH_GRACE_S)
        while server.process is not None and not grace.passed():
            if (failure := server.failure()) is not None:
                raise RolloutError(failure)
            await asyncio.sleep(0.05)


def engine_message(response: httpx.Response) -> str:
    """The engine's own words in an error response."""
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return response.text[:2000]
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
