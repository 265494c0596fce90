"""Where the sequences of a micro-batch lie in its [rows, tokens] tensors, and sums over each of them.

Two layouts: padded, a row each; packed, one after another in a single row. Under context parallelism a rank holds an
equal share of every sequence, in two chunks (zigzag.py). Losses and credit see the difference through this class alone.
"""

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """The layout of one micro-batch on this rank."""

    lengths: Tensor | None = None
    """[sequences] int64: packed, each with so many of this rank's tokens, padding included. None: each row is one."""
    context_group: torch.distributed.ProcessGroup | None = None
    """The ranks that share the sequences, or None."""

    @property
    def context_size(self) -> int:
        """Ranks that share each sequence."""
        return 1 if self.context_group is None else self.context_group.size()

    @property
    def context_rank(self) -> int:
        """This rank's place among them."""
        return 0 if self.context_group is None else self.context_group.rank()

    def local_lengths(self, values: Tensor) -> Tensor:
        """[sequences] int64: this rank's tokens of each sequence, for [rows, tokens] values read row by row."""
        if self.lengths is not None:
            return self.lengths
        return torch.full((values.shape[0],), values.shape[1], dtype=torch.int64, device=values.device)

    def total(self, values: Tensor) -> Tensor:
        """[sequences] sum over each sequence of [rows, tokens] values, on all the ranks that share it. No gradient."""
        values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
        if self.lengths is None:
            total = values.sum(dim=1)
        else:
            total = torch.segment_reduce(
                values.flatten(),
                "sum",
                lengths=self.lengths,
                unsafe=True,  # the check of the lengths would wait for the GPU
            )
        if self.context_size > 1:
            torch.distributed.all_reduce(total, group=self.context_group)
        return total

    def spread(self, values: Tensor, over: Tensor) -> Tensor:
        """Each sequence's value to its tokens: [sequences] to what spreads to `over`, [rows, tokens]."""
        if self.lengths is None:
            return values[:, None]
        # Told the size, it need not wait for the lengths to arrive from the GPU.
        return values.repeat_interleave(self.lengths, output_size=over.numel())[None, :]
