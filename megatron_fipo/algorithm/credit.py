"""Future-KL credit: how much the policy moved *after* each token, discounted, as a weight on its advantage.

    F_t = Σ_{k≥t} γ^(k−t) · M_k · Δ_k  =  M_t Δ_t + γ F_{t+1}          (FIPO, arXiv 2603.19835)

The released code evaluates the sum as a chunked matrix product, O(T²). Here it is a suffix scan, O(T). Everything is
fp32 or wider and detached: the influence weight is a constant of the loss.
"""

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from megatron_fipo.config import FutureKLConfig

LOG_RATIO_CLAMP = 20.0
"""|Δ| is cut off here before the exponential, as in the released code."""

_BLOCK = 64


def suffix_scan(values: Tensor, gamma: float) -> Tensor:
    """Discounted sum of each position and all after it: F_t = values_t + γ F_{t+1}.

    Blocks of 64 are summed by one triangular matrix product; the blocks' heads are the same problem again with
    γ^64, 64 times shorter, so the whole is O(T) work in O(log T) steps. On CUDA fp32 goes through one kernel instead.

    Args:
        values: [rows, tokens], floating point.
        gamma: discount in [0, 1].

    Returns:
        [rows, tokens], same type.
    """
    if values.is_cuda and values.dtype == torch.float32:
        from megatron_fipo.algorithm.triton_scan import suffix_scan_on_cuda  # triton is only there with CUDA

        return suffix_scan_on_cuda(values, gamma)
    rows, tokens = values.shape
    if tokens == 0:
        return values.clone()
    blocks = -(-tokens // _BLOCK)
    padded = torch.nn.functional.pad(values, (0, blocks * _BLOCK - tokens)).view(rows, blocks, _BLOCK)
    position = torch.arange(_BLOCK, device=values.device)
    distance = position[:, None] - position[None, :]  # later minus earlier
    discount = _powers(gamma, distance.clamp(min=0), values.dtype).masked_fill(distance < 0, 0.0)
    sums = padded @ discount
    if blocks > 1:
        heads = suffix_scan(sums[:, :, 0], gamma**_BLOCK)
        after = torch.nn.functional.pad(heads[:, 1:], (0, 1))
        sums = sums + after[:, :, None] * _powers(gamma, _BLOCK - position, values.dtype)
    return sums.reshape(rows, blocks * _BLOCK)[:, :tokens]


def _powers(gamma: float, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.pow(torch.tensor(gamma, dtype=torch.float64, device=exponents.device), exponents).to(dtype)


def future_kl(values: Tensor, decay_rate: float, context_group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """F_t of each token, over whole sequences even when context parallelism cuts them.

    With C context-parallel ranks, rank r holds chunks r and 2C−1−r of each sequence (zigzag order). Each chunk is
    scanned where it lies; its head, one number a sequence, is all that the other ranks need: two floats a sequence
    and rank cross the wire, and nothing in the backward pass.

    Args:
        values: [rows, local tokens], M·Δ, zero where the response mask is. One sequence a row, right-padded.
        decay_rate: half-life τ in tokens; γ = 2^(−1/τ).
        context_group: the ranks that share the sequences, or None.

    Returns:
        [rows, local tokens], same type.
    """
    gamma = 2.0 ** (-1.0 / decay_rate)
    size = 1 if context_group is None else context_group.size()
    if size == 1:
        return suffix_scan(values, gamma)
    assert context_group is not None
    rank = context_group.rank()
    rows, local_tokens = values.shape
    length = local_tokens // 2
    scanned = suffix_scan(values.reshape(rows * 2, length), gamma).view(rows, 2, length)
    gathered = [torch.empty(rows, 2, dtype=values.dtype, device=values.device) for _ in range(size)]
    torch.distributed.all_gather(gathered, scanned[:, :, 0].contiguous(), group=context_group)
    by_rank = torch.stack(gathered, dim=1)  # [rows, ranks, 2]
    in_order = torch.cat([by_rank[:, :, 0], by_rank[:, :, 1].flip(1)], dim=1)  # chunk 0 … 2C−1
    carry = torch.nn.functional.pad(suffix_scan(in_order, gamma**length)[:, 1:], (0, 1))
    mine = carry[:, [rank, 2 * size - 1 - rank]]
    to_end = _powers(gamma, length - torch.arange(length, device=values.device), values.dtype)
    return (scanned + mine[:, :, None] * to_end).view(rows, local_tokens)


@dataclass(frozen=True)
class Influence:
    """The influence weight of each token and what it was before the band cut it."""

    weights: Tensor
    """[rows, tokens] f_t, detached."""
    raw: Tensor
    """[rows, tokens] exp(F_t), detached."""


@torch.no_grad()
def influence_weights(
    log_ratio: Tensor,
    response_mask: Tensor,
    advantages: Tensor,
    settings: FutureKLConfig,
    clip_ratio_c: float,
    context_group: torch.distributed.ProcessGroup | None = None,
) -> Influence:
    """f_t = clip(exp(F_t), band), held down where a negative advantage meets a high ratio.

    Args:
        log_ratio: [rows, tokens] Δ, already clamped.
        response_mask: [rows, tokens] bool, true on response tokens.
        advantages: [rows, tokens] or [rows, 1].
        settings: decay rate, band, safety rule and participation mask.
        clip_ratio_c: c, the ratio above which a token takes no part in the sum.
        context_group: the ranks that share the sequences, or None.
    """
    takes_part = response_mask
    if settings.participation_mask:
        threshold = torch.log(torch.tensor(clip_ratio_c, dtype=log_ratio.dtype, device=log_ratio.device))
        takes_part = response_mask & (log_ratio <= threshold)
    raw = future_kl(torch.where(takes_part, log_ratio, 0.0), settings.decay_rate, context_group).exp()
    weights = raw.clamp(settings.band_low, settings.band_high)
    unsafe = (advantages < 0) & (log_ratio.exp() > settings.safety_thresh)
    held_down = weights.clamp(0.8, 1.0) if settings.safety_rule == "clamp" else torch.ones_like(weights)
    return Influence(weights=torch.where(unsafe, held_down, weights), raw=raw)
