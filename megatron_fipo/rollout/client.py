"""Sampling from the rollout service: token ids in, token ids and log-probs out. A synchronous facade for rank 0.

One HTTP request a group, sent to the server with the fewest outstanding, so many at a time that engines stay busy. The
seed of a request fixes its tokens, whichever server answers; so what a lost server leaves undone, the others do.
"""

import asyncio
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from megatron_fipo.errors import RolloutError
from megatron_fipo.rollout.control import ControlPlane, engine_message
from megatron_fipo.rollout.service import WORKERS_HEALTH, RolloutService, Server
from megatron_fipo.samples import Group, Problem, Response

MAX_RETRIES = 3
RETRY_PAUSE_S = 0.5
CONNECT_TIMEOUT_S = 30.0
WATCH_EVERY_S = 10.0


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled. Temperature 0 is greedy; top_k −1 is off; a stop token ends a response, kept in it."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_token_ids: list[int]


@dataclass(frozen=True)
class Progress:
    """How far a `generate` call has come."""

    groups: int
    total_groups: int
    tokens: int


class RolloutClient:
    """Samples groups from all servers of a service. Its `control` drives their weights.

    `retries` counts requests that were sent again, over the client's life. Used from the thread that started the
    service.
    """

    def __init__(self, service: RolloutService, revive: Callable[[], None] | None = None):
        """`revive` is called, between requests, when no server is left: it has to bring the service back or raise."""
        self.control = ControlPlane(service)
        self.retries = 0
        self._service = service
        self._revive = revive or self._give_up
        self._runner = asyncio.Runner()
        self._http = httpx.AsyncClient(
            headers=service.headers,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )
        self._outstanding: dict[str, int] = {}
        self._watches: dict[str, asyncio.Task[str]] = {}

    def generate(
        self,
        problems: Sequence[Problem],
        samples_per_prompt: int,
        sampling: Sampling,
        seeds: Sequence[int],
        on_group: Callable[[Group], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[Group]:
        """Samples `samples_per_prompt` responses to each problem; groups come back in the problems' order.

        `seeds` has one seed a problem. `on_group` gets each group as it arrives, in this thread, and has to be quick;
        `on_progress` follows it. Greedy samples of a problem are all the same.

        A server that dies, or whose engine is silent for rollout.hang_timeout_s, is lost to the service, and its
        requests go to the others.

        RolloutError when a server refuses a request, when a request fails more than MAX_RETRIES times on servers that
        are well, when a group takes longer than rollout.request_timeout_s, when an answer is not what was asked for, or
        when a server may not be lost (RolloutService.lose).
        """
        longest = self._service.config.max_prompt_length
        for problem in problems:
            if not 0 < len(problem.token_ids) <= longest:
                raise RolloutError(
                    f"problem {problem.id} has a prompt of {len(problem.token_ids)} tokens; "
                    f"the servers take 1 to rollout.max_prompt_length={longest}"
                )
        call = _Call(len(problems), on_group, on_progress)
        groups: dict[int, Group] = {}
        while True:
            missing = [index for index in range(len(problems)) if index not in groups]
            self._runner.run(self._generate(problems, samples_per_prompt, sampling, seeds, call, missing, groups))
            if len(groups) == len(problems):
                return [groups[index] for index in range(len(problems))]
            self._revive()

    def close(self) -> None:
        """Closes the connections; the service stays. May be called twice."""
        if self._http.is_closed:
            return
        self._runner.run(self._end_requests())
        self._runner.close()

    async def _end_requests(self) -> None:
        """A `generate` that was interrupted has left its tasks behind: without connections they would fail aloud."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._http.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _generate(
        self,
        problems: Sequence[Problem],
        samples: int,
        sampling: Sampling,
        seeds: Sequence[int],
        call: "_Call",
        missing: list[int],
        groups: dict[int, Group],
    ) -> None:
        """Adds the groups of the problems in `missing` to `groups`: all of them, unless no server is left."""
        servers = self._service.in_service
        self._outstanding = {server.url: 0 for server in servers}
        # One group more than a server can run at once keeps it busy while an answer travels.
        per_server = math.ceil(self._service.config.max_num_seqs / samples) + 1
        slots = asyncio.Semaphore(per_server * max(1, len(servers)))

        async def sample(index: int) -> None:
            async with slots:
                group = await self._sample_group(problems[index], samples, sampling, seeds[index], call)
            if group is not None:
                groups[index] = group
                call.arrived(group)

        try:
            self._watches = {server.url: asyncio.ensure_future(self._watch(server)) for server in servers}
            async with asyncio.TaskGroup() as running:
                for index in missing:
                    running.create_task(sample(index))
        # No `except*`: what is raised in one is a group again in Python 3.11.0 to 3.11.3.
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        finally:
            for watch in self._watches.values():
                watch.cancel()

    async def _sample_group(
        self, problem: Problem, samples: int, sampling: Sampling, seed: int, call: "_Call"
    ) -> Group | None:
        """The group; None when no server is left to ask."""
        body = _request(problem, samples, sampling, seed)
        call.pending.add(problem.id)
        try:
            answer, server = await self._request_with_retries(body)
        except _NoServer:
            return None
        except TimeoutError:
            pending = sorted(call.pending)
            raise RolloutError(
                f"problem {problem.id} got no answer within rollout.request_timeout_s="
                f"{self._service.config.request_timeout_s:g} s; "
                f"{len(pending)} requests are pending: {', '.join(pending[:8])}{' …' if len(pending) > 8 else ''}"
            ) from None
        call.pending.discard(problem.id)
        where = f"{server.url}, problem {problem.id}"
        responses = _responses(answer, body["sampling_params"]["n"], sampling.max_tokens, where)
        return Group(problem, responses * (samples // len(responses)))

    async def _request_with_retries(self, body: dict[str, Any]) -> tuple[dict[str, Any], Server]:
        failed: dict[str, str] = {}
        attempts = 0
        while True:
            server = self._pick(avoid=set(failed))
            try:
                response = await self._post_watched(server, body)
                if response.is_success:
                    return response.json(), server
                problem = f"{response.status_code}: {engine_message(response)}"
                if response.is_client_error:
                    # The request itself is wrong: every server would say the same.
                    raise RolloutError(f"{server.url} refused a request with {problem}")
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            if server.lost is None and (silence := await self._silence(server)) is not None:
                self._service.lose(server, f"{problem}; {silence}")
            self.retries += 1
            if server.lost is None:
                failed[server.url] = problem
                attempts += 1
                if attempts > MAX_RETRIES:
                    reasons = "; ".join(f"{url}: {reason}" for url, reason in failed.items())
                    raise RolloutError(f"a request failed {attempts} times: {reasons}")
                await asyncio.sleep(RETRY_PAUSE_S)

    async def _post_watched(self, server: Server, body: dict[str, Any]) -> httpx.Response:
        """The answer of `server`. ReadError when its engine falls silent, TimeoutError after request_timeout_s."""
        watch = self._watches[server.url]
        self._outstanding[server.url] += 1
        try:
            async with asyncio.timeout(self._service.config.request_timeout_s):
                post = asyncio.ensure_future(self._http.post(f"{server.url}/inference/v1/generate", json=body))
                try:
                    await asyncio.wait({post, watch}, return_when=asyncio.FIRST_COMPLETED)
                    if post.done():
                        return post.result()
                    self._service.lose(server, watch.result())
                    raise httpx.ReadError(watch.result())
                finally:
                    post.cancel()
                    await asyncio.gather(post, return_exceptions=True)
        finally:
            self._outstanding[server.url] -= 1

    async def _watch(self, server: Server) -> str:
        """Returns when the server's engine has fallen silent, with how."""
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            if (silence := await self._silence(server)) is not None:
                return silence

    async def _silence(self, server: Server) -> str | None:
        """Asks the engine's workers for a sign of life; None when they give it, else what came in its place."""
        timeout_s = self._service.config.hang_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._http.post(f"{server.url}/collective_rpc", json=WORKERS_HEALTH)
        except TimeoutError:
            return f"its engine has not answered for rollout.hang_timeout_s={timeout_s:g} s"
        except httpx.TransportError as error:
            return f"{type(error).__name__}: {error}"
        return None if response.is_success else f"{response.status_code}: {engine_message(response)}"

    def _pick(self, avoid: set[str]) -> Server:
        """The server with the fewest outstanding requests, one that has not failed this request if there is any."""
        in_service = self._service.in_service
        if not in_service:
            raise _NoServer
        servers = [server for server in in_service if server.url not in avoid] or in_service
        return min(servers, key=lambda server: self._outstanding[server.url])

    def _give_up(self) -> None:
        raise RolloutError(f"no vLLM server is left: {self._service.losses_in_words()}")


class _NoServer(Exception):
    """All servers are out of service."""


class _Call:
    """What one `generate` call keeps count of."""

    def __init__(
        self,
        total: int,
        on_group: Callable[[Group], None] | None,
        on_progress: Callable[[Progress], None] | None,
    ):
        self.pending: set[str] = set()
        self._total, self._on_group, self._on_progress = total, on_group, on_progress
        self._groups = self._tokens = 0

    def arrived(self, group: Group) -> None:
        self._groups += 1
        self._tokens += sum(len(response.token_ids) for response in group.responses)
        if self._on_group is not None:
            self._on_group(group)
        if self._on_progress is not None:
            self._on_progress(Progress(self._groups, self._total, self._tokens))


def _request(problem: Problem, samples: int, sampling: Sampling, seed: int) -> dict[str, Any]:
    return {
        "token_ids": problem.token_ids,
        "sampling_params": {
            # vLLM refuses more than one greedy sample, since all are the same.
            "n": 1 if sampling.temperature == 0 else samples,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_tokens,
            "stop_token_ids": sampling.stop_token_ids,
            "seed": _spread(seed),
            # The log-prob of the sampled token alone.
            "logprobs": 0,
            "detokenize": False,
        },
    }


def _spread(seed: int) -> int:
    """A 62-bit seed from `seed`. vLLM gives sample i of a group seed + i: seeds in a row would share random numbers."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest()) >> 2


def _responses(answer: dict[str, Any], samples: int, max_tokens: int, where: str) -> list[Response]:
    """The group's responses in index order. RolloutError if they are not `samples` whole ones with their log-probs."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if len(choices) != samples:
        raise RolloutError(f"{where}: {len(choices)} responses came back, {samples} were asked for")
    return [_response(choice, max_tokens, f"{where}, response {choice['index']}") for choice in choices]


def _response(choice: dict[str, Any], max_tokens: int, where: str) -> Response:
    token_ids, content = choice["token_ids"], choice["logprobs"]["content"]
    if not 0 < len(token_ids) <= max_tokens:
        raise RolloutError(f"{where} has {len(token_ids)} tokens; 1 to {max_tokens} were asked for")
    if [entry["token_id"] for entry in content] != token_ids:
        raise RolloutError(f"{where}: {len(token_ids)} tokens with {len(content)} log-probs that are not theirs")
    log_probs = [entry["logprob"] for entry in content]
    if not all(log_prob is not None and math.isfinite(log_prob) for log_prob in log_probs):
        raise RolloutError(f"{where} has log-probs that are not finite: the engine's weights or logits are broken")
    if choice["finish_reason"] not in ("stop", "length"):
        raise RolloutError(f"{where} ended with {choice['finish_reason']!r} instead of stop or length")
    return Response(token_ids, log_probs, choice["finish_reason"], _version(choice["weight_versions"], where))


def _version(spans: list[dict[str, Any]] | None, where: str) -> int:
    """The oldest of the versions that sampled a response; more than one only if an update came in its middle."""
    try:
        return min(int(span["version"]) for span in spans or [])
    except ValueError:
        raise RolloutError(f"{where} has weight versions {spans}; each should be an integer") from None


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure itself: the others are its consequences or its equals."""
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
