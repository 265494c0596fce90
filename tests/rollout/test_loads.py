"""Why: a server that is asked for more than its memory holds computes much of it twice; one that is asked for less
stands idle; and work in the wrong order makes all servers wait for the last group of a step.

What a real engine makes of it is test_cache_use.py.
"""

import asyncio
import random

import pytest

from megatron_fipo.engines.states import Server
from megatron_fipo.engines.use_messages import CacheUse
from megatron_fipo.rollout.loads import WAITING_GROUPS, Loads, ResponseLengths
from megatron_fipo.rollout.work import Work, WorkQueue
from tests.rollout.engines import problems, rollout_config, sampling

LONGEST, SAMPLES, PROMPT, BLOCK = 1000, 4, 12, 16


def loads(**changes: int) -> Loads:
    return Loads(rollout_config(max_response_length=LONGEST, max_num_seqs=64, **changes))


def server(tokens: int | None, block: int = BLOCK) -> Server:
    cache = None if tokens is None else CacheUse(tokens, block, 0, 0.0)
    return Server("http://here:1", cache=cache)


def work(number: int = 0) -> Work:
    return Work(problems(8, PROMPT)[number], SAMPLES, sampling(), number)


def taken(asked: Loads, at: Server) -> int:
    """Samples that a server gets before it has no room for a group."""
    while asked.with_room([at], work()) is at:
        asked.count(at, SAMPLES)
    return asked._outstanding[at.url]


def ended(lengths: ResponseLengths, *groups: list[int]) -> None:
    for number, group in enumerate(groups):
        lengths.note(problems(8)[number % 8], group)


def test_places_are_those_of_the_engine_where_memory_is_ample_or_unknown() -> None:
    most = 64 + WAITING_GROUPS * SAMPLES
    assert taken(loads(), server(None)) == taken(loads(), server(10**6)) == most


def test_a_server_has_what_its_cache_holds_of_sequences_half_way() -> None:
    asked, at = loads(), server(20 * (PROMPT + 100 + BLOCK // 2))
    asked_before, tokens = loads(), at.cache.tokens if at.cache else 0
    assert taken(asked_before, at) == SAMPLES * (tokens // (PROMPT + LONGEST // 2 + BLOCK // 2) // SAMPLES)
    ended(asked.lengths, *[[200] * SAMPLES] * 8)
    assert taken(asked, at) == 20, "each holds 100 of its 200 tokens on average"


def test_a_whole_group_has_room_on_an_empty_server() -> None:
    asked, at = loads(), server(2 * PROMPT)
    assert taken(asked, at) == SAMPLES
    asked.count(at, -1)
    assert asked.with_room([at], work()) is None


def test_short_sequences_take_a_block_each() -> None:
    asked = loads()
    ended(asked.lengths, *[[2] * SAMPLES] * 8)
    assert taken(asked, server(128 * 8, block=128)) == 8


def test_what_is_held_is_that_of_a_queue_in_its_steady_state() -> None:
    """Against a simulation: places that are never empty, and what they hold at random times."""
    drawn, lengths = random.Random(1), ResponseLengths(LONGEST)
    sampled = [[min(LONGEST, round(drawn.lognormvariate(5, 0.8))) for _ in range(SAMPLES)] for _ in range(256)]
    ended(lengths, *sampled)
    flat = [length for group in sampled for length in group]
    ages = [age for length in flat for age in range(length)]  # each token of each is as likely to be the next
    assert lengths.held == pytest.approx(sum(ages) / len(ages), rel=0.01)
    assert lengths.held < 0.95 * sum(flat) / len(flat), "the control: it is not the mean length"


def test_the_first_groups_to_end_are_not_believed() -> None:
    lengths = ResponseLengths(LONGEST)
    ended(lengths, *[[10] * SAMPLES] * 7)
    assert lengths.held == LONGEST / 2
    ended(lengths, [10] * SAMPLES)
    assert lengths.held == 5


def test_what_was_long_ago_is_forgotten() -> None:
    lengths = ResponseLengths(LONGEST)
    ended(lengths, *[[900] * SAMPLES] * 50, *[[10] * SAMPLES] * 256)
    assert lengths.held == 5


def test_the_fewest_samples_come_next_among_servers() -> None:
    asked, first, second = loads(), Server("http://a:1"), Server("http://b:1")
    asked.count(first, SAMPLES)
    assert asked.with_room([first, second], work()) is second
    asked.count(second, 2 * SAMPLES)
    assert asked.with_room([first, second], work()) is first


def test_an_unknown_problem_is_expected_to_be_as_long_as_all_lately() -> None:
    lengths = ResponseLengths(LONGEST)
    assert lengths.expected(problems(8)[0]) == 0
    ended(lengths, [100] * SAMPLES, [300] * SAMPLES)
    assert [lengths.expected(problem) for problem in problems(8)[:3]] == [100, 300, 200]


def test_the_longest_come_first_and_the_oldest_among_equals() -> None:
    async def order() -> list[int]:
        queue = WorkQueue()
        for number, (first, expected) in enumerate([(False, 5), (False, 9), (True, 1), (False, 5), (True, 2)]):
            queue.add(work(number), first=first, expected=expected)
        return [queue.take().work.seed for _ in range(5)]

    assert asyncio.run(order()) == [4, 2, 1, 0, 3]
