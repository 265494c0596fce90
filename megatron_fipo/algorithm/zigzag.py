"""The order in which context parallelism cuts a sequence, so that causal attention costs every rank the same.

Rank r of C holds chunks r and 2C−1−r of the 2C that a sequence is cut into, as in Megatron-Core and Transformer Engine.
"""

import torch
from torch import Tensor


def zigzag_positions(local_tokens: int, ranks: int, device: torch.device) -> Tensor:
    """Positions in the sequence that each context-parallel rank holds, [ranks, local_tokens]: chunks r and 2C−1−r."""
    chunks = torch.arange(local_tokens * ranks, device=device).view(2 * ranks, local_tokens // 2)
    order = torch.arange(ranks, device=device)
    return torch.cat([chunks[order], chunks[2 * ranks - 1 - order]], dim=1)
