"""Which sequences go into which micro-batch of which rank.

All ranks hold the step's sequences and compute the same plan from their lengths, so nothing needs to be told. A
sequence lies whole in one micro-batch (context parallelism then cuts its tokens over ranks), and the plan is made once
a step: old log-probs and updates run over the very same micro-batches, or the first ratio would not be 1.
"""

from collections.abc import Sequence


def plan_micro_batches(
    lengths: Sequence[int],
    data_parallel_size: int,
    token_budget: int,
    *,
    packed: bool,
    multiple_of: int = 1,
    attention_cost: float = 0.0,
) -> list[list[list[int]]]:
    """Which sequences of one mini-batch go where: a list of micro-batches for each data-parallel rank.

    Sequences are dealt to ranks longest first, each to the rank with the least work. Within a rank packed ones go where
    there is room, and padded ones are cut, sorted by length, where the padded size would pass the budget. Every rank
    gets the same number of micro-batches, a multiple of `multiple_of` (the interleaved schedule wants one of the
    pipeline size); where there are fewer sequences than that, a micro-batch is empty.

    Args:
        lengths: tokens of each sequence.
        data_parallel_size: ranks to deal to.
        token_budget: most tokens of a micro-batch, padding included; a longer sequence is alone in one.
        packed: whether a micro-batch has no padding between its sequences.
        attention_cost: see models/costs.py; 0 deals by tokens alone.
    """
    work = [length * (1 + attention_cost * length) for length in lengths]
    ranks: list[list[int]] = [[] for _ in range(data_parallel_size)]
    loads = [0.0] * data_parallel_size
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        ranks[rank].append(index)
        loads[rank] += work[index]
    cut = _fill if packed else _cut
    micro_batches = [cut(indices, lengths, token_budget) for indices in ranks]
    count = max(1, max(len(rank) for rank in micro_batches))
    count = -(-count // multiple_of) * multiple_of
    return [_split_to(rank, count, work) for rank in micro_batches]


def _fill(indices: list[int], lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Longest first, each into the first micro-batch that has room."""
    micro_batches: list[list[int]] = []
    room: list[int] = []
    for index in indices:
        place = next((i for i, left in enumerate(room) if left >= lengths[index]), len(room))
        if place == len(room):
            micro_batches.append([])
            room.append(token_budget)
        micro_batches[place].append(index)
        room[place] -= lengths[index]
    return micro_batches


def _cut(indices: list[int], lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Longest first, so that the first of a micro-batch is as long as its padding makes all of it."""
    micro_batches: list[list[int]] = []
    for index in indices:
        if micro_batches and (len(micro_batches[-1]) + 1) * lengths[micro_batches[-1][0]] <= token_budget:
            micro_batches[-1].append(index)
        else:
            micro_batches.append([index])
    return micro_batches


def _split_to(micro_batches: list[list[int]], count: int, work: Sequence[float]) -> list[list[int]]:
    """Part the micro-batch with the most work, about in halves, until there are `count`; then add empty ones."""

    def work_of(members: list[int]) -> float:
        return sum(work[index] for index in members)

    result = [list(micro_batch) for micro_batch in micro_batches]
    while len(result) < count and any(len(micro_batch) > 1 for micro_batch in result):
        largest = max((micro_batch for micro_batch in result if len(micro_batch) > 1), key=work_of)
        end = min(range(1, len(largest)), key=lambda i: abs(work_of(largest[:i]) - work_of(largest[i:])))
        place = result.index(largest)
        result[place : place + 1] = [largest[:end], largest[end:]]
    return result + [[] for _ in range(count - len(result))]
