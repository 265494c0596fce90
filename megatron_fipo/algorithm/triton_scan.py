"""The suffix scan of credit.py as one CUDA kernel: a program a row, a block of 1024 tokens at a time, last block first.

Within a block the scan is a parallel one (log₂ 1024 = 10 steps); between blocks one carry stays in a register. So a row
is read once and written once. The torch path of `credit.suffix_scan` is the reference. Triton comes with torch for
CUDA, and nothing else imports this module.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def suffix_scan_on_cuda(values: Tensor, gamma: float) -> Tensor:
    """F_t = values_t + γ F_{t+1} of each row.

    Args:
        values: [rows, tokens] fp32.
        gamma: discount in [0, 1].

    Returns:
        [rows, tokens] fp32.
    """
    values = values.contiguous()
    sums = torch.empty_like(values)
    rows, tokens = values.shape
    if values.numel():
        _suffix_scan_kernel[(rows,)](values, sums, gamma, tokens, BLOCK=BLOCK)
    return sums


@triton.jit
def _combine(later_decay, later_sum, decay, total):
    """What two neighbouring stretches are together; in a reverse scan the later stretch comes first."""
    return later_decay * decay, total + decay * later_sum


@triton.jit
def _suffix_scan_kernel(values, sums, gamma, tokens, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * tokens
    position = tl.arange(0, BLOCK)
    blocks = tl.cdiv(tokens, BLOCK)
    carry = tl.full([], 0.0, tl.float32)
    for behind in range(blocks):
        token = (blocks - 1 - behind) * BLOCK + position
        value = tl.load(values + row + token, mask=token < tokens, other=0.0)
        decay = tl.full([BLOCK], 1.0, tl.float32) * gamma
        decay_to_end, total = tl.associative_scan((decay, value), 0, _combine, reverse=True)
        total += decay_to_end * carry
        tl.store(sums + row + token, total, mask=token < tokens)
        carry = tl.sum(tl.where(position == 0, total, 0.0), 0)
