"""What a rank holds of a step's tokens, and how its tensor-parallel peers get them one micro-batch at a time."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fipo.records import streams
from megatron_fipo.records.streams import Stream

Piece = tuple[int, int, int]
"""Tokens [start, end) of a sequence, and where in the arrays they begin."""


def streams_read(stages: Collection[str], columns: tuple[int, int] = (0, 0)) -> list[Stream]:
    """The streams that come with samples and that a rank which is these pipeline stages reads, widest type first.

    In this order they may follow each other in one buffer. Of whole streams the rank reads these columns; they are not
    in the list if there are none.
    """
    read = [
        stream.of(columns)
        for stream in streams.STREAMS
        if stream.source != "trainer" and stream.is_read_on(stages) and (not stream.whole or columns[0] < columns[1])
    ]
    return sorted(read, key=lambda stream: -numpy.dtype(stream.dtype).itemsize)


@dataclass(frozen=True)
class StepTokens:
    """This rank's part of a step's tokens: none at all unless it is the one of its tensor-parallel group that reads."""

    arrays: Mapping[str, Tensor]
    """[tokens of all pieces, …] each, by the name that a stream's arrays have on the host."""
    pieces: Mapping[int, Sequence[Piece]]
    """By the sequence's place in the batch."""
    group: ProcessGroup | None
    """The ranks that get each micro-batch from the first of them; None: this one is alone."""

    @staticmethod
    def of(
        arrays: Mapping[str, numpy.ndarray],
        stretches: Mapping[int, Sequence[tuple[int, int]]],
        group: ProcessGroup | None,
    ) -> "StepTokens":
        """Arrays that have these stretches of sequences, by their place in the batch, one after the other."""
        placed: dict[int, list[Piece]] = {}
        offset = 0
        for place, found in stretches.items():
            placed[place] = []
            for start, end in found:
                placed[place].append((start, end, offset))
                offset += end - start
        return StepTokens({name: torch.from_numpy(array) for name, array in arrays.items()}, placed, group)

    @property
    def is_read_here(self) -> bool:
        """Whether this rank is the one that fetched for its group."""
        return self.group is None or self.group.rank() == 0

    def spread(self, packed: Tensor) -> Tensor:
        """The first rank's `packed` on every rank of the group, whatever it holds on the others; [bytes] uint8."""
        if self.group is not None:
            torch.distributed.broadcast(packed, group=self.group, group_src=0)
        return packed

    def column(self, stream: Stream, places: Sequence[int], lengths: Sequence[int], starts: Sequence[int]) -> Tensor:
        """A stream's values of these sequences, shifted by one where it is aligned with labels, [all tokens, …].

        Positions that this rank has no tokens of have the stream's fill.

        Args:
            places: of the sequences in the batch.
            lengths: tokens of each.
            starts: where each begins, and at last where all end.
        """
        column = torch.full((starts[-1], *stream.trailing), stream.fill, dtype=getattr(torch, stream.dtype))
        values, shift = self.arrays[stream.host_name], 1 if stream.align == "label" else 0
        for begin, length, place in zip(starts, lengths, places, strict=False):
            for start, end, offset in self.pieces[place]:
                # The last token predicts nothing, and nothing predicts the first.
                first, last = max(start - shift, 0), min(end - shift, length - 1)
                source = offset + first + shift - start
                column[begin + first : begin + last] = values[source : source + last - first]
        return column
