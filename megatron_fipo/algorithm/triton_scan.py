"""The suffix scan of credit.py as one CUDA kernel: one program per stretch, 1024 tokens at a time, the last ones first.

Within a block the scan is parallel (log₂ 1024 = 10 steps). From block to block one carry stays in a register. So each
token is read once and written once. The torch code of `credit.suffix_scan` is the reference. Triton is installed with
torch for CUDA. Only credit.py imports this module.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def suffix_scan_on_cuda(values: Tensor, gamma: float, lengths: Tensor) -> Tensor:
    """Return F_t = values_t + γ F_{t+1} within each stretch; see `credit.suffix_scan`.

    Args:
        values: [tokens] fp32, stretches one after another.
        gamma: discount in [0, 1].
        lengths: [stretches] int64.

    Returns:
        [tokens] fp32.
    """
    values = values.contiguous()
    sums = torch.empty_like(values)
    if values.numel():
        _suffix_scan_kernel[(lengths.numel(),)](values, sums, lengths.cumsum(0), lengths, gamma, BLOCK=BLOCK)
    return sums


@triton.jit
def _combine(later_decay, later_sum, decay, total):
    """Combine two neighbouring parts of a stretch. In a reverse scan the later part comes first."""
    return later_decay * decay, total + decay * later_sum


@triton.jit
def _suffix_scan_kernel(values, sums, ends, lengths, gamma, BLOCK: tl.constexpr):
    end = tl.load(ends + tl.program_id(0))
    length = tl.load(lengths + tl.program_id(0))
    position = tl.arange(0, BLOCK)
    blocks = tl.cdiv(length, BLOCK)
    carry = tl.full([], 0.0, tl.float32)
    for behind in range(blocks):
        token = (blocks - 1 - behind) * BLOCK + position
        place = end - length + token
        value = tl.load(values + place, mask=token < length, other=0.0)
        decay = tl.full([BLOCK], 1.0, tl.float32) * gamma
        decay_to_end, total = tl.associative_scan((decay, value), 0, _combine, reverse=True)
        total += decay_to_end * carry
        tl.store(sums + place, total, mask=token < length)
        carry = tl.sum(tl.where(position == 0, total, 0.0), 0)
