"""Policy losses behind one signature: tensors of one micro-batch in, a loss a token out.

A loss is a function `(LossInputs, AlgorithmConfig) -> TokenLosses` in `LOSSES`. What all losses share — truncated
importance sampling against the engine, aggregation, statistics — is done once, in `policy_loss`. Nothing here knows
how the model is laid out: a row may be cut over context-parallel ranks, and the few sums that need the whole row go
through `LossInputs.context_group`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed
from torch import Tensor

from megatron_fipo.algorithm.credit import LOG_RATIO_CLAMP, influence_weights
from megatron_fipo.config import AlgorithmConfig


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch as the loss sees it. A row is one sequence; all are fp32 unless said otherwise."""

    log_probs: Tensor
    """[rows, tokens], of the policy being trained; carries the gradient."""
    old_log_probs: Tensor
    """[rows, tokens], of the policy before the step's first update, by the trainer."""
    rollout_log_probs: Tensor
    """[rows, tokens], of the engine that sampled."""
    advantages: Tensor
    """[rows, 1]"""
    response_mask: Tensor
    """[rows, tokens] bool: the token belongs to the response."""
    response_lengths: Tensor
    """[rows] int64, tokens of the whole response, over all context-parallel ranks; 0 for a filler row."""
    context_group: torch.distributed.ProcessGroup | None = None
    """The ranks that share the rows, or None."""

    def over_row(self, values: Tensor) -> Tensor:
        """[rows, 1] sum of each row's values, over all the ranks that share it. Without gradient."""
        total = values.detach().float().sum(dim=1, keepdim=True)
        if self.context_group is not None and self.context_group.size() > 1:
            torch.distributed.all_reduce(total, group=self.context_group)
        return total


@dataclass(frozen=True)
class TokenLosses:
    """What a loss function returns: a loss a token, which tokens count, and what to report."""

    losses: Tensor
    """[rows, tokens]"""
    mask: Tensor
    """[rows, tokens] bool: tokens in numerator and denominator; a subset of the response mask."""
    means: dict[str, Tensor] = field(default_factory=dict)
    """[rows, tokens] each: reported as the mean over all response tokens."""
    extremes: dict[str, Tensor] = field(default_factory=dict)
    """[rows, tokens] each: reported as the least and greatest over all response tokens."""
    row_counts: dict[str, Tensor] = field(default_factory=dict)
    """[rows] each: reported as the sum over all rows."""


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, config: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """PPO's clipped objective with decoupled bounds (DAPO) and the dual clip, as a loss.

    Args:
        ratio: [rows, tokens] π/π_old with gradient.
        advantages: [rows, tokens] or [rows, 1], detached.

    Returns:
        The loss a token; what to report of it; and where the dual clip holds, [rows, tokens] bool.
    """
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    pessimistic = torch.maximum(plain, clipped)
    bound = -advantages * config.clip_ratio_c
    dual_clipped = (advantages < 0) & (pessimistic > bound)
    losses = torch.where(dual_clipped, bound.expand_as(pessimistic), pessimistic)
    reported = {"pg_clipfrac": (clipped > plain).float(), "pg_clipfrac_lower": dual_clipped.float()}
    return losses, reported, dual_clipped


def vanilla(inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """The clipped policy gradient of PPO, GRPO and DAPO; the configuration tells them apart."""
    ratio = _log_ratio(inputs).exp()
    losses, reported, _ = clipped_surrogate(ratio, inputs.advantages, config)
    return TokenLosses(losses, inputs.response_mask, means=reported)


def future_kl(inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """FIPO: the clipped policy gradient with each token's advantage times its influence weight.

    Deviates from the released code in one thing: the caller's mean is one over the whole mini-batch, as in the paper.
    """
    settings = config.future_kl
    assert settings is not None, "config_checks refuses loss_mode=future_kl without algorithm.future_kl"
    log_ratio = _log_ratio(inputs)
    influence = influence_weights(
        log_ratio.detach(),
        inputs.response_mask,
        inputs.advantages,
        settings,
        config.clip_ratio_c,
        inputs.context_group,
    )
    losses, reported, dual_clipped = clipped_surrogate(log_ratio.exp(), inputs.advantages * influence.weights, config)
    mask, row_counts = inputs.response_mask, {}
    if settings.drop_dual_clipped:
        dropped = inputs.over_row(dual_clipped & mask) > 1
        mask = mask & ~dropped
        row_counts["responses_dropped"] = dropped[:, 0].float()
    reported |= {
        "influence_weights": influence.weights,
        "influence_weights_square": influence.weights.square(),
        "influence_weights_raw": influence.raw,
        "influence_clipfrac_low": (influence.raw < settings.band_low).float(),
        "influence_clipfrac_high": (influence.raw > settings.band_high).float(),
    }
    extremes = {"influence_weights": influence.weights, "influence_weights_raw": influence.raw}
    return TokenLosses(losses, mask, reported, extremes, row_counts)


LOSSES: dict[str, Callable[[LossInputs, AlgorithmConfig], TokenLosses]] = {"vanilla": vanilla, "future_kl": future_kl}


def policy_loss(inputs: LossInputs, config: AlgorithmConfig) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss sum, normaliser and statistics of one micro-batch.

    The three add up: over micro-batches and ranks, Σ loss / Σ normaliser is the mini-batch's loss, whatever the layout.

    Returns:
        The loss sum (scalar with gradient), the normaliser (int32 scalar: tokens or sequences, by loss_agg_mode), and
        named scalars: sum/…, min/…, max/… and count/… (`statistics.py` turns them into metrics).
    """
    token = LOSSES[config.loss_mode](inputs, config)
    losses = token.losses
    if config.importance_sampling_cap is not None:
        mismatch = inputs.old_log_probs - inputs.rollout_log_probs
        # Corrects for the engine's numerics; kept out of F, which would amplify a constant bias 47 times.
        losses = losses * mismatch.exp().clamp(max=config.importance_sampling_cap)
    loss_sum, normaliser = _aggregate(torch.where(token.mask, losses, 0.0), token.mask, inputs, config.loss_agg_mode)
    means = token.means | {"ppo_kl": (inputs.old_log_probs - inputs.log_probs).detach()}
    statistics = token_statistics(inputs.response_mask, means, token.extremes)
    statistics |= {f"count/{name}": values.sum().float() for name, values in token.row_counts.items()}
    statistics |= {"count/loss": loss_sum.detach().float(), "count/normaliser": normaliser.float()}
    return loss_sum, normaliser, statistics


@torch.no_grad()
def token_statistics(
    mask: Tensor, means: dict[str, Tensor], extremes: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Scalars that add up (`statistics.py`) of quantities a token; all [rows, tokens], over the tokens of the mask."""
    found = {f"sum/{name}": torch.where(mask, values, 0.0).sum() for name, values in means.items()}
    for name, values in (extremes or {}).items():
        found[f"min/{name}"] = torch.where(mask, values, torch.inf).amin()
        found[f"max/{name}"] = torch.where(mask, values, -torch.inf).amax()
    return {name: value.float() for name, value in (found | {"count/tokens": mask.sum()}).items()}


def _log_ratio(inputs: LossInputs) -> Tensor:
    return (inputs.log_probs - inputs.old_log_probs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)


def _aggregate(losses: Tensor, mask: Tensor, inputs: LossInputs, mode: str) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the mini-batch's loss, this micro-batch's and rank's share of them."""
    if mode == "token-mean":
        return losses.sum(), mask.sum().to(torch.int32)
    sequences = (inputs.response_lengths > 0).sum().to(torch.int32)
    if inputs.context_group is not None and inputs.context_group.rank() > 0:
        sequences = torch.zeros_like(sequences)  # the ranks that share a row must count it once
    if mode == "seq-mean-token-mean":
        losses = losses / inputs.response_lengths.clamp(min=1)[:, None]
    return losses.sum(), sequences
