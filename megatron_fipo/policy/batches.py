"""A step's sequences on every rank, and the tensors of one micro-batch made from some of them."""

from dataclasses import dataclass
from itertools import accumulate

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
    weight_lag: Tensor
    """[n] int64: versions between the weights that sampled it and those that the step starts from; 0 but for sequences
    carried over from an earlier step."""
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
        return Sequences([], [], [], torch.empty(0), torch.empty(0, dtype=torch.int64), [])
    shape = None
    if sequences:
        shape = torch.tensor([*sequences.prompt_lengths, *sequences.lengths(), *sequences.mini_batch_sizes])
    shape = _broadcast(shape, 2 * count + mini_batches)
    prompts, lengths, sizes = (part.tolist() for part in shape.split([count, count, mini_batches]))
    responses = [length - prompt for length, prompt in zip(lengths, prompts, strict=True)]
    # The bulk of it all: half the bytes in 32 bits, which every vocabulary fits.
    tokens = _broadcast(torch.cat(sequences.token_ids) if sequences else None, sum(lengths), torch.int32).long()
    floats = None
    if sequences:
        floats = torch.cat([*sequences.rollout_log_probs, sequences.advantages, sequences.weight_lag.float()])
    floats = _broadcast(floats, sum(responses) + 2 * count, torch.float32)
    log_probs, advantages, weight_lag = floats.split([sum(responses), count, count])
    return Sequences(
        token_ids=list(tokens.split(lengths)),
        prompt_lengths=prompts,
        rollout_log_probs=list(log_probs.split(responses)),
        advantages=advantages,
        weight_lag=weight_lag.long(),
        mini_batch_sizes=sizes,
    )


def _broadcast(tensor: Tensor | None, size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    held = torch.empty(size, dtype=dtype) if tensor is None else tensor.to(dtype)
    if size:
        torch.distributed.broadcast(held, src=0)
    return held


@dataclass
class MicroBatch:
    """What one rank's pipeline works on at once: this context-parallel rank's part of some sequences.

    Padded: a row each. Packed: one row, in which they lie one after another.
    """

    tokens: Tensor
    """[rows, local tokens] int64, 0 behind a sequence's end."""
    labels: Tensor
    """[rows, local tokens] int64: the next token, whose log-prob the position predicts."""
    position_ids: Tensor
    """[rows, local tokens] int64, from 0 in each sequence."""
    response_mask: Tensor
    """[rows, local tokens] bool: the label is a response token."""
    rollout_log_probs: Tensor
    """[rows, local tokens] fp32, 0 outside the mask."""
    advantages: Tensor
    """[rows, local tokens] fp32, the sequence's at each of its tokens."""
    weight_lag: Tensor
    """[rows, local tokens] int64, see Sequences."""
    response_quarter: Tensor
    """[rows, local tokens] int64: in which quarter of its response the label lies, 0 to 3; 0 outside the mask."""
    response_lengths: Tensor
    """[sequences] int64, of whole responses; 0 for a filler."""
    offsets: Tensor | None = None
    """[sequences + 1] int32 on the CPU: packed, where each sequence begins and the last ends, in tokens of all
    context-parallel ranks together. None: padded."""
    local_lengths: Tensor | None = None
    """[sequences] int64: packed, this rank's tokens of each sequence, padding included. None: padded."""
    longest: int = 0
    """Tokens of the longest sequence, padding included, on all context-parallel ranks together."""
    old_log_probs: Tensor | None = None
    """[rows, local tokens] fp32; on the last pipeline stage, once `Policy.score` has run."""
    reference_log_probs: Tensor | None = None
    """[rows, local tokens] fp32; likewise, where the loss has a KL term."""


@dataclass(frozen=True)
class Cut:
    """How micro-batches are laid out and cut over ranks; the same for all of a run but for the rank."""

    packed: bool
    pad_multiple: int
    """Tokens of a row are padded to a multiple of this, in all context-parallel ranks together."""
    context_rank: int
    context_size: int

    def slots(self, lengths: list[int]) -> list[int]:
        """Tokens that sequences of the given numbers of predicted tokens take up in one micro-batch, padding included.

        Packed sequences are padded to what the chunks of context parallelism divide, the last one to `pad_multiple`.
        """
        if not self.packed:
            return [_round_up(max(lengths), self.pad_multiple)] * len(lengths)
        slots = [_round_up(length, 2 * self.context_size if self.context_size > 1 else 1) for length in lengths]
        slots[-1] += -sum(slots) % self.pad_multiple
        return slots


def build_micro_batch(sequences: Sequences, indices: list[int], cut: Cut, device: torch.device) -> MicroBatch:
    """Shift the given sequences, lay them out, and take this rank's part.

    Args:
        indices: positions in `sequences`; none gives a filler that counts for nothing.
    """
    slots = cut.slots([len(sequences.token_ids[index]) - 1 for index in indices] or [1])
    tokens, labels, positions = torch.zeros(3, sum(slots), dtype=torch.int64)
    weight_lag, quarter = torch.zeros(2, sum(slots), dtype=torch.int64)
    mask = torch.zeros(sum(slots), dtype=torch.bool)
    log_probs, advantages = torch.zeros(2, sum(slots))
    response_lengths = torch.zeros(len(slots), dtype=torch.int64)
    held, start = [], 0
    for place, slot in enumerate(slots):
        positions[start : start + slot] = torch.arange(slot)
        held.append(start + _held_positions(slot, cut))
        if indices:
            index = indices[place]
            ids, prompt = sequences.token_ids[index], sequences.prompt_lengths[index]
            end, response = start + len(ids) - 1, slice(start + prompt - 1, start + len(ids) - 1)
            tokens[start:end], labels[start:end] = ids[:-1], ids[1:]
            mask[response], log_probs[response] = True, sequences.rollout_log_probs[index]
            advantages[start : start + slot] = sequences.advantages[index]
            weight_lag[start : start + slot] = sequences.weight_lag[index]
            response_lengths[place] = length = len(ids) - prompt
            quarter[response] = torch.arange(length) * 4 // length
        start += slot
    chosen, rows = torch.cat(held), 1 if cut.packed else len(slots)

    def part(column: Tensor) -> Tensor:
        return column[chosen].view(rows, -1).to(device)

    return MicroBatch(
        tokens=part(tokens),
        labels=part(labels),
        position_ids=part(positions),
        response_mask=part(mask),
        rollout_log_probs=part(log_probs),
        advantages=part(advantages),
        weight_lag=part(weight_lag),
        response_quarter=part(quarter),
        response_lengths=response_lengths.to(device),
        offsets=torch.tensor([0, *accumulate(slots)], dtype=torch.int32) if cut.packed else None,
        local_lengths=torch.tensor(slots, device=device) // cut.context_size if cut.packed else None,
        longest=max(slots),
    )


def _held_positions(slot: int, cut: Cut) -> Tensor:
    """Positions of a sequence that this context-parallel rank holds."""
    if cut.context_size == 1:
        return torch.arange(slot)
    return zigzag_positions(slot // cut.context_size, cut.context_size, torch.device("cpu"))[cut.context_rank]


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
