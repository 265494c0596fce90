"""The plan of micro-batches: nothing lost, nothing doubled, the budget kept, every rank the same count, work balanced.

Why: a sequence that is dropped or doubled still trains, and one rank with twice the attention makes all others wait.
Not covered: the speed of an update on a real mix of lengths (benchmarks/policy.py).
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.models.costs import attention_cost
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.policy.plan import plan_micro_batches


@given(
    lengths=st.lists(st.integers(2, 300), max_size=60),
    data_parallel_size=st.integers(1, 4),
    token_budget=st.integers(50, 1000),
    multiple_of=st.integers(1, 4),
    packed=st.booleans(),
)
def test_plan_is_a_partition(
    lengths: list[int], data_parallel_size: int, token_budget: int, multiple_of: int, packed: bool
) -> None:
    plan = plan_micro_batches(lengths, data_parallel_size, token_budget, packed=packed, multiple_of=multiple_of)
    placed = sorted(index for rank in plan for micro_batch in rank for index in micro_batch)
    assert placed == list(range(len(lengths)))
    counts = {len(rank) for rank in plan}
    assert len(counts) == 1
    assert counts.pop() % multiple_of == 0
    for rank in plan:
        for micro_batch in rank:
            held = [lengths[i] for i in micro_batch]
            size = sum(held) if packed else len(held) * max(held, default=0)
            assert len(micro_batch) <= 1 or size <= token_budget
    loads = [sum(lengths[i] for micro_batch in rank for i in micro_batch) for rank in plan]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_packing_needs_fewer_micro_batches() -> None:
    padded, packed = (plan_micro_batches([150, 50] * 20, 1, 200, packed=way)[0] for way in (False, True))
    assert len(packed) == 20
    assert len(padded) == 20 + 5, "the long ones alone, four of the short ones together"


def test_long_sequences_count_for_their_attention() -> None:
    """One of 20k tokens is as much work as 54 of 1k here; dealt by tokens alone, its rank is the last one to finish."""
    lengths, cost = [20_000] + [1000] * 60, 1e-4

    def imbalance(weight: float) -> float:
        plan = plan_micro_batches(lengths, 2, 10**6, packed=True, attention_cost=weight)
        held = [[lengths[i] for micro_batch in rank for i in micro_batch] for rank in plan]
        work = [sum(length * (1 + cost * length) for length in rank) for rank in held]
        return max(work) / min(work)

    assert imbalance(cost) < 1.05
    assert imbalance(0.0) > 1.5


@pytest.mark.parametrize("way", ["padded", "packed"])
def test_what_is_parted_is_parted_by_work(way: str) -> None:
    """Four micro-batches out of one: none has more than its share and one sequence."""
    lengths = [64, 32, 32, 16, 16, 16, 16, 16, 16, 16, 16]
    (plan,) = plan_micro_batches(lengths, 1, 10**6, packed=way == "packed", multiple_of=4)
    assert max(sum(lengths[i] for i in micro_batch) for micro_batch in plan) <= 64 + 16


def test_attention_cost_of_the_published_model() -> None:
    """Qwen2.5-32B: 5120 query channels over 487.6 million weights a layer, biases and norms apart."""
    model_config = read_architecture(resolve_embedded("embedded:Qwen2.5-32B"))
    assert attention_cost(model_config) == pytest.approx(5120 / 487_587_840)
