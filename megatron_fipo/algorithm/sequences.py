"""The positions of a micro-batch's sequences in its [rows, tokens] tensors, and sums over each sequence.

There are two layouts. Padded: each sequence is a row. Packed: all sequences follow one another in a single row. Under
context parallelism a rank holds an equal share of every sequence, in two chunks (zigzag.py). Only this class depends on
the layout; losses and credit use its methods.
"""

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """The layout of one micro-batch on this rank."""

    lengths: Tensor | None = None
    """[sequences] int64, if packed: this rank's tokens of each sequence, padding included. None: each row is one."""
    context_group: torch.distributed.ProcessGroup | None = None
    """The ranks that share the sequences, or None."""

    @property
    def context_size(self) -> int:
        """The number of ranks that share each sequence."""
        return 1 if self.context_group is None else self.context_group.size()

    @property
    def context_rank(self) -> int:
        """This rank's index among them."""
        return 0 if self.context_group is None else self.context_group.rank()

    def local_lengths(self, values: Tensor) -> Tensor:
        """Return this rank's tokens of each sequence, [sequences] int64, for [rows, tokens] values read row by row."""
        if self.lengths is not None:
            return self.lengths
        return torch.full((values.shape[0],), values.shape[1], dtype=torch.int64, device=values.device)

    def total(self, values: Tensor) -> Tensor:
        """Sum [rows, tokens] values over each sequence, on all ranks that share it. Return [sequences], no gradient."""
        values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
        if self.lengths is None:
            total = values.sum(dim=1)
        else:
            total = torch.segment_reduce(
                values.flatten(),
                "sum",
                lengths=self.lengths,
                unsafe=True,  # checking the lengths would wait for the GPU
            )
        if self.context_size > 1:
            torch.distributed.all_reduce(total, group=self.context_group)
        return total

    def spread(self, values: Tensor, over: Tensor) -> Tensor:
        """Copy each sequence's value to its tokens: [sequences] to a shape that broadcasts to `over`."""
        if self.lengths is None:
            return values[:, None]
        # With the size given, torch does not wait for the lengths from the GPU.
        return values.repeat_interleave(self.lengths, output_size=over.numel())[None, :]
