"""Sampling from the rollout service: token ids in, token ids and log-probs out. A synchronous facade for rank 0.

One HTTP request a group, sent to the server with the fewest outstanding, so many at a time that engines stay busy. The
seed of a request fixes its tokens, whichever server answers.
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
from megatron_fipo.rollout.service import RolloutService, Server
from megatron_fipo.samples import Group, Problem, Response

MAX_RETRIES = 3
RETRY_PAUSE_S = 0.5
CONNECT_TIMEOUT_S = 30.0


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

    `retries` counts requests that were sent again, over the client's life. Used from one thread.
    """

    def __init__(self, service: RolloutService):
        self.control = ControlPlane(service)
        self.retries = 0
        self._service = service
        self._runner = asyncio.Runner()
        self._http = httpx.AsyncClient(
            headers=service.headers,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )
        self._outstanding: dict[str, int] = {}

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

        RolloutError when a server has died or refuses a request, when a request fails more than MAX_RETRIES times, when
        a group takes longer than rollout.request_timeout_s, or when an answer is not what was asked for.
        """
        longest = self._service.config.max_prompt_length
        for problem in problems:
            if not 0 < len(problem.token_ids) <= longest:
                raise RolloutError(
                    f"problem {problem.id} has a prompt of {len(problem.token_ids)} tokens; "
                    f"the servers take 1 to rollout.max_prompt_length={longest}"
                )
        call = _Call(len(problems), on_group, on_progress)
        return self._runner.run(self._generate(problems, samples_per_prompt, sampling, seeds, call))

    def close(self) -> None:
        """Closes the connections; the service stays. May be called twice."""
        if self._http.is_closed:
            return
        self._runner.run(self._http.aclose())
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _generate(
        self, problems: Sequence[Problem], samples: int, sampling: Sampling, seeds: Sequence[int], call: "_Call"
    ) -> list[Group]:
        self._outstanding = {server.url: 0 for server in self._service.servers}
        # One group more than a server can run at once keeps it busy while an answer travels.
        per_server = math.ceil(self._service.config.max_num_seqs / samples) + 1
        slots = asyncio.Semaphore(per_server * len(self._service.servers))

        async def sample(problem: Problem, seed: int) -> Group:
            async with slots:
                group = await self._sample_group(problem, samples, sampling, seed, call)
            call.arrived(group)
            return group

        tasks: list[asyncio.Task[Group]] = []
        try:
            async with asyncio.TaskGroup() as running:
                tasks = [
                    running.create_task(sample(problem, seed)) for problem, seed in zip(problems, seeds, strict=True)
                ]
        except* Exception as failures:
            raise _first(failures) from None
        return [task.result() for task in tasks]

    async def _sample_group(
        self, problem: Problem, samples: int, sampling: Sampling, seed: int, call: "_Call"
    ) -> Group:
        body = _request(problem, samples, sampling, seed)
        timeout_s = self._service.config.request_timeout_s
        call.pending.add(problem.id)
        try:
            async with asyncio.timeout(timeout_s):
                answer, server = await self._request_with_retries(body)
        except TimeoutError:
            pending = sorted(call.pending)
            raise RolloutError(
                f"problem {problem.id} got no answer within rollout.request_timeout_s={timeout_s:g} s; "
                f"{len(pending)} requests are pending: {', '.join(pending[:8])}{' …' if len(pending) > 8 else ''}"
            ) from None
        call.pending.discard(problem.id)
        where = f"{server.url}, problem {problem.id}"
        responses = _responses(answer, body["sampling_params"]["n"], sampling.max_tokens, where)
        return Group(problem, responses * (samples // len(responses)))

    async def _request_with_retries(self, body: dict[str, Any]) -> tuple[dict[str, Any], Server]:
        failed: dict[str, str] = {}
        for attempt in range(MAX_RETRIES + 1):
            self._service.check()
            server = self._pick(avoid=set(failed))
            self._outstanding[server.url] += 1
            try:
                response = await self._http.post(f"{server.url}/inference/v1/generate", json=body)
                if response.is_success:
                    return response.json(), server
                failed[server.url] = f"{response.status_code}: {engine_message(response)}"
                if response.is_client_error:
                    # The request itself is wrong: every server would say the same.
                    raise RolloutError(f"{server.url} refused a request with {failed[server.url]}")
            except httpx.TransportError as error:
                failed[server.url] = f"{type(error).__name__}: {error}"
            finally:
                self._outstanding[server.url] -= 1
            # Time for a dying server to be gone, so that its log is shown and not its broken connection.
            await asyncio.sleep(RETRY_PAUSE_S)
            self._service.check()
            self.retries += attempt < MAX_RETRIES
        reasons = "; ".join(f"{url}: {reason}" for url, reason in failed.items())
        raise RolloutError(f"a request failed {MAX_RETRIES + 1} times: {reasons}")

    def _pick(self, avoid: set[str]) -> Server:
        """The server with the fewest outstanding requests, one that has not failed this request if there is any."""
        servers = [server for server in self._service.servers if server.url not in avoid] or self._service.servers
        return min(servers, key=lambda server: self._outstanding[server.url])


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


def _first(failures: BaseExceptionGroup[Exception]) -> BaseException:
    """The first failure itself: the others are its consequences or its equals."""
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
