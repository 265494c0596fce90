"""Questions to a server about itself. They change nothing in its pool, and each has a deadline."""

import asyncio

import httpx
import msgspec

from megatron_fipo.config import RolloutConfig
from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.connections import tls
from megatron_fipo.engines.descriptors import raise_if_exhausted
from megatron_fipo.engines.server_process import family, shared_files
from megatron_fipo.engines.states import Server
from megatron_fipo.engines.use_messages import USE_PATH, CacheUse
from megatron_fipo.errors import RolloutError
from megatron_fipo.weights.transport_records import WorkerPlace

PROBE_TIMEOUT_S = 10.0
INITIAL_VERSION = 0
_WORKERS_HEALTH = {"method": "check_health"}
"""A call for /collective_rpc, which workers that hang do not answer while /health still does."""


_WORKERS_PLACES = {"method": "place"}


class _Places(msgspec.Struct):
    results: tuple[WorkerPlace, ...]


def probing(headers: dict[str, str]) -> httpx.AsyncClient:
    """A client for the questions below."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(headers=headers, timeout=PROBE_TIMEOUT_S, limits=limits, trust_env=False, verify=tls())


async def why_not_ready(server: Server, http: httpx.AsyncClient, config: RolloutConfig) -> str | None:
    """None when it answers, and its weights are labelled INITIAL_VERSION now; else why not yet.

    Raises:
        RolloutError: it is another server than the configuration says.
    """
    try:
        response = await http.get(f"{server.url}/health")
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise RolloutError(f"the server at {server.url} refused the token in {TOKEN_VARIABLE}")
        response.raise_for_status()
        await _check_workers(server, http, config.tensor_parallel)
        (await http.post(f"{server.url}/collective_rpc", json=_WORKERS_HEALTH)).raise_for_status()
        server.cache = await cache_use(server, http)
        version = {"new_version": str(INITIAL_VERSION)}
        (await http.post(f"{server.url}/update_weight_version", json=version)).raise_for_status()
    except httpx.HTTPError as error:
        raise_if_exhausted(error)
        return f"{type(error).__name__}: {error}"
    if server.process is not None:
        server.segments = shared_files(family(server.process))
    return None


async def _check_workers(server: Server, http: httpx.AsyncClient, expected: int) -> None:
    response = await http.get(f"{server.url}/get_world_size")
    if response.status_code == httpx.codes.NOT_FOUND:
        raise RolloutError(
            f"the server at {server.url} has no routes for weight updates: "
            "start it with python -m megatron_fipo.engines.server"
        )
    workers = response.raise_for_status().json()["world_size"]
    if workers != expected:
        raise RolloutError(
            f"the server at {server.url} has {workers} workers, but rollout.tensor_parallel is {expected}"
        )
    response = (await http.post(f"{server.url}/collective_rpc", json=_WORKERS_PLACES)).raise_for_status()
    try:
        server.workers = msgspec.json.decode(response.content, type=_Places).results
    except msgspec.DecodeError as error:
        raise RolloutError(
            f"the server at {server.url} does not say where its workers run ({error}): start it with python -m "
            "megatron_fipo.engines.server of this version"
        ) from None


async def cache_use(server: Server, http: httpx.AsyncClient) -> CacheUse | None:
    """How full its cache was since this was asked last; None where it does not say in time."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            answer = (await http.post(server.url + USE_PATH, timeout=None)).raise_for_status()
        return msgspec.json.decode(answer.content, type=CacheUse)
    except (TimeoutError, httpx.HTTPError, msgspec.DecodeError):
        return None


async def why_unfit(server: Server, http: httpx.AsyncClient) -> str | None:
    """Why a server that should be in service can neither sample nor get weights."""
    if (failure := server.failure()) is not None:
        return failure
    try:
        response = await http.get(f"{server.url}/weight_info")
        version = response.raise_for_status().json()["weight_version"]
    except httpx.HTTPError as error:
        raise_if_exhausted(error)
        return f"{type(error).__name__}: {error}"
    # Ours are numbers.
    return None if version.isdigit() else "somebody has started it again"


async def silence(server: Server, http: httpx.AsyncClient, timeout_s: float) -> str | None:
    """Asks the engine's workers for a sign of life; None when they give it, else what came in its place."""
    try:
        async with asyncio.timeout(timeout_s):
            response = await http.post(f"{server.url}/collective_rpc", json=_WORKERS_HEALTH, timeout=None)
    except TimeoutError:
        return f"its engine has not answered for rollout.hang_timeout_s={timeout_s:g} s"
    except httpx.TransportError as error:
        raise_if_exhausted(error)
        return f"{type(error).__name__}: {error}"
    return None if response.is_success else f"{response.status_code}: {engine_message(response)}"


def engine_message(response: httpx.Response) -> str:
    """The engine's own words in an error response."""
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return response.text[:2000]
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
