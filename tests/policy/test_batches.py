"""The plan of micro-batches: nothing lost, nothing doubled, the budget kept, every rank the same count.

Why: a sequence that is dropped or cut in two still trains. Not covered: the speed of a plan on a real length mix.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.policy.batches import Sequences, build_micro_batch, plan_micro_batches


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(2, 300), max_size=60),
    data_parallel_size=st.integers(1, 4),
    token_budget=st.integers(50, 1000),
    multiple_of=st.integers(1, 4),
)
def test_plan_is_a_partition(lengths: list[int], data_parallel_size: int, token_budget: int, multiple_of: int) -> None:
    plan = plan_micro_batches(lengths, data_parallel_size, token_budget, multiple_of)
    placed = sorted(index for rank in plan for micro_batch in rank for index in micro_batch)
    assert placed == list(range(len(lengths)))
    counts = {len(rank) for rank in plan}
    assert len(counts) == 1
    assert counts.pop() % multiple_of == 0
    for rank in plan:
        for micro_batch in rank:
            padded = len(micro_batch) * max((lengths[i] for i in micro_batch), default=0)
            assert len(micro_batch) <= 1 or padded <= token_budget
    loads = [sum(lengths[i] for micro_batch in rank for i in micro_batch) for rank in plan]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def make_sequences() -> Sequences:
    return Sequences(
        token_ids=[torch.arange(10, 17), torch.arange(20, 24)],
        prompt_lengths=[3, 2],
        rollout_log_probs=[torch.tensor([-0.1, -0.2, -0.3, -0.4]), torch.tensor([-0.5, -0.6])],
        advantages=torch.tensor([1.0, -1.0]),
        fresh=torch.tensor([True, False]),
        mini_batch_sizes=[2],
    )


def test_rows_are_shifted_padded_and_masked() -> None:
    batch = build_micro_batch(make_sequences(), [0, 1], 0, 1, 4, torch.device("cpu"))
    assert batch.tokens.tolist() == [[10, 11, 12, 13, 14, 15, 0, 0], [20, 21, 22, 0, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[11, 12, 13, 14, 15, 16, 0, 0], [21, 22, 23, 0, 0, 0, 0, 0]]
    assert batch.labels[batch.response_mask].tolist() == [13, 14, 15, 16, 22, 23]
    engine = torch.tensor([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6])
    assert torch.equal(batch.rollout_log_probs[batch.response_mask], engine)
    assert batch.response_lengths.tolist() == [4, 2]


def test_context_parallel_parts_are_the_whole() -> None:
    whole = build_micro_batch(make_sequences(), [0, 1], 0, 1, 4, torch.device("cpu"))
    parts = [build_micro_batch(make_sequences(), [0, 1], rank, 2, 4, torch.device("cpu")) for rank in range(2)]
    assert [part.position_ids[0].tolist() for part in parts] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    joined = torch.cat([part.labels for part in parts], 1)
    order = torch.cat([part.position_ids[0] for part in parts]).argsort()
    assert torch.equal(joined[:, order], whole.labels)


def test_filler_counts_for_nothing() -> None:
    filler = build_micro_batch(make_sequences(), [], 0, 1, 4, torch.device("cpu"))
    assert filler.tokens.shape == (1, 4)
    assert not filler.response_mask.any()
    assert filler.response_lengths.tolist() == [0]
