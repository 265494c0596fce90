"""A text's log-probs by every server that samples: what tells whether an engine has the weights it was given."""

import asyncio

import httpx
import msgspec

from megatron_fipo.engines.descriptors import NoDescriptors, raise_if_exhausted
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.engines.probes import engine_message, probing
from megatron_fipo.engines.score_messages import SCORE_PATH, ScoreAnswer, ScoreRequest
from megatron_fipo.engines.states import Server
from megatron_fipo.weights.deadline import Deadline


async def score(pool: EnginePool, token_ids: list[int], deadline: Deadline) -> dict[str, list[float | None]]:
    """Log-probs of the tokens but the first, by the address of each server that samples.

    A server that does not answer by the deadline, or not by the pool's version of the weights, is lost to the pool and
    left out.
    """
    request = ScoreRequest(token_ids, cache_salt=f"probe-{pool.weight_version}")
    servers = pool.serving
    async with probing(pool.headers) as http:
        answers = await asyncio.gather(*(_ask(server, http, request, deadline) for server in servers))
    found = {}
    for server, answer in zip(servers, answers, strict=True):
        problem = _problem(answer, len(token_ids), pool.weight_version)
        if isinstance(answer, ScoreAnswer) and problem is None:
            found[server.url] = answer.log_probs
        elif problem is not None:
            pool.lose(server, f"{SCORE_PATH} after a weight update: {problem}")
    return found


async def _ask(
    server: Server, http: httpx.AsyncClient, request: ScoreRequest, deadline: Deadline
) -> ScoreAnswer | str | None:
    """The answer, or what came in its place; None where this process cannot ask."""
    try:
        async with asyncio.timeout(deadline.remaining()):
            content = msgspec.json.encode(request)
            response = await http.post(server.url + SCORE_PATH, content=content, timeout=None)
        if not response.is_success:
            return f"{response.status_code}: {engine_message(response)}"
        return msgspec.json.decode(response.content, type=ScoreAnswer)
    except TimeoutError:
        return f"no answer within {deadline.seconds:g} s"
    except (httpx.TransportError, msgspec.DecodeError) as error:
        try:
            raise_if_exhausted(error)
        except NoDescriptors:
            return None
        return f"{type(error).__name__}: {error}"


def _problem(answer: ScoreAnswer | str | None, tokens: int, version: int | None) -> str | None:
    if not isinstance(answer, ScoreAnswer):
        return answer
    if len(answer.log_probs) != tokens - 1:
        return f"{len(answer.log_probs)} log-probs came for {tokens} tokens"
    return None if answer.version == str(version) else f"its weights are of version {answer.version}, not {version}"
