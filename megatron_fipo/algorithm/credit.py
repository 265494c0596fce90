"""Future-KL credit: how much the policy moved *after* each token, discounted, as a weight on its advantage.

    F_t = Σ_{k≥t} γ^(k−t) · M_k · Δ_k  =  M_t Δ_t + γ F_{t+1}          (FIPO, arXiv 2603.19835)

The released code evaluates the sum as a chunked matrix product, O(T²). Here it is a suffix scan, O(T). Everything is
fp32 or wider and detached: the influence weight is a constant of the loss.
"""

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from megatron_fipo.algorithm.sequences import SequenceLayout
from megatron_fipo.config import FutureKLConfig

LOG_RATIO_CLAMP = 20.0
"""|Δ| is clamped to this value before the exponential, as in the released code."""

_BLOCK = 16


def suffix_scan(values: Tensor, gamma: float, lengths: Tensor) -> Tensor:
    """Return the discounted sum over each position and all later ones in its stretch: F_t = values_t + γ F_{t+1}.

    A stretch is a run of consecutive tokens: a sequence, or a chunk of one. On CUDA, fp32 values use one kernel
    (triton_scan.py). The code here is the reference for that kernel.

    Args:
        values: [tokens], floating point: the stretches one after another.
        gamma: discount in [0, 1].
        lengths: [stretches] int64, at least 1 each; they add up to `tokens`.

    Returns:
        [tokens], same type.
    """
    if values.is_cuda and values.dtype == torch.float32:
        from megatron_fipo.algorithm.triton_scan import suffix_scan_on_cuda  # triton is installed only with CUDA

        return suffix_scan_on_cuda(values, gamma, lengths)
    decay = torch.full_like(values, gamma)
    decay[lengths.cumsum(0) - 1] = 0.0  # the sum does not continue over the end of a stretch
    return _recurrence(values, decay)


def _recurrence(values: Tensor, decay: Tensor) -> Tensor:
    """Return x with x_t = values_t + decay_t x_{t+1}; [tokens] each.

    All blocks of 16 tokens are scanned in parallel, in 16 steps. The first elements of the blocks then form the same
    problem, 16 times shorter. So the whole is O(T) work in O(log T) rounds.
    """
    tokens = values.numel()
    if tokens == 0:
        return values.clone()
    blocks = -(-tokens // _BLOCK)
    padding = (0, blocks * _BLOCK - tokens)
    sums, decays = (torch.nn.functional.pad(t, padding).view(blocks, _BLOCK).t().contiguous() for t in (values, decay))
    for position in reversed(range(_BLOCK - 1)):
        sums[position].addcmul_(decays[position], sums[position + 1])
        decays[position].mul_(decays[position + 1])  # now this is the decay up to the end of the block
    if blocks > 1:
        after = torch.nn.functional.pad(_recurrence(sums[0], decays[0])[1:], (0, 1))
        sums.addcmul_(decays, after)
    return sums.t().reshape(-1)[:tokens]


def future_kl(values: Tensor, decay_rate: float, layout: SequenceLayout) -> Tensor:
    """Return F_t of each token, over whole sequences, even if context parallelism cuts them.

    With C context-parallel ranks, rank r holds chunks r and 2C−1−r of each sequence (zigzag order). Each rank scans its
    own chunks. From each chunk the other ranks need only the first value of the result. So every rank sends two floats
    per sequence, and nothing in the backward pass.

    Args:
        values: [rows, tokens], M·Δ, zero outside the response.
        decay_rate: half-life τ in tokens; γ = 2^(−1/τ).
        layout: the positions of the sequences.

    Returns:
        [rows, tokens], same type.
    """
    gamma = 2.0 ** (-1.0 / decay_rate)
    lengths = layout.local_lengths(values)
    if layout.context_size == 1:
        return suffix_scan(values.flatten(), gamma, lengths).view_as(values)
    chunk_lengths = (lengths // 2).repeat_interleave(2)
    scanned = suffix_scan(values.flatten(), gamma, chunk_lengths)
    ends = chunk_lengths.cumsum(0)
    heads = scanned[ends - chunk_lengths].view(-1, 2)
    carry = _carry(heads, _powers(gamma, lengths // 2, values.dtype), layout).flatten()
    chunk = torch.arange(carry.numel(), device=values.device).repeat_interleave(
        chunk_lengths, output_size=values.numel()
    )
    to_end = ends[chunk] - torch.arange(values.numel(), device=values.device)
    return (scanned + carry[chunk] * _powers(gamma, to_end, values.dtype)).view_as(values)


def _carry(heads: Tensor, decay: Tensor, layout: SequenceLayout) -> Tensor:
    """Return F at the token after each of this rank's chunks, [sequences, 2].

    `heads` are the first values of this rank's chunks, [sequences, 2]. They are gathered from all ranks. `decay` is the
    decay over one chunk, [sequences].
    """
    size, rank = layout.context_size, layout.context_rank
    gathered = [torch.empty_like(heads) for _ in range(size)]
    torch.distributed.all_gather(gathered, heads, group=layout.context_group)
    by_rank = torch.stack(gathered, dim=1)  # [sequences, ranks, 2]
    in_order = torch.cat([by_rank[:, :, 0], by_rank[:, :, 1].flip(1)], dim=1)  # chunk 0 … 2C−1
    behind = torch.zeros_like(in_order)
    for chunk in reversed(range(2 * size - 1)):
        behind[:, chunk] = in_order[:, chunk + 1] + decay * behind[:, chunk + 1]
    return behind[:, [rank, 2 * size - 1 - rank]]


def _powers(gamma: float, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.full((), gamma, dtype=torch.float64, device=exponents.device).pow(exponents).to(dtype)


@dataclass(frozen=True)
class Influence:
    """The influence weight of each token, before and after it is clipped to the band."""

    weights: Tensor
    """[rows, tokens] f_t, detached."""
    raw: Tensor
    """[rows, tokens] exp(F_t), detached."""
    future_kl: Tensor
    """[rows, tokens] F_t, detached."""
    takes_part: Tensor
    """[rows, tokens] bool, M_t: the tokens that the sums include."""


@torch.no_grad()
def influence_weights(
    log_ratio: Tensor,
    response_mask: Tensor,
    advantages: Tensor,
    settings: FutureKLConfig,
    clip_ratio_c: float,
    layout: SequenceLayout,
    takes_part: Tensor | None = None,
) -> Influence:
    """Return f_t = clip(exp(F_t), band), limited further where the advantage is negative and the ratio high.

    Args:
        log_ratio: [rows, tokens] Δ, already clamped.
        response_mask: [rows, tokens] bool, true on tokens that the policy produced. Other tokens are left out of all
            sums, but count as distance.
        advantages: [rows, tokens], or a shape that broadcasts to it.
        settings: decay rate, band, safety rule and participation mask.
        clip_ratio_c: c, the ratio above which a token is left out of the sum.
        layout: the positions of the sequences.
        takes_part: [rows, tokens] bool, the tokens that sums include; None: all.
    """
    takes_part = response_mask if takes_part is None else response_mask & takes_part
    if settings.participation_mask:
        # In the log-ratio's own precision, and created on its device: a copy from the host would wait for the GPU.
        threshold = torch.full((), clip_ratio_c, dtype=log_ratio.dtype, device=log_ratio.device).log()
        takes_part = takes_part & (log_ratio <= threshold)
    summed = future_kl(torch.where(takes_part, log_ratio, 0.0), settings.decay_rate, layout)
    raw = summed.exp()
    weights = raw.clamp(settings.band_low, settings.band_high)
    unsafe = (advantages < 0) & (log_ratio.exp() > settings.safety_thresh)
    held_down = weights.clamp(0.8, 1.0) if settings.safety_rule == "clamp" else torch.ones_like(weights)
    return Influence(torch.where(unsafe, held_down, weights), raw, summed, takes_part)
