"""Work that is asked for at awkward moments: as the last ends, during a weight update, and just as nobody wants it.

Why: work that is dealt to nobody waits for ever, without a deadline, and a place that is never given back makes a
server look full for the rest of a run. What comes of the answers is test_answers.py.
"""

import asyncio
import threading
from pathlib import Path

import pytest

from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.generate_messages import GenerateRequest
from megatron_fipo.rollout.generator import EngineGenerator
from megatron_fipo.rollout.work import Work
from tests.rollout.engines import problems, sampling
from tests.rollout.made_up_answers import good
from tests.rollout.made_up_servers import client_of

DEADLINE_S = 20.0


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "token")


def work(number: int = 0) -> Work:
    return Work(problems(1)[0], 2, sampling(), number)


async def in_time(client: EngineGenerator, asked: Work) -> None:
    await asyncio.wait_for(client.complete(asked), DEADLINE_S)


def test_work_that_comes_as_the_last_ends_is_sampled(tmp_path: Path) -> None:
    async def one_after_the_other(client: EngineGenerator) -> None:
        for turns in range(12):
            await in_time(client, work())
            for _ in range(turns):
                await asyncio.sleep(0)
            await in_time(client, work(1))

    with client_of(tmp_path, good) as (client, _):
        client.loop.run(one_after_the_other(client))


def test_places_are_given_back_whenever_nobody_wants_them_any_more(tmp_path: Path) -> None:
    """Also in the turn in which a server is about to be asked."""

    async def cancelled(client: EngineGenerator, turns: int) -> None:
        client._pool.begin_update()  # so that it waits
        waiting = asyncio.ensure_future(client.complete(work()))
        await asyncio.sleep(0.01)
        client._pool.end_update()
        client._wake()
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.sleep(0.05)
        assert not client._queue and not +client._loads._outstanding and client._occupancy._samples == 0, turns

    with client_of(tmp_path, good) as (client, _):
        for turns in range(6):
            client.loop.run(cancelled(client, turns))


def test_requests_of_a_server_that_an_update_has_lost_go_to_another(tmp_path: Path) -> None:
    """A control call tells the pool; whoever waits for the server's answer has to hear of it too."""
    asked, never = threading.Event(), threading.Event()

    def silent(request: GenerateRequest) -> list[bytes]:
        asked.set()
        never.wait(DEADLINE_S)
        return good(request)

    async def go_on(client: EngineGenerator) -> None:
        sampled = asyncio.ensure_future(client.complete(work()))
        await asyncio.to_thread(asked.wait, DEADLINE_S)
        client._pool.begin_update()
        client._pool.lose(client._pool.servers[0], "it did not answer in time")
        client._pool.end_update()
        await asyncio.wait_for(sampled, DEADLINE_S / 2)

    with client_of(tmp_path, silent, good) as (client, _):
        client.loop.run(go_on(client))
        never.set()


@pytest.mark.parametrize("works", [False, True])
def test_an_update_that_lost_a_server_is_repeated_whoever_repairs_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, works: bool
) -> None:
    """Work that waits has the pool repaired at once, and the trainer asks only later."""

    async def nothing() -> None: ...

    with client_of(tmp_path, good, good) as (client, _):
        pool = client._pool
        monkeypatch.setattr(pool, "_lose_unfit", nothing)
        pool.admit()
        pool.begin_update()
        waiting = client.loop.begin(client.complete(work())) if works else None
        client.loop.run(asyncio.sleep(0.01))
        assert not pool.replace_failed(), "the control: none is lost yet"
        pool.lose(pool.servers[0], "it failed in the update")
        client.loop.run(asyncio.sleep(0.01))
        assert pool.replace_failed()
        pool.admit()
        assert not pool.replace_failed(), "it was not there when the next one began"
        if waiting is not None:
            waiting.cancel()
            client.loop.run(asyncio.sleep(0))
