"""The order in which context parallelism cuts a sequence, so that causal attention costs the same on every rank.

A sequence is cut into 2C chunks for C ranks. Rank r holds chunks r and 2C−1−r, as in Megatron-Core and Transformer
Engine.
"""

import torch
from torch import Tensor


def zigzag_positions(local_tokens: int, ranks: int, device: torch.device) -> Tensor:
    """Return the positions that each context-parallel rank holds, [ranks, local_tokens]: chunks r and 2C−1−r."""
    chunks = torch.arange(local_tokens * ranks, device=device).view(2 * ranks, local_tokens // 2)
    order = torch.arange(ranks, device=device)
    return torch.cat([chunks[order], chunks[2 * ranks - 1 - order]], dim=1)
