"""Sampling that goes on while weights change: by the real collector and generator, from servers that fail in turns.

Why: at k ≥ 1 a ticket is on its way through updates, lost servers and wrong answers, and nothing else would notice that
it was lost or trained on twice. Real servers and whole runs are tests/end_to_end/test_overlap.py.
"""

import asyncio
import random
import threading
from pathlib import Path

import numpy
import pytest

from megatron_fipo.data.order import PromptSampler
from megatron_fipo.engines.access import TOKEN_VARIABLE
from megatron_fipo.engines.generate_messages import (
    EndFrame,
    ErrorFrame,
    GenerateRequest,
    PartFrame,
    SampleFrame,
    read_about,
)
from megatron_fipo.engines.states import State
from megatron_fipo.records.sample import Group, Partial, RewardResult, Sample
from megatron_fipo.records.versions import VersionSpan
from megatron_fipo.records.wire import FrameReader, encode_frame
from megatron_fipo.rollout import generator
from megatron_fipo.rollout.admission import Window
from megatron_fipo.rollout.answers import Answer, Asked, BadAnswer
from megatron_fipo.rollout.collector import RolloutCollector, Sampler
from megatron_fipo.rollout.filters import every_group
from megatron_fipo.rollout.generator import EngineGenerator
from megatron_fipo.rollout.work import Work
from tests.rollout.engines import STOP_TOKEN, VOCABULARY, problems, sampling
from tests.rollout.made_up_answers import VERSION, good, part, sample, with_first
from tests.rollout.made_up_servers import client_of

PROMPTS, SAMPLES = 3, 2


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "token")


def collector_of(client: EngineGenerator, k: int) -> RolloutCollector:
    asked = problems(7)

    async def judged(work: Work) -> Group:
        await client.complete(work)
        return work.group.with_results([RewardResult(1.0, 1.0, "", "judged")] * SAMPLES)

    sampler = Sampler(lambda problem, seed: Work(problem, SAMPLES, sampling(), seed), judged, client.loop.begin)
    order = PromptSampler(len(asked), seed=1, shuffle=True)
    return RolloutCollector(asked, order, Window(PROMPTS, k), every_group, sampler, lambda n: n, overlaps=k > 0)


def update(client: EngineGenerator, version: int) -> None:
    """A weight update: what runs goes on meanwhile, and nothing new is asked for."""
    client._pool.begin_update()
    client.loop.run(asyncio.sleep(0.01))
    client._pool.note_version(version)
    client._pool.end_update()


@pytest.mark.parametrize("k", [1, 2])
def test_no_ticket_is_lost_to_servers_that_lie_or_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """One always answers what was not asked for, one fails at random; the third goes on, and so does the training."""
    monkeypatch.setattr(generator, "RETRY_PAUSE_S", 0.01)
    drawn, lock, asked = random.Random(k), threading.Lock(), [0, 0, 0]
    versions = [VERSION]

    def own(request: GenerateRequest) -> list[bytes]:
        spans = [[str(versions[0]), 0, 3]]
        samples = [sample(index, spans=spans) for index in range(len(request.seeds))]
        return [*samples, encode_frame(EndFrame(len(request.seeds)))]

    def fails_at_random(request: GenerateRequest) -> list[bytes]:
        with lock:
            asked[1] += 1
            fails = drawn.random() < 0.3
        return [encode_frame(ErrorFrame("failed", "EngineDeadError: gone"))] if fails else own(request)

    def lies(request: GenerateRequest) -> list[bytes]:
        asked[0] += 1
        return with_first(token_ids=numpy.array([5, VOCABULARY, STOP_TOKEN], numpy.int32))(request)

    with client_of(tmp_path, lies, fails_at_random, own) as (client, warnings):
        rollouts = collector_of(client, k)
        rollouts.settle(VERSION)
        trained: list[int] = []
        for step in range(1, 9):
            batch = client.loop.run(rollouts.next_batch())
            assert max(VERSION + step - 1 - ticket.start_version for ticket in batch.tickets) <= k
            client.loop.run(asyncio.sleep(0.02))  # the policy is updated
            update(client, VERSION + step)
            versions[0] = VERSION + step
            trained += [ticket.number for ticket in rollouts.settle(VERSION + step)]
        assert trained == list(range(8 * PROMPTS))
        assert client._pool.servers[0].state is not State.SERVING and asked[0] < 10, "it is asked no more"
        assert asked[1] and any("its answers are not what was asked for" in text for text in warnings), "the control"
        client.loop.run(rollouts.break_off())


def read(content: bytes, answer: Answer) -> Sample | Partial:
    (frame,) = FrameReader().feed(content)
    about = read_about(frame.about)
    assert isinstance(about, PartFrame | SampleFrame)
    return answer.read(frame, about)


def spans_of(*spans: tuple[int, int, int]) -> list[list[object]]:
    return [[str(version), start, end] for version, start, end in spans]


def test_a_sample_knows_which_weights_sampled_which_of_its_tokens() -> None:
    asked = Asked(1, 24, [STOP_TOKEN], VOCABULARY, VERSION)
    found = read(sample(0, spans=spans_of((3, 0, 1), (4, 1, 3))), Answer(asked, present_version=lambda: 4))
    assert isinstance(found, Sample) and found.weight_version == 3
    assert found.versions == (VersionSpan(3, 0, 1), VersionSpan(4, 1, 3))
    alone = read(good(_request())[0], Answer(asked))
    assert isinstance(alone, Sample) and not alone.spans and alone.versions == (VersionSpan(3, 0, 3),)


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        (((4, 0, 1), (3, 1, 3)), "sampled by weights 4 and 3; 3 to 4 were in service"),
        (((3, 0, 1), (5, 1, 3)), "sampled by weights 3 and 5; 3 to 4 were in service"),
        (((2, 0, 3),), "sampled by weights 2; 3 to 4 were in service"),
    ],
)
def test_weights_that_were_not_in_service_are_refused(spans: tuple[tuple[int, int, int], ...], words: str) -> None:
    asked = Asked(1, 24, [STOP_TOKEN], VOCABULARY, VERSION)
    with pytest.raises(BadAnswer, match=words):
        read(sample(0, spans=spans_of(*spans)), Answer(asked, present_version=lambda: 4))


def test_a_part_is_never_said_to_be_younger_than_it_is() -> None:
    """Which of its tokens came before the update only the whole response tells; a lost server leaves parts."""
    versions = [3, 3, 4]
    answer = Answer(Asked(1, 24, [STOP_TOKEN], VOCABULARY, 3), present_version=lambda: versions[0])
    first = read(part(0), answer)
    versions.pop(0)
    second = read(part(0, start=2), answer)
    versions.pop(0)
    third = read(part(0, start=4), answer)
    assert isinstance(first, Partial) and isinstance(second, Partial) and isinstance(third, Partial)
    assert third.versions == (VersionSpan(3, 0, 6),), "it came after the update, and began before it"
    fourth = read(part(0, start=6), answer)
    assert isinstance(fourth, Partial) and fourth.weight_version == 3
    assert fourth.versions == (VersionSpan(3, 0, 6), VersionSpan(4, 6, 8))
    asked = Asked(1, 24, [STOP_TOKEN], VOCABULARY, 5)
    whole = read(sample(0, spans=spans_of((5, 0, 3))), Answer(asked, {0: fourth}))
    assert isinstance(whole, Sample)
    assert whole.versions == (VersionSpan(3, 0, 6), VersionSpan(4, 6, 8), VersionSpan(5, 8, 11))


def _request() -> GenerateRequest:
    return GenerateRequest([1], [1], 1.0, 1.0, -1, 24, [STOP_TOKEN], "", [[]], 256)
