"""What the ranks of test_feed.py run: feeds of a layout, from stores that live, hang, lie and die."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import torch

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.errors import RolloutError
from megatron_fipo.policy import platform
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.rows import StoreAddress, TrainBatch, rows_of, told_stretches
from megatron_fipo.records.sample import Group, RewardResult, sample_from_lists

platform.install()

from megatron.core import parallel_state  # noqa: E402

from megatron_fipo.models.model_config import read_architecture  # noqa: E402
from megatron_fipo.policy.feed import Feed, FetchFailed, feed_of  # noqa: E402
from megatron_fipo.policy.micro_batch import MiniBatch  # noqa: E402
from megatron_fipo.policy.model import start_model_parallel  # noqa: E402
from megatron_fipo.policy.train_batch import share  # noqa: E402
from megatron_fipo.policy.update import Policy  # noqa: E402
from megatron_fipo.rollout.offers import Offers  # noqa: E402
from tests.policy.layouts import UNCLIPPED, make_config  # noqa: E402

MODEL = resolve_embedded("embedded:tiny")
GROUPS, SAMPLES = 6, 3
PROMPT_IDS = 20
"""Of a prompt's tokens, with the group's number on top; a response's tokens are all the sample's place in the batch."""
VOCABULARY, SHORT_S = 38, 2.0


def lengths(place: int) -> tuple[int, int]:
    """Tokens of prompt and response of the sample at a place in the batch."""
    return 2 + place // SAMPLES % 2, 3 + 5 * place % 11


def make_groups() -> list[Group]:
    """Judged groups whose tokens say which sample they are of."""
    groups = []
    for number in range(GROUPS):
        places = range(number * SAMPLES, (number + 1) * SAMPLES)
        samples = [
            sample_from_lists([place] * lengths(place)[1], [-float(place)] * lengths(place)[1], "stop", 0)
            for place in places
        ]
        problem = Problem(str(number), "", prompt_ids([PROMPT_IDS + number] * lengths(places[0])[0]), "7", "test")
        results = [RewardResult(1.0, float(place), "7", "judged") for place in range(SAMPLES)]
        groups.append(Group(problem, tuple(samples)).with_results(results))
    return groups


def feeds(parallel: dict[str, Any]) -> dict[str, Any]:
    """What this rank holds after a fetch, what its schedule gets, and what it hears of stores that fail."""
    platform.start_process_group(120)
    config = make_config(parallel, UNCLIPPED, "fipo")
    start_model_parallel(config.parallel, 0)
    policy = Policy(config, read_architecture(MODEL), str(MODEL), updates=10)
    said: list[str] = []
    offers = Offers(config.algorithm, said.append) if torch.distributed.get_rank() == 0 else None
    offered = offers.offer(make_groups(), 1, 0) if offers else None
    feed, batch = feed_of(policy), share(offered)
    plan = policy.plan(batch)
    mini_batches = fetched(feed, batch, plan)
    replica = {index for micro_batches in plan for indices in micro_batches for index in indices}
    elsewhere = [[[index] for index in range(len(batch)) if index not in replica]]
    found = {
        "replica": sorted(replica),
        "held": held(mini_batches),
        "seen": [
            sorted(set(micro_batch.streams.get("labels", torch.empty(0))[micro_batch.response_mask].tolist()))
            for mini_batch in mini_batches
            for micro_batch in mini_batch
            if "labels" in micro_batch.streams
        ],
        "held of the other replica": held(fetched(feed, batch, elsewhere)),
        "place": {
            "replica": parallel_state.get_data_parallel_rank(),
            "stage": parallel_state.get_pipeline_model_parallel_rank(),
            "tensor": parallel_state.get_tensor_model_parallel_rank(),
        },
        "verdicts": verdicts(policy, feed),
    }
    if offers:
        offers.close()
    again = feed.get(offered, offers, policy.plan)
    found |= {"again": held(again), "said": said}
    found["given up"] = refusal(feed, offered, policy)
    if offers:
        offers.close()
    platform.stop_process_group()
    return found


def held(mini_batches: list[MiniBatch]) -> dict[str, list[list[int]]]:
    """By stream, how many tokens of each value this rank has in memory."""
    (tokens,) = {id(each.tokens): each.tokens for each in mini_batches}.values()
    return {
        name: [[int(value), count] for value, count in sorted(Counter(array.abs().tolist()).items())]
        for name, array in tokens.arrays.items()
    }


def fetched(feed: Feed, batch: TrainBatch, plan: Any) -> list[MiniBatch]:
    found = feed.fetch(batch, plan)
    assert not isinstance(found, FetchFailed), found
    return found


def verdicts(policy: Policy, feed: Feed) -> dict[str, Any]:
    """Of a store in another process: what comes of a fetch, and after how many seconds."""
    short = feed_of(policy, timeout_s=SHORT_S)
    found = {}
    with store_process(VOCABULARY + 2) as (address, process):
        for name, samples, chosen, send in (
            ("alive", VOCABULARY, feed, None),
            ("token ids that are none", VOCABULARY + 2, feed, None),
            ("more than there is", VOCABULARY + 3, feed, None),
            ("hangs", VOCABULARY, short, signal.SIGSTOP),
            ("dies", VOCABULARY, feed, signal.SIGKILL),
        ):
            rows = rows_of(range(samples), [9] * samples, [1] * samples, [0.0] * samples, [0] * samples, [samples])
            made = TrainBatch(1, rows, told_stretches([], rows), address)
            batch = share(made.to_bytes() if address else None)
            if process and send:
                os.kill(process.pid, send)
            torch.distributed.barrier()
            started = time.monotonic()
            verdict = chosen.fetch(batch, policy.plan(batch))
            reason = verdict.reason if isinstance(verdict, FetchFailed) else ""
            found[name] = {"reason": reason, "seconds": time.monotonic() - started}
    return found


@contextmanager
def store_process(samples: int) -> Iterator[tuple[StoreAddress | None, subprocess.Popen[bytes] | None]]:
    """On rank 0 a store in a process of its own; nothing elsewhere."""
    if torch.distributed.get_rank() != 0:
        yield None, None
        return
    command = [sys.executable, "-m", "tests.rollout.store_process", str(samples), "9"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield msgspec.json.decode(process.stdout.readline(), type=StoreAddress), process
        finally:
            process.kill()


class Unreachable:
    """Offers the same batch whatever becomes of it."""

    def __init__(self, offered: bytes):
        self._offered = offered

    def give_back(self, reason: str) -> bytes:
        return self._offered

    def fetched(self) -> None:
        raise AssertionError("it was never fetched")


def refusal(feed: Feed, offered: bytes | None, policy: Policy) -> str:
    """What comes of a batch whose store's door has been shut for good."""
    try:
        feed.get(offered, None if offered is None else Unreachable(offered), policy.plan)
    except RolloutError as error:
        return str(error)
    return "it was fetched"
