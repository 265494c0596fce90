"""From sampled sequences to the micro-batches of every rank.

All ranks hold the step's sequences and compute the same plan from their lengths, so nothing needs to be told. A
sequence lies whole in one micro-batch (context parallelism then cuts its tokens over ranks), and the plan is made once
a step: old log-probs and updates run over the very same micro-batches, or the first ratio would not be 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from megatron_fipo.algorithm.zigzag import zigzag_positions


@dataclass
class Sequences:
    """One step's training data, the same on every rank. All CPU tensors; n sequences."""

    token_ids: list[Tensor]
    """n × [prompt + response] int64"""
    prompt_lengths: list[int]
    rollout_log_probs: list[Tensor]
    """n × [response] fp32, by the engine."""
    advantages: Tensor
    """[n] fp32"""
    fresh: Tensor
    """[n] bool: sampled with the weights that the step starts from, and not carried over from an earlier step."""
    mini_batch_sizes: list[int]
    """Sequences of each update, in order; they add up to n."""

    def lengths(self) -> list[int]:
        """Tokens of each sequence, prompt and response."""
        return [len(tokens) for tokens in self.token_ids]


def share(sequences: Sequences | None) -> Sequences:
    """Hand rank 0's sequences to every rank, as tensors.

    Args:
        sequences: the data on rank 0, None elsewhere.
    """
    header = _broadcast(
        torch.tensor([len(sequences.token_ids), len(sequences.mini_batch_sizes)]) if sequences else None, 2
    )
    count, mini_batches = header.tolist()
    if count == 0:
        return Sequences([], [], [], torch.empty(0), torch.empty(0, dtype=torch.bool), [])
    shape = None
    if sequences:
        shape = torch.tensor([*sequences.prompt_lengths, *sequences.lengths(), *sequences.mini_batch_sizes])
    shape = _broadcast(shape, 2 * count + mini_batches)
    prompts, lengths, sizes = (part.tolist() for part in shape.split([count, count, mini_batches]))
    responses = [length - prompt for length, prompt in zip(lengths, prompts, strict=True)]
    tokens = _broadcast(torch.cat(sequences.token_ids) if sequences else None, sum(lengths))
    floats = None
    if sequences:
        floats = torch.cat([*sequences.rollout_log_probs, sequences.advantages, sequences.fresh.float()])
    floats = _broadcast(floats, sum(responses) + 2 * count, torch.float32)
    log_probs, advantages, fresh = floats.split([sum(responses), count, count])
    return Sequences(
        token_ids=list(tokens.split(lengths)),
        prompt_lengths=prompts,
        rollout_log_probs=list(log_probs.split(responses)),
        advantages=advantages,
        fresh=fresh.bool(),
        mini_batch_sizes=sizes,
    )


def _broadcast(tensor: Tensor | None, size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    held = torch.empty(size, dtype=dtype) if tensor is None else tensor.to(dtype)
    if size:
        torch.distributed.broadcast(held, src=0)
    return held


def plan_micro_batches(
    lengths: Sequence[int], data_parallel_size: int, token_budget: int, multiple_of: int = 1
) -> list[list[list[int]]]:
    """Which sequences of one mini-batch go where: a list of micro-batches for each data-parallel rank.

    Sequences are dealt to ranks longest first, each to the rank with the fewest tokens; within a rank they are sorted
    by length and cut where the padded size would pass the budget. Every rank gets the same number of micro-batches, a
    multiple of `multiple_of` (the interleaved schedule wants one of the pipeline size); where there are fewer
    sequences than that, a micro-batch is empty.

    Args:
        lengths: tokens of each sequence.
        data_parallel_size: ranks to deal to.
        token_budget: most tokens of a micro-batch, padding included; a longer sequence is alone in one.
    """
    ranks: list[list[int]] = [[] for _ in range(data_parallel_size)]
    loads = [0] * data_parallel_size
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        ranks[rank].append(index)
        loads[rank] += lengths[index]
    micro_batches = [_cut(indices, lengths, token_budget) for indices in ranks]
    count = max(1, max(len(rank) for rank in micro_batches))
    count = -(-count // multiple_of) * multiple_of
    return [_split_to(rank, count) for rank in micro_batches]


def _cut(indices: list[int], lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Longest first, so that the first of a micro-batch is as long as its padding makes all of it."""
    micro_batches: list[list[int]] = []
    for index in indices:
        if micro_batches and (len(micro_batches[-1]) + 1) * lengths[micro_batches[-1][0]] <= token_budget:
            micro_batches[-1].append(index)
        else:
            micro_batches.append([index])
    return micro_batches


def _split_to(micro_batches: list[list[int]], count: int) -> list[list[int]]:
    """Halve the fullest micro-batch until there are `count`, then fill up with empty ones."""
    result = [list(micro_batch) for micro_batch in micro_batches]
    while len(result) < count and any(len(micro_batch) > 1 for micro_batch in result):
        fullest = max(range(len(result)), key=lambda i: len(result[i]))
        middle = len(result[fullest]) // 2
        result[fullest : fullest + 1] = [result[fullest][:middle], result[fullest][middle:]]
    return result + [[] for _ in range(count - len(result))]


@dataclass
class MicroBatch:
    """The rows that one rank's pipeline works on at once: this context-parallel rank's part of them."""

    tokens: Tensor
    """[rows, local tokens] int64, right-padded with 0."""
    labels: Tensor
    """[rows, local tokens] int64: the next token, whose log-prob the position predicts."""
    position_ids: Tensor
    """[rows, local tokens] int64"""
    response_mask: Tensor
    """[rows, local tokens] bool: the label is a response token."""
    rollout_log_probs: Tensor
    """[rows, local tokens] fp32, 0 outside the mask."""
    advantages: Tensor
    """[rows, 1] fp32"""
    response_lengths: Tensor
    """[rows] int64, of whole responses; 0 for a filler row."""
    fresh: Tensor
    """[rows, 1] bool, see Sequences."""
    old_log_probs: Tensor | None = None
    """[rows, local tokens] fp32; on the last pipeline stage, once `Policy.score` has run."""


def build_micro_batch(
    sequences: Sequences,
    indices: list[int],
    context_rank: int,
    context_size: int,
    pad_multiple: int,
    device: torch.device,
) -> MicroBatch:
    """Pad, shift and cut the given sequences.

    Args:
        indices: positions in `sequences`; none gives one filler row that counts for nothing.
        pad_multiple: row lengths are rounded up to a multiple of this (context and sequence parallelism cut evenly).
    """
    rows = max(1, len(indices))
    longest = max((len(sequences.token_ids[i]) for i in indices), default=2) - 1
    width = -(-longest // pad_multiple) * pad_multiple
    tokens, labels = torch.zeros(2, rows, width, dtype=torch.int64)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    log_probs = torch.zeros(rows, width)
    advantages, lengths = torch.zeros(rows, 1), torch.zeros(rows, dtype=torch.int64)
    fresh = torch.zeros(rows, 1, dtype=torch.bool)
    for row, index in enumerate(indices):
        ids, prompt = sequences.token_ids[index], sequences.prompt_lengths[index]
        tokens[row, : len(ids) - 1] = ids[:-1]
        labels[row, : len(ids) - 1] = ids[1:]
        mask[row, prompt - 1 : len(ids) - 1] = True
        log_probs[row, prompt - 1 : len(ids) - 1] = sequences.rollout_log_probs[index]
        advantages[row] = sequences.advantages[index]
        lengths[row] = len(ids) - prompt
        fresh[row] = sequences.fresh[index]
    positions = torch.arange(width).expand(rows, width)
    if context_size > 1:
        mine = zigzag_positions(width // context_size, context_size, torch.device("cpu"))[context_rank]
        tokens, labels, mask, log_probs, positions = (t[:, mine] for t in (tokens, labels, mask, log_probs, positions))
    columns = (tokens, labels, positions, mask, log_probs, advantages, lengths, fresh)
    return MicroBatch(*(column.contiguous().to(device) for column in columns))
