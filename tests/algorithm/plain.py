"""The losses as published, one token at a time, differentiable: what test_losses.py and test_layouts.py compare with.

Shares no code with megatron_fipo/algorithm but the typed inputs. Slow on purpose: each line is a line of a paper.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_fipo.algorithm.losses import LossInputs
from megatron_fipo.config import AlgorithmConfig

TokenLoss = Callable[..., list[Tensor]]
"""(log-probs, log π/π_old, ratio, advantage, configuration), one response's, → a loss a token."""


def plain_loss(inputs: LossInputs, config: AlgorithmConfig) -> Tensor:
    """The loss of one mini-batch, a scalar."""
    responses = []
    for row in range(inputs.log_probs.shape[0]):
        mask = inputs.response_mask[row]
        log_probs = inputs.log_probs[row][mask]
        if len(log_probs) == 0:
            continue
        moved = log_probs - inputs.old_log_probs[row][mask]
        ratio = moved.clamp(-20, 20).exp()
        # Only F looks at where tokens are: by their distance in the sequence, context between them included.
        weights = _importance_weights(inputs.old_log_probs[row][mask], inputs.rollout_log_probs[row][mask], config)
        where = {}
        if config.loss_mode == "future_kl":
            where = {"places": mask.nonzero()[:, 0].tolist(), "stale": [weight == 0 for weight in weights]}
        losses = PLAIN[config.loss_mode](log_probs, moved, ratio, float(inputs.advantages[row]), config, **where)
        if losses:
            losses = [loss * weight for loss, weight in zip(losses, weights, strict=True)]
        if config.reference_kl_coef > 0 and losses:
            estimates = _reference_kl(log_probs, inputs.reference_log_probs[row][mask], config.reference_kl_estimator)
            losses = [loss + config.reference_kl_coef * kl for loss, kl in zip(losses, estimates, strict=True)]
        responses.append((losses, len(log_probs)))
    return _aggregate(responses, config)


def _importance_weights(old: Tensor, rollout: Tensor, config: AlgorithmConfig) -> list[float]:
    """One response's, a token after the other; 0: outside of the bounds."""
    weights = []
    for mismatch in (old - rollout).tolist():
        ratio = math.exp(mismatch)
        weight = 1.0 if config.tis_cap is None else min(ratio, config.tis_cap)
        is_outside = config.is_bounds is not None and not config.is_bounds[0] <= ratio <= config.is_bounds[1]
        weights.append(0.0 if is_outside else weight)
    return weights


def _reference_kl(log_probs: Tensor, reference: Tensor, estimator: str) -> list[Tensor]:
    distances = (reference - log_probs).clamp(-20, 20)
    if estimator == "k1":
        return [-d for d in distances]
    if estimator == "k2":
        return [d * d / 2 for d in distances]
    return [torch.exp(d) - 1 - d for d in distances]


def _aggregate(responses: list[tuple[list[Tensor], int]], config: AlgorithmConfig) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64)
    sums = [sum(losses, zero) for losses, _ in responses]
    if config.loss_agg_mode == "token-mean":
        return sum(sums, zero) / max(sum(len(losses) for losses, _ in responses), 1)
    count = max(len(responses), 1)
    if config.loss_agg_mode == "seq-mean-token-sum":
        return sum(sums, zero) / count
    if config.loss_agg_mode == "seq-mean-token-mean":
        return sum((total / length for total, (_, length) in zip(sums, responses, strict=True)), zero) / count
    assert config.loss_agg_mode == "seq-mean-token-sum-norm" and config.loss_scale_factor is not None
    return sum((total / config.loss_scale_factor for total in sums), zero) / count


def _clipped(ratio: Tensor, advantage: float, config: AlgorithmConfig) -> Tensor:
    low, high = 1 - config.clip_ratio_low, 1 + config.clip_ratio_high
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))


def _vanilla(
    log_probs: Tensor, moved: Tensor, ratio: Tensor, advantage: float, config: AlgorithmConfig
) -> list[Tensor]:
    losses = []
    for t in range(len(ratio)):
        loss = _clipped(ratio[t], advantage, config)
        bound = torch.tensor(-advantage * config.clip_ratio_c, dtype=ratio.dtype)
        losses.append(bound if advantage < 0 and loss > bound else loss)
    return losses


def plain_influence(
    delta: list[float],
    advantage: float,
    config: AlgorithmConfig,
    places: list[int] | None = None,
    stale: list[bool] | None = None,
) -> list[float]:
    """f_t of one response, each F_t a sum of its own.

    `places`: where its tokens are; None: one after the other. `stale`: which are outside of the bounds; None: none.
    """
    places = places or list(range(len(delta)))
    stale = stale or [False] * len(delta)
    kl = config.future_kl
    gamma = 2 ** (-1 / kl.decay_rate)
    weights = []
    takes_part = [
        (not kl.participation_mask or d <= math.log(config.clip_ratio_c)) and not (kl.mask_stale and is_stale)
        for d, is_stale in zip(delta, stale, strict=True)
    ]
    for t in range(len(delta)):
        future = sum(gamma ** (places[k] - places[t]) * delta[k] for k in range(t, len(delta)) if takes_part[k])
        weight = min(max(math.exp(future), kl.band_low), kl.band_high)
        if advantage < 0 and math.exp(delta[t]) > kl.safety_thresh:
            weight = 1.0 if kl.safety_rule == "one" else min(max(weight, 0.8), 1.0)
        weights.append(weight)
    return weights


def _future_kl(
    log_probs: Tensor,
    moved: Tensor,
    ratio: Tensor,
    advantage: float,
    config: AlgorithmConfig,
    places: list[int],
    stale: list[bool],
) -> list[Tensor]:
    losses, dual_clipped = [], 0
    for t, weight in enumerate(plain_influence(moved.clamp(-20, 20).tolist(), advantage, config, places, stale)):
        weighted = advantage * weight
        loss = _clipped(ratio[t], weighted, config)
        bound = torch.tensor(-weighted * config.clip_ratio_c, dtype=ratio.dtype)
        if weighted < 0 and loss > bound:
            loss, dual_clipped = bound, dual_clipped + 1
        losses.append(loss)
    return [] if config.future_kl.drop_dual_clipped and dual_clipped > 1 else losses


def _gspo(log_probs: Tensor, moved: Tensor, ratio: Tensor, advantage: float, config: AlgorithmConfig) -> list[Tensor]:
    """As printed: one ratio with gradient for the sequence. The mean over its tokens is the sequence's loss."""
    sequence_ratio = moved.mean().clamp(-20, 20).exp()
    return [_clipped(sequence_ratio, advantage, config) for _ in range(len(moved))]


def _cispo(log_probs: Tensor, moved: Tensor, ratio: Tensor, advantage: float, config: AlgorithmConfig) -> list[Tensor]:
    low, high = 1 - config.clip_ratio_low, 1 + config.clip_ratio_high
    weights = [min(max(r, low), high) for r in ratio.tolist()]
    return [-advantage * weight * log_probs[t] for t, weight in enumerate(weights)]


def _sapo(log_probs: Tensor, moved: Tensor, ratio: Tensor, advantage: float, config: AlgorithmConfig) -> list[Tensor]:
    tau = config.tau_pos if advantage > 0 else config.tau_neg
    return [-advantage * 4 / tau / (1 + torch.exp(-tau * (ratio[t] - 1))) for t in range(len(ratio))]


PLAIN: dict[str, TokenLoss] = {
    "vanilla": _vanilla,
    "future_kl": _future_kl,
    "gspo": _gspo,
    "cispo": _cispo,
    "sapo": _sapo,
}
