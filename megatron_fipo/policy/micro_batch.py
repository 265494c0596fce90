"""The tensors that one rank's pipeline works on at once, made of some sequences of a step."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from megatron_fipo.algorithm.zigzag import zigzag_positions
from megatron_fipo.policy.tokens import StepTokens, streams_read
from megatron_fipo.records import streams
from megatron_fipo.records.routes import RouteFormat
from megatron_fipo.records.rows import TrainBatch
from megatron_fipo.records.streams import Stream


@dataclass(frozen=True)
class BatchLayout:
    """How micro-batches are laid out and cut over ranks; the same for all of a run but for the rank."""

    packed: bool
    pad_multiple: int
    """Tokens of a row are padded to a multiple of this, in all context-parallel ranks together."""
    context_rank: int = 0
    context_size: int = 1
    stages: frozenset[str] = frozenset({"first", "last"})
    """Which of these pipeline stages this rank is: streams that none of them reads are not made."""
    routes: RouteFormat | None = None
    """What routed experts look like that come with samples; None: they come without."""
    columns: tuple[int, int] = (0, 0)
    """The bytes [start, end) of a token's routed experts that this rank's layers read."""

    def slots(self, lengths: Sequence[int]) -> list[int]:
        """Tokens that sequences of the given numbers of predicted tokens take up in one micro-batch, padding included.

        Packed sequences are padded to what the chunks of context parallelism divide, the last one to `pad_multiple`.
        """
        if not self.packed:
            return [_round_up(max(lengths), self.pad_multiple)] * len(lengths)
        slots = [_round_up(length, 2 * self.context_size if self.context_size > 1 else 1) for length in lengths]
        slots[-1] += -sum(slots) % self.pad_multiple
        return slots

    def held(self, slot: int) -> Tensor:
        """Positions of a sequence that this context-parallel rank holds, [local tokens] int64."""
        if self.context_size == 1:
            return torch.arange(slot)
        return zigzag_positions(slot // self.context_size, self.context_size, torch.device("cpu"))[self.context_rank]

    def stretches(self, slot: int, tokens: int) -> list[tuple[int, int]]:
        """Tokens [start, end) of a sequence of so many that this rank reads: those it holds, and the label after each.

        No token is in two of them.
        """
        held = self.held(slot)
        breaks = (held.diff() != 1).nonzero().flatten().tolist()
        firsts = held[[0, *(place + 1 for place in breaks)]].tolist()
        lasts = held[[*breaks, len(held) - 1]].tolist()
        found: list[tuple[int, int]] = []
        for first, last in zip(firsts, lasts, strict=True):
            if first < tokens - 1:
                start = max(first, found[-1][1]) if found else first
                found.append((start, min(last + 2, tokens)))
        return found


@dataclass(frozen=True)
class MicroBatch:
    """What one rank's pipeline works on at once: this context-parallel rank's part of some sequences.

    Padded: a row each. Packed: one row, in which they lie one after another.
    """

    places: tuple[int, ...]
    """Of its sequences in the batch; none: a filler."""
    streams: Mapping[str, Tensor]
    """[rows, local tokens, …] each, by the table of records/streams.py: those that this pipeline stage reads. A value
    that is aligned with labels is at the position that predicts its token; outside of a sequence is the stream's
    fill."""
    position_ids: Tensor
    """[rows, local tokens] int64, from 0 in each sequence."""
    response_mask: Tensor
    """[rows, local tokens] bool: the label is a response token that the policy produced."""
    advantages: Tensor
    """[rows, local tokens] fp32, the sequence's at each of its tokens."""
    weight_lag: Tensor
    """[rows, local tokens] int64, see records/rows.py."""
    response_quarter: Tensor
    """[rows, local tokens] int64: in which quarter of its response the label lies, 0 to 3, by its position, what the
    policy was told included; 0 outside a response."""
    response_lengths: Tensor
    """[sequences] int64: tokens that the policy produced, of whole responses; 0 for a filler."""
    offsets: Tensor | None
    """[sequences + 1] int32 on the CPU: packed, where each sequence begins and the last ends, in tokens of all
    context-parallel ranks together. None: padded."""
    local_lengths: Tensor | None
    """[sequences] int64: packed, this rank's tokens of each sequence, padding included. None: padded."""
    longest: int
    """Tokens of the longest sequence, padding included, on all context-parallel ranks together."""

    def with_stream(self, name: str, values: Tensor) -> "MicroBatch":
        """The same with a stream that the trainer made, [rows, local tokens].

        Raises:
            ValueError: the table has no stream of this name whose source is the trainer, or the shape is another.
        """
        table = [stream.name for stream in streams.STREAMS if stream.source == "trainer"]
        if name not in table:
            raise ValueError(f"{name} is no stream of the trainer's; those of records/streams.py are {table}")
        if values.shape[:2] != self.position_ids.shape:
            found, right = list(values.shape), list(self.position_ids.shape)
            raise ValueError(f"{name} has the shape {found}, and should have one value for each of {right} tokens")
        return replace(self, streams={**self.streams, name: values})


TrainerStreams = Sequence[Mapping[str, Tensor]]
"""What the trainer adds to a mini-batch: streams by name for each micro-batch. Empty but on the last pipeline stage."""


@dataclass(frozen=True)
class MiniBatch:
    """This rank's micro-batches of one update. Their tensors are made when they are asked for, one after the other."""

    batch: TrainBatch
    tokens: StepTokens
    plan: Sequence[Sequence[int]]
    """Positions in `batch` of each micro-batch's sequences; none is a filler."""
    layout: BatchLayout
    device: torch.device

    def __len__(self) -> int:
        """Micro-batches."""
        return len(self.plan)

    def __iter__(self) -> Iterator[MicroBatch]:
        return (build_micro_batch(self.batch, self.tokens, indices, self.layout, self.device) for indices in self.plan)

    def with_streams(self, added: TrainerStreams) -> Iterator[MicroBatch]:
        """The micro-batches with the streams that the trainer made, which may be none at all."""
        for place, micro_batch in enumerate(self):
            for name, values in (added[place] if added else {}).items():
                micro_batch = micro_batch.with_stream(name, values)
            yield micro_batch


def build_micro_batch(
    batch: TrainBatch, tokens: StepTokens, indices: Sequence[int], layout: BatchLayout, device: torch.device
) -> MicroBatch:
    """Shift the given sequences, lay them out, and take this rank's part.

    The ranks of `tokens.group` call this together.

    Args:
        indices: places in `batch`; none gives a filler that counts for nothing.
    """
    rows = batch.rows[list(indices)]
    lengths, prompts = rows["tokens"].tolist(), rows["prompt"].tolist()
    slots = layout.slots([length - 1 for length in lengths] or [1])
    starts = [0, *accumulate(slots)]
    held = torch.cat([start + layout.held(slot) for start, slot in zip(starts, slots, strict=False)])
    weight_lag, quarter = torch.zeros(2, sum(slots), dtype=torch.int64)
    mask, advantages = torch.zeros(sum(slots), dtype=torch.bool), torch.zeros(sum(slots))
    response_lengths = torch.zeros(len(slots), dtype=torch.int64)
    for place, (index, row) in enumerate(zip(indices, rows, strict=True)):
        start, end = starts[place], starts[place + 1]
        response = slice(start + prompts[place] - 1, start + lengths[place] - 1)
        length = lengths[place] - prompts[place]
        mask[response], quarter[response] = True, torch.arange(length) * 4 // length
        for told_start, told_end in batch.told_of(index):
            mask[start + told_start - 1 : start + told_end - 1] = False
        response_lengths[place] = mask[response].sum()
        advantages[start:end], weight_lag[start:end] = float(row["advantage"]), int(row["weight_lag"])
    shape = (1 if layout.packed else len(slots), len(held) if layout.packed else len(held) // len(slots))

    def part(column: Tensor) -> Tensor:
        return moved(column[held].view(shape), device)

    def values(stream: Stream) -> Tensor:
        return tokens.column(stream, indices, lengths, starts)[held]

    return MicroBatch(
        places=tuple(indices),
        streams=_streams(tokens, streams_read(layout.stages, layout.columns), values, shape, device),
        position_ids=part(torch.cat([torch.arange(slot) for slot in slots])),
        response_mask=part(mask),
        advantages=part(advantages),
        weight_lag=part(weight_lag),
        response_quarter=part(quarter),
        response_lengths=moved(response_lengths, device),
        offsets=torch.tensor(starts, dtype=torch.int32) if layout.packed else None,
        local_lengths=moved(torch.tensor(slots) // layout.context_size, device) if layout.packed else None,
        longest=max(slots),
    )


def _streams(
    tokens: StepTokens,
    read: Sequence[Stream],
    values: Callable[[Stream], Tensor],
    shape: tuple[int, int],
    device: torch.device,
) -> dict[str, Tensor]:
    """What this pipeline stage reads, [rows, local tokens, …] each: one buffer, from the rank that has the tokens.

    Args:
        values: a stream's on that rank, [rows × local tokens, …] of its type on the host.
    """
    if not read:
        return {}
    types = [getattr(torch, stream.dtype) for stream in read]
    shapes = [(*shape, *stream.trailing) for stream in read]
    sizes = [math.prod(wanted) * kind.itemsize for wanted, kind in zip(shapes, types, strict=True)]
    if tokens.is_read_here:
        packed = moved(torch.cat([values(stream).reshape(-1).view(torch.uint8) for stream in read]), device)
    else:
        packed = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    parts = tokens.spread(packed).split(sizes)
    return {
        stream.name: part.view(kind).view(wanted).to(getattr(torch, stream.device_dtype or stream.dtype))
        for stream, kind, wanted, part in zip(read, types, shapes, parts, strict=True)
    }


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; a copy to a GPU waits for nothing that is under way there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
