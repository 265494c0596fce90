"""Policy losses with one signature: tensors of one micro-batch in, one loss per token out.

A loss is a function `(LossInputs, AlgorithmConfig) -> TokenLosses`, in `LOSSES` or in a file of the user's
(docs/adding_a_loss.md). `policy_loss` does what all losses have in common: importance weights, aggregation and
statistics. The code here does not depend on the layout. Sequences may be padded or packed, and cut over
context-parallel ranks. The few sums over a whole sequence use `LossInputs.layout`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_fipo.algorithm.credit import LOG_RATIO_CLAMP, Influence, influence_weights
from megatron_fipo.algorithm.sequences import SequenceLayout
from megatron_fipo.algorithm.staleness import Staleness, staleness
from megatron_fipo.algorithm.statistics import ratio_histograms, token_statistics
from megatron_fipo.config import AlgorithmConfig
from megatron_fipo.errors import FipoError
from megatron_fipo.plugins import load_function
from megatron_fipo.records.streams import OLD_LOG_PROBS, REFERENCE_LOG_PROBS, ROLLOUT_LOG_PROBS

LOSS_KEY = "algorithm.loss"
_CHECKED = "config/checks.py refuses a loss without the settings that it reads"


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch as the loss sees it. All tensors are fp32 unless stated otherwise."""

    log_probs: Tensor
    """[rows, tokens], of the policy that is being trained; carries the gradient."""
    streams: Mapping[str, Tensor]
    """[rows, tokens] each, by their names in records/streams.py."""
    advantages: Tensor
    """[rows, tokens], or a shape that broadcasts to it; one value per sequence."""
    response_mask: Tensor
    """[rows, tokens] bool: the policy produced the token. What it was told within a response is not of it."""
    response_lengths: Tensor
    """[sequences] int64, the mask's tokens of each, over all context-parallel ranks; 0 for a padding sequence."""
    layout: SequenceLayout = field(default_factory=SequenceLayout)
    """The positions of the sequences; by default each row is one sequence."""

    @property
    def old_log_probs(self) -> Tensor:
        """[rows, tokens], computed by the trainer before the step's first update."""
        return self.streams[OLD_LOG_PROBS]

    @property
    def rollout_log_probs(self) -> Tensor:
        """[rows, tokens], from the engine that sampled the tokens."""
        return self.streams[ROLLOUT_LOG_PROBS]

    @property
    def reference_log_probs(self) -> Tensor:
        """[rows, tokens], of the policy from which training started; present only with reference_kl_coef."""
        return self.streams[REFERENCE_LOG_PROBS]


@dataclass(frozen=True)
class TokenLosses:
    """The result of a loss function: one loss per token, the mask of tokens that count, and metrics."""

    losses: Tensor
    """[rows, tokens]"""
    mask: Tensor
    """[rows, tokens] bool: tokens that count, a subset of the response mask. Others are left out of the numerator, and
    of the denominator of token-mean. A mean over responses still divides by all responses and their full lengths."""
    means: dict[str, Tensor] = field(default_factory=dict)
    """[rows, tokens] each: reported as the mean over all response tokens."""
    extremes: dict[str, Tensor] = field(default_factory=dict)
    """[rows, tokens] each: reported as the minimum and the maximum over all response tokens."""
    sequence_counts: dict[str, Tensor] = field(default_factory=dict)
    """[sequences] each, equal on all ranks that share a sequence: reported as the sum over all sequences."""
    influence: Influence | None = None
    """Where the loss has influence weights: for the credit viewer."""


Observer = Callable[[TokenLosses, Staleness | None], None]
"""Is given what a loss found of one micro-batch, and the importance weights that multiply it."""


def clipped_surrogate(ratio: Tensor, advantages: Tensor, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Return PPO's clipped objective with decoupled bounds (DAPO), as a loss.

    Args:
        ratio: [rows, tokens] π/π_old with gradient.
        advantages: [rows, tokens] or [rows, 1], detached.

    Returns:
        The loss per token, and whether it is clipped, [rows, tokens] bool.
    """
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(*_ratio_bounds(config))
    return torch.maximum(plain, clipped), clipped > plain


def dual_clip(losses: Tensor, advantages: Tensor, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Limit losses to at most −A c where A < 0. Return the losses, and whether each is limited, [rows, tokens] bool."""
    assert config.clip_ratio_c is not None, _CHECKED
    bound = -advantages * config.clip_ratio_c
    held = (advantages < 0) & (losses > bound)
    return torch.where(held, bound.expand_as(losses), losses), held


def vanilla(inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Return the clipped policy gradient loss of PPO, GRPO, Dr. GRPO and DAPO, which differ only in their settings."""
    losses, clipped = clipped_surrogate(_log_ratio(inputs).exp(), inputs.advantages, config)
    losses, dual_clipped = dual_clip(losses, inputs.advantages, config)
    reported = {"pg_clipfrac": clipped.float(), "pg_clipfrac_lower": dual_clipped.float()}
    return TokenLosses(losses, inputs.response_mask, reported)


def future_kl(inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Return the loss of FIPO: the clipped policy gradient, with each token's advantage times its influence weight.

    One thing differs from the released code: the caller takes one mean over the whole mini-batch, as in the paper.
    """
    settings = config.future_kl
    assert settings is not None and config.clip_ratio_c is not None, _CHECKED
    log_ratio = _log_ratio(inputs)
    stale = staleness(inputs.old_log_probs, inputs.rollout_log_probs, config) if settings.mask_stale else None
    influence = influence_weights(
        log_ratio.detach(),
        inputs.response_mask,
        inputs.advantages,
        settings,
        config.clip_ratio_c,
        inputs.layout,
        takes_part=stale.is_kept if stale else None,
    )
    advantages = inputs.advantages * influence.weights
    losses, clipped = clipped_surrogate(log_ratio.exp(), advantages, config)
    losses, dual_clipped = dual_clip(losses, advantages, config)
    mask, sequence_counts = inputs.response_mask, {}
    if settings.drop_dual_clipped:
        dropped = inputs.layout.total(dual_clipped & mask) > 1
        mask = mask & ~inputs.layout.spread(dropped, mask)
        sequence_counts["responses_dropped"] = dropped
    reported = {
        "pg_clipfrac": clipped.float(),
        "pg_clipfrac_lower": dual_clipped.float(),
        "influence_weights": influence.weights,
        "influence_weights_square": influence.weights.square(),
        "influence_weights_raw": influence.raw,
        "influence_clipfrac_low": (influence.raw < settings.band_low).float(),
        "influence_clipfrac_high": (influence.raw > settings.band_high).float(),
    }
    extremes = {"influence_weights": influence.weights, "influence_weights_raw": influence.raw}
    return TokenLosses(losses, mask, reported, extremes, sequence_counts, influence)


def gspo(inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Return the loss of GSPO (arXiv 2507.18071): one ratio per sequence, the geometric mean of its tokens' ratios.

    This is GSPO's token form, which has the same gradient: each token has the value of its sequence's ratio, and the
    gradient goes through the token's own log-prob. So the backward pass needs no communication between ranks.
    """
    moved = torch.where(inputs.response_mask, inputs.log_probs - inputs.old_log_probs, 0.0)
    mean = inputs.layout.total(moved) / inputs.response_lengths.clamp(min=1)
    log_ratio = inputs.layout.spread(mean, moved) + inputs.log_probs - inputs.log_probs.detach()
    ratio = log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    losses, clipped = clipped_surrogate(ratio, inputs.advantages, config)
    return TokenLosses(losses, inputs.response_mask, {"pg_clipfrac": clipped.float()})


def cispo(inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Return the loss of CISPO (MiniMax-M1, arXiv 2506.13585): −A · clip(ratio) · log π, the clipped ratio a constant.

    Every token keeps its gradient: the clip only bounds its weight.
    """
    ratio = _log_ratio(inputs).detach().exp()
    weight = ratio.clamp(*_ratio_bounds(config))
    losses = -inputs.advantages * weight * inputs.log_probs
    return TokenLosses(losses, inputs.response_mask, {"pg_clipfrac": (weight != ratio).float()})


def sapo(inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Return the loss of SAPO (arXiv 2511.20347): the gate (4/τ) σ(τ (ratio − 1)) instead of ratio and clip.

    τ depends on the sign of the advantage.
    """
    assert config.tau_pos is not None and config.tau_neg is not None, _CHECKED
    temperature = torch.full_like(inputs.advantages, config.tau_neg).masked_fill(inputs.advantages > 0, config.tau_pos)
    open_share = torch.sigmoid(temperature * (_log_ratio(inputs).exp() - 1))
    losses = -inputs.advantages * open_share * (4 / temperature)
    # The gate's slope with respect to the ratio: 1 at ratio 1, falling to 0 on both sides.
    slope = (4 * open_share * (1 - open_share)).detach()
    return TokenLosses(losses, inputs.response_mask, {"sapo_gate_slope": slope})


LOSSES: dict[str, Callable[[LossInputs, AlgorithmConfig], TokenLosses]] = {
    "vanilla": vanilla,
    "future_kl": future_kl,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
}


def policy_loss(
    inputs: LossInputs, config: AlgorithmConfig, observe: Observer | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return loss sum, normaliser and statistics of one micro-batch.

    All three are summed over micro-batches and ranks. Σ loss / Σ normaliser is the mini-batch's loss in any layout.
    `observe` is called with the values per token.

    Returns:
        The loss sum (scalar with gradient), the normaliser (int32 scalar: tokens or sequences, by loss_agg_mode), and
        named statistics, which `statistics.py` turns into metrics.
    """
    token = _token_losses(inputs, config)
    losses, means, extremes = token.losses, dict(token.means), dict(token.extremes)
    stale = staleness(inputs.old_log_probs, inputs.rollout_log_probs, config)
    if observe is not None:
        observe(token, stale)
    if stale is not None:
        losses = torch.where(stale.is_kept, losses * stale.weights, 0.0)
        means |= stale.means
        extremes |= stale.extremes
    if config.reference_kl_coef > 0:
        divergence = reference_kl(inputs, config.reference_kl_estimator)
        losses = losses + config.reference_kl_coef * divergence
        means["reference_kl"] = divergence.detach()
    loss_sum, normaliser = _aggregate(torch.where(token.mask, losses, 0.0), token.mask, inputs, config)
    log_ratio = (inputs.log_probs - inputs.old_log_probs).detach()
    statistics = token_statistics(inputs.response_mask, means | {"ppo_kl": -log_ratio}, extremes)
    statistics |= ratio_histograms(log_ratio, inputs.advantages, inputs.response_mask)
    statistics |= {
        f"count/{name}": values.sum().float() * _counts_sequences(inputs)
        for name, values in token.sequence_counts.items()
    }
    statistics |= {"count/loss": loss_sum.detach().float(), "count/normaliser": normaliser.float()}
    return loss_sum, normaliser, statistics


def _token_losses(inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Call the configured loss function. FipoError if the user's own returns something else than TokenLosses."""
    if config.loss is None:
        return LOSSES[config.loss_mode](inputs, config)
    found = load_function(config.loss, LOSS_KEY)(inputs, config, **config.loss_options)
    if isinstance(found, Tensor):
        found = TokenLosses(found, inputs.response_mask)
    shape = inputs.response_mask.shape
    if not isinstance(found, TokenLosses) or not isinstance(found.losses, Tensor) or found.losses.shape != shape:
        said = f"a {type(found).__name__}" if not isinstance(found, TokenLosses) else f"losses {_shape(found.losses)}"
        raise FipoError(f"{LOSS_KEY}: {config.loss} returned {said}; TokenLosses of shape {list(shape)} are right")
    if not isinstance(found.mask, Tensor) or found.mask.dtype != torch.bool or found.mask.shape != shape:
        raise FipoError(f"{LOSS_KEY}: {config.loss} returned a mask {_shape(found.mask)}; bool {list(shape)} is right")
    return found


def _shape(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"


def reference_kl(inputs: LossInputs, estimator: str) -> Tensor:
    """Estimate KL(π || π_reference) per token from the sampled token alone. Return [rows, tokens] with gradient.

    With d = log π_reference − log π (Schulman, "Approximating KL divergence"): k1 = −d, which is unbiased; k2 = d²/2,
    which has the gradient of the KL; k3 = exp(d) − 1 − d, which is unbiased and never negative, and is used by GRPO
    (arXiv 2402.03300).
    """
    distance = (inputs.reference_log_probs - inputs.log_probs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    estimates = {
        "k1": lambda: -distance,
        "k2": lambda: distance.square() / 2,
        "k3": lambda: k3(distance),
    }
    return estimates[estimator]()


def k3(distance: Tensor) -> Tensor:
    """exp(d) − 1 − d ≥ 0, which estimates KL(p || q) from a token that p sampled, with d = log q − log p."""
    return distance.expm1() - distance


def _log_ratio(inputs: LossInputs) -> Tensor:
    return (inputs.log_probs - inputs.old_log_probs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)


def _ratio_bounds(config: AlgorithmConfig) -> tuple[float, float]:
    assert config.clip_ratio_low is not None and config.clip_ratio_high is not None, _CHECKED
    return 1 - config.clip_ratio_low, 1 + config.clip_ratio_high


def _aggregate(losses: Tensor, mask: Tensor, inputs: LossInputs, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Return this micro-batch's and rank's share of the numerator and denominator of the mini-batch's loss."""
    if config.loss_agg_mode == "token-mean":
        return losses.sum(), mask.sum().to(torch.int32)
    sequences = (inputs.response_lengths > 0).sum().to(torch.int32) * _counts_sequences(inputs)
    return (losses / token_divisors(losses, inputs.response_lengths, inputs.layout, config)).sum(), sequences


def token_divisors(
    tokens: Tensor, response_lengths: Tensor, layout: SequenceLayout, config: AlgorithmConfig
) -> Tensor | float:
    """Return what each token's loss is divided by before losses are summed: a number, or [rows, tokens].

    Args:
        tokens: [rows, tokens], whose shape the result has.
        response_lengths: [sequences] int64, as LossInputs has them.
        layout: the positions of the sequences.
    """
    if config.loss_agg_mode == "seq-mean-token-mean":
        return layout.spread(response_lengths.clamp(min=1), tokens)
    if config.loss_agg_mode == "seq-mean-token-sum-norm":
        assert config.loss_scale_factor is not None, _CHECKED
        return config.loss_scale_factor
    return 1.0


def _counts_sequences(inputs: LossInputs) -> int:
    """Return 1 on one of the ranks that share the sequences, and 0 on the others, so that each is counted once."""
    return int(inputs.layout.context_rank == 0)
