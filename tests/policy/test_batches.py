"""Micro-batches: every token at its place, shifted, masked and cut; a filler counts for nothing.

Why: a response that is masked one token off still trains. Not covered: what the model makes of them (test_layouts.py).
"""

from collections.abc import Sequence

import pytest
import torch

from megatron_fipo.policy.feed import Feed
from megatron_fipo.policy.micro_batch import BatchLayout, MicroBatch
from megatron_fipo.rollout.plain_batch import Made, plain_batch

CPU = torch.device("cpu")


def make_batch(told: Sequence[Sequence[int]] = ()) -> Made:
    log_probs = [torch.tensor([0, 0, 0, -0.1, -0.2, -0.3, -0.4]), torch.tensor([0, 0, -0.5, -0.6])]
    return plain_batch(
        streams={"token_ids": [torch.arange(10, 17), torch.arange(20, 24)], "rollout_log_probs": log_probs},
        prompt_lengths=[3, 2],
        advantages=[1.0, -1.0],
        weight_lag=[0, 2],
        told=told,
    )


def build(
    indices: list[int],
    packed: bool,
    rank: int = 0,
    ranks: int = 1,
    pad_multiple: int = 4,
    told: Sequence[Sequence[int]] = (),
) -> MicroBatch:
    batch, store = make_batch(told)
    found = Feed(BatchLayout(packed, pad_multiple, rank, ranks), 24, CPU).fetch(batch, [[indices]], store)
    assert isinstance(found, list), found
    ((micro_batch,),) = found
    return micro_batch


def test_padded_rows_are_shifted_and_masked() -> None:
    batch = build([0, 1], packed=False)
    assert batch.streams["token_ids"].tolist() == [[10, 11, 12, 13, 14, 15, 0, 0], [20, 21, 22, 0, 0, 0, 0, 0]]
    assert batch.streams["labels"].tolist() == [[11, 12, 13, 14, 15, 16, 0, 0], [21, 22, 23, 0, 0, 0, 0, 0]]
    assert batch.offsets is None and batch.local_lengths is None


def test_packed_sequences_lie_one_behind_the_other() -> None:
    batch = build([0, 1], packed=True)
    assert batch.streams["token_ids"].tolist() == [[10, 11, 12, 13, 14, 15, 20, 21, 22, 0, 0, 0]]
    assert batch.streams["labels"].tolist() == [[11, 12, 13, 14, 15, 16, 21, 22, 23, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]]
    assert batch.offsets is not None and batch.offsets.tolist() == [0, 6, 12], "the last one takes the padding"
    assert batch.longest == 6
    assert build([0, 1], packed=True, pad_multiple=1).position_ids.shape == (1, 9), "no padding where none is asked for"


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_what_belongs_to_the_responses(packed: bool) -> None:
    batch = build([0, 1], packed)
    assert batch.streams["labels"][batch.response_mask].tolist() == [13, 14, 15, 16, 22, 23]
    engine = torch.tensor([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6])
    assert torch.equal(batch.streams["rollout_log_probs"][batch.response_mask], engine)
    assert batch.advantages[batch.response_mask].tolist() == [1, 1, 1, 1, -1, -1]
    assert batch.weight_lag[batch.response_mask].tolist() == [0] * 4 + [2] * 2
    assert batch.response_quarter[batch.response_mask].tolist() == [0, 1, 2, 3, 0, 2]
    assert batch.response_lengths.tolist() == [4, 2]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_what_the_policy_was_told_counts_for_nothing(packed: bool) -> None:
    """By the label: the first action after context is predicted at context's last token, and is the policy's."""
    for ranks in (1, 2):
        parts = [build([1, 0], packed, rank, ranks, told=[[0, 4, 6]]) for rank in range(ranks)]
        labels = torch.cat([part.streams["labels"][part.response_mask] for part in parts])
        assert sorted(labels.tolist()) == [13, 16, 22, 23]
        assert all(part.response_lengths.tolist() == [2, 2] for part in parts), "of whole responses, on every rank"
        assert all(part.streams["labels"].shape == part.response_mask.shape for part in parts)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_context_parallel_parts_are_the_whole(packed: bool) -> None:
    whole = build([0, 1], packed, pad_multiple=4)
    parts = [build([0, 1], packed, rank, 2) for rank in range(2)]
    if packed:
        # Padded to 8 and 4: chunks of two and of one token.
        assert [part.position_ids.tolist() for part in parts] == [[[0, 1, 6, 7, 0, 3]], [[2, 3, 4, 5, 1, 2]]]
        assert [part.local_lengths.tolist() for part in parts if part.local_lengths is not None] == [[4, 2]] * 2
    else:
        assert [part.position_ids[0].tolist() for part in parts] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    names = ("labels", "rollout_log_probs", "advantages", "weight_lag", "response_quarter")
    for name in names:
        joined = torch.cat([values_of(part, name)[part.response_mask] for part in parts])
        assert joined.sort().values.tolist() == values_of(whole, name)[whole.response_mask].sort().values.tolist()


def values_of(batch: MicroBatch, name: str) -> torch.Tensor:
    """A stream or another field, by its name."""
    return batch.streams[name] if name in batch.streams else getattr(batch, name)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_filler_counts_for_nothing(packed: bool) -> None:
    filler = build([], packed)
    assert filler.position_ids.shape == (1, 4)
    assert not filler.response_mask.any()
    assert filler.response_lengths.tolist() == [0]
