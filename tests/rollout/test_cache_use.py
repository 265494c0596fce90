"""Why: a sequence that an engine puts back for lack of memory is computed twice, and nothing but the time shows it.

One real vLLM server on the CPU whose cache holds a few of the sequences that it may run; with places by memory, and
without as the control. Does not cover GPUs, nor engines in processes of their own (tensor parallelism).
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from megatron_fipo.engines import starter
from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.cache_use import CacheUseOfSteps
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.engines.states import Server
from megatron_fipo.engines.use_messages import CacheUse
from megatron_fipo.rollout.generator import EngineGenerator
from tests.rollout.engines import generate, problems, rollout_config, sampling, save_tiny_model, serving_pool

BLOCKS, BLOCK, RESPONSE = 40, 128, 400
GROUPS, SAMPLES = 12, 8


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginePool]:
    """A server with little memory."""
    directory: Path = tmp_path_factory.mktemp("cache")
    save_tiny_model(directory / "model", seed=0, max_position_embeddings=1024)
    config = rollout_config(max_response_length=RESPONSE, max_num_seqs=64)
    with pytest.MonkeyPatch.context() as patch, EnginePool(config, directory / "model", directory, seed=0) as pool:
        options = starter.server_arguments
        more = f"--num-gpu-blocks-override={BLOCKS}"
        patch.setattr(starter, "server_arguments", lambda *given, **named: [*options(*given, **named), more])
        pool.start()
        pool.wait_ready()
        yield pool


@pytest.mark.slow
def test_a_server_is_asked_for_what_its_memory_holds(small: EnginePool) -> None:
    """The same tokens come either way, and hardly a sequence is put back where places are by memory."""
    (server,) = small.servers
    assert server.cache is not None and server.cache.block == BLOCK
    assert 0.8 * BLOCKS * BLOCK < server.cache.tokens <= BLOCKS * BLOCK

    def sampled(client: EngineGenerator) -> tuple[list[list[list[int]]], dict[str, float]]:
        client.forget_occupancy()
        asked = problems(GROUPS), SAMPLES, sampling(max_tokens=RESPONSE)
        groups = generate(client, *asked, seeds=range(GROUPS))
        tokens = [[sample.token_ids.tolist() for sample in group.samples] for group in groups]
        return tokens, client.end_step()

    with EngineGenerator(small) as client:
        by_memory, told = sampled(client)
        assert client.end_step()["kv_cache_peak"] == 0, "it is that of a step"
    known, server.cache = server.cache, None
    with EngineGenerator(small) as client:
        by_places, too_many = sampled(client)
    server.cache = known
    assert by_memory == by_places
    assert too_many["kv_cache_peak"] == 1 and too_many["preemptions"] > 0.3 * GROUPS * SAMPLES, "the control"
    assert told["preemptions"] <= 0.02 * GROUPS * SAMPLES
    assert told["kv_cache_peak"] > 0.5, "memory is used"


def test_preemptions_are_those_of_the_step_over_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has started again counts from 0. Answers are made up: a real one restarts for ten seconds."""
    monkeypatch.setenv(TOKEN_VARIABLE, "token")
    pool = serving_pool([f"http://here:{port}" for port in range(3)], tmp_path)
    counts: dict[str, int | None] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        count = counts[f"http://{request.url.netloc.decode()}"]
        if count is None:
            return httpx.Response(404)
        return httpx.Response(200, content=msgspec.json.encode(CacheUse(1000, 16, count, count / 100)))

    async def steps() -> list[dict[str, float]]:
        use, told = CacheUseOfSteps(pool), []
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
            for change in changes:
                change()
                told.append(await use.take(http))
        return told

    first, second, third = pool.servers
    changes = [
        lambda: counts.update({first.url: 5, second.url: 2, third.url: None}),
        lambda: counts.update({first.url: 9}),
        lambda: again(first, 30),
        lambda: counts.update(dict.fromkeys(counts)),
    ]

    def again(server: Server, count: int) -> None:
        server.life += 1
        counts[server.url] = count

    assert asyncio.run(steps()) == [
        {"preemptions": 7, "kv_cache_peak": 0.05},
        {"preemptions": 4, "kv_cache_peak": 0.09},
        {"preemptions": 30, "kv_cache_peak": 0.3},
        {},
    ]
