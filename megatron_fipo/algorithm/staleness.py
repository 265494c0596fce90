"""Importance weights of tokens that another policy sampled than the one which the step starts from.

μ is the policy that sampled a token: an engine's arithmetic, and perhaps older weights. π_old is the trainer's before
the step's first update. w_t = π_old / μ corrects a token's loss. It never enters F, which is of log π_θ − log π_old
alone: F would multiply a constant bias of that difference by 1 / (1 − γ), about 47 at the published decay.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.config import AlgorithmConfig

_LARGEST = 20.0
"""|log w| is cut off here, so that w² is finite in fp32."""


@dataclass(frozen=True)
class Staleness:
    """What the loss makes of importance weights; all [rows, tokens], detached."""

    weights: Tensor
    """fp32: min(w, tis_cap), or 1 without a cap; 0 outside of is_bounds."""
    is_kept: Tensor
    """bool: w is inside is_bounds. The others leave the numerator of the loss, and stay in its denominator."""
    means: dict[str, Tensor]
    """What to report as means over response tokens."""
    extremes: dict[str, Tensor]
    """What to report as the least and the greatest."""


@torch.no_grad()
def staleness(old_log_probs: Tensor, rollout_log_probs: Tensor, config: AlgorithmConfig) -> Staleness | None:
    """Importance weights by `tis_cap` and `is_bounds`; None where neither is set.

    Truncated importance sampling: IMPALA (arXiv 1802.01561). Bounds: a token that the policy hardly produces any more,
    or that only another arithmetic produced, teaches nothing.

    Args:
        old_log_probs, rollout_log_probs: [rows, tokens] fp32, log π_old and log μ.
    """
    if config.tis_cap is None and config.is_bounds is None:
        return None
    ratio = (old_log_probs - rollout_log_probs).clamp(-_LARGEST, _LARGEST).exp()
    weights = ratio if config.tis_cap is not None else torch.ones_like(ratio)
    means = {"is_weight": ratio, "is_weight_square": ratio.square()}
    if config.tis_cap is not None:
        weights = ratio.clamp(max=config.tis_cap)
        means["is_capped"] = (ratio > config.tis_cap).float()
    is_kept = torch.ones_like(ratio, dtype=torch.bool)
    if config.is_bounds is not None:
        low, high = config.is_bounds
        is_kept = (ratio >= low) & (ratio <= high)
        means["is_masked"] = 1.0 - is_kept.float()
    return Staleness(torch.where(is_kept, weights, 0.0), is_kept, means, {"is_weight": ratio})
