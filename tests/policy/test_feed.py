"""Why: a rank that holds tokens of another replica takes memory that grows with the run, and one that trains on them
trains twice. A fetch that fails on one rank only would leave the others in a collective until its deadline.

DP 2 × PP 2 × TP 2 in one launch, over real stores, one of them a process that is stopped and killed. Context
parallelism's chunks are in test_streams.py and test_batches.py. Not covered: stores of other nodes; CUDA.
"""

from collections import Counter
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.policy.feed_ranks import GROUPS, PROMPT_IDS, SAMPLES, SHORT_S, lengths

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(
        "tests.policy.feed_ranks:feeds", 8, {"parallel": {"tensor": 2, "pipeline": 2, "data": 2}}, timeout=200
    )


def tokens_of(places: list[int]) -> list[list[int]]:
    """What `feed_ranks.held` finds of token ids, for exactly these samples."""
    counted: Counter[int] = Counter()
    for place in places:
        prompt, response = lengths(place)
        counted[PROMPT_IDS + place // SAMPLES] += prompt
        counted[place] += response
    return [[value, count] for value, count in sorted(counted.items())]


def test_each_replica_trains_on_its_own_and_together_they_train_on_all(ranks: list[dict[str, Any]]) -> None:
    for stage in range(2):
        for tensor in range(2):
            of = [r["replica"] for r in ranks if (r["place"]["stage"], r["place"]["tensor"]) == (stage, tensor)]
            assert sorted(of[0] + of[1]) == list(range(GROUPS * SAMPLES))


def test_no_rank_holds_another_replicas_tokens_and_those_that_read_none_hold_none(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        place, held = rank["place"], rank["held"]
        if place["tensor"] > 0:
            assert held == {}
            continue
        assert held["token_ids"] == tokens_of(rank["replica"])
        assert ("rollout_log_probs" in held) == (place["stage"] == 1), "the first stage does not read them"
        other = rank["held of the other replica"]["token_ids"]
        assert other != tokens_of(rank["replica"]), "the control: tokens of others would be seen"
        assert other == tokens_of([index for index in range(GROUPS * SAMPLES) if index not in rank["replica"]])


def test_the_schedule_of_every_tensor_parallel_rank_gets_all_of_its_replica(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        if rank["place"]["stage"] == 1:
            assert sorted(place for seen in rank["seen"] for place in seen) == rank["replica"]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("alive", ""),
        ("token ids that are none", "the store gave token ids from"),
        ("more than there is", "sample 40 is not in the store"),
        ("hangs", "does not answer"),
        ("dies", "does not answer"),
    ],
)
def test_every_rank_has_the_same_verdict_in_time(ranks: list[dict[str, Any]], case: str, reason: str) -> None:
    verdicts = [rank["verdicts"][case] for rank in ranks]
    assert len({verdict["reason"] for verdict in verdicts}) == 1
    assert reason in verdicts[0]["reason"] and bool(reason) == bool(verdicts[0]["reason"])
    assert max(verdict["seconds"] for verdict in verdicts) < SHORT_S + 8


def test_a_batch_whose_store_is_gone_is_served_again(ranks: list[dict[str, Any]]) -> None:
    assert [len(rank["said"]) for rank in ranks] == [1] + [0] * 7
    assert "step 1: the batch's tokens are served anew: rank 0: the store at" in ranks[0]["said"][0]
    assert all(rank["again"] == rank["held"] for rank in ranks)


def test_a_store_that_stays_away_is_one_error_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    (message,) = {rank["given up"] for rank in ranks}
    assert message.startswith("step 1: its tokens could not be fetched in 3 attempts: rank 0: the store at http://127.")
