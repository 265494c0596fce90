"""The two passes of logprobs.py over the logits as CUDA kernels: each logit is read once forward and once backward.

The torch path of logprobs.py, which passes over an fp32 chunk a dozen times, is the reference. Triton comes with torch
for CUDA, and nothing else imports this module.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def statistics_on_cuda(logits: Tensor, labels: Tensor, valid: int, temperature: float) -> tuple[Tensor, Tensor]:
    """What `logprobs.statistics` returns, in one pass: the maximum is corrected as the row goes by.

    Args:
        logits: [tokens, local vocabulary], any floating type, rows contiguous.
        labels: [tokens] int64 in [0, local vocabulary), or -1 for a token whose label another rank holds.
        valid: columns that take part, the first ones.
    """
    tokens = logits.shape[0]
    maxima = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    sums = torch.empty(3, tokens, dtype=torch.float32, device=logits.device)
    if tokens:
        _statistics_kernel[(tokens,)](
            logits, labels, maxima, sums, tokens, logits.stride(0), valid, temperature, BLOCK=BLOCK, num_warps=8
        )
    return maxima, sums


def gradient_on_cuda(
    logits: Tensor, labels: Tensor, normaliser: Tensor, scale: Tensor, valid: int, temperature: float, into: Tensor
) -> None:
    """Write scale · (1[label] − softmax(logits / temperature)) into `into`, which may be `logits` itself.

    Args:
        logits, labels, valid: as above.
        normaliser: [tokens] fp32, the log of the sum of exponentials over all ranks.
        scale: [tokens] fp32; where it is 0, the logits are not read.
        into: [tokens, local vocabulary] of the type of the logits, rows contiguous.
    """
    tokens, width = logits.shape
    if tokens:
        _gradient_kernel[(tokens, triton.cdiv(width, BLOCK))](
            logits,
            labels,
            normaliser,
            scale,
            into,
            logits.stride(0),
            into.stride(0),
            width,
            valid,
            temperature,
            BLOCK=BLOCK,
            num_warps=8,
        )


@triton.jit
def _statistics_kernel(logits, labels, maxima, sums, tokens, stride, valid, temperature, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * stride
    column = tl.arange(0, BLOCK)
    # A value of the row, not −∞: the difference of two maxima has to be a number.
    maximum = tl.load(row).to(tl.float32) / temperature
    total = maximum * 0.0
    weighted = maximum * 0.0
    for start in range(0, valid, BLOCK):
        inside = start + column < valid
        value = tl.load(row + start + column, mask=inside, other=float("-inf")).to(tl.float32) / temperature
        larger = tl.maximum(maximum, tl.max(value, 0))
        gap = maximum - larger
        shifted = value - larger
        exponential = tl.exp(shifted)
        # Σ e^(x−m') (x−m') = e^(m−m') (Σ e^(x−m) (x−m) + (m−m') Σ e^(x−m))
        weighted = tl.exp(gap) * (weighted + gap * total)
        weighted += tl.sum(tl.where(inside, exponential * shifted, 0.0), 0)
        total = tl.exp(gap) * total + tl.sum(exponential, 0)
        maximum = larger
    label = tl.load(labels + token)
    held = label >= 0
    target = tl.load(row + tl.where(held, label, 0)).to(tl.float32) / temperature
    tl.store(maxima + token, maximum)
    tl.store(sums + token, total)
    tl.store(sums + tokens + token, tl.where(held, target - maximum, 0.0))
    tl.store(sums + 2 * tokens + token, weighted)


@triton.jit
def _gradient_kernel(
    logits,
    labels,
    normaliser,
    scales,
    gradient,
    logits_stride,
    gradient_stride,
    width,
    valid,
    temperature,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scales + token)
    read = column < tl.where(scale != 0.0, valid, 0)
    value = tl.load(logits + token * logits_stride + column, mask=read, other=float("-inf")).to(tl.float32)
    share = tl.exp(value / temperature - tl.load(normaliser + token))
    wanted = tl.where(column == tl.load(labels + token), 1.0, 0.0)
    tl.store(
        gradient + token * gradient_stride + column,
        (scale * (wanted - share)).to(gradient.dtype.element_ty),
        mask=column < width,
    )
