"""Combine statistics of micro-batches and ranks, which are named tensors, into the metrics of one update.

The name says how a statistic is combined and reported. `sum/x` is summed, and reported as a mean over response tokens.
`count/x` is summed and reported as it is. `min/x` and `max/x` are the minimum and the maximum. `mean/x` holds a sum and
its own count; both are summed, and the mean is reported. `histogram/x` holds counts per bin; they are summed and
reported as quantiles. So one collective sends all statistics, and the result does not depend on the layout.
"""

import math

import torch
from torch import Tensor

_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)

# Bins of a log-ratio x are equally wide in asinh(x / 1e-3): 1e-4 around 0, and 10 % of |x| far from 0. Their number is
# odd, so that 0, an unchanged policy's log-ratio, is the centre of a bin and its quantiles are exactly 1.
_BINS = 201
_FINEST = 1e-3
_LARGEST = 20.0
_HALF_RANGE = math.asinh(_LARGEST / _FINEST)


@torch.no_grad()
def token_statistics(
    mask: Tensor, means: dict[str, Tensor], extremes: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return scalar statistics of per-token quantities, [rows, tokens] each, over the tokens of the mask."""
    found = {f"sum/{name}": torch.where(mask, values, 0.0).sum() for name, values in means.items()}
    for name, values in (extremes or {}).items():
        found[f"min/{name}"] = torch.where(mask, values, torch.inf).amin()
        found[f"max/{name}"] = torch.where(mask, values, -torch.inf).amax()
    return {name: value.float() for name, value in (found | {"count/tokens": mask.sum()}).items()}


@torch.no_grad()
def part_means(values: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return means over parts of the tokens, such as the quarters of responses.

    Args:
        values: [rows, tokens]
        parts: a mask for each mean's name, [rows, tokens] bool

    Returns:
        `mean/x` for each part, [2] fp32: the sum of its values, and their number.
    """
    return {
        f"mean/{name}": torch.stack([torch.where(part, values, 0.0).sum(), part.sum()]).float()
        for name, part in parts.items()
    }


@torch.no_grad()
def ratio_histograms(log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Count the tokens' log-ratios per bin, for positive and for negative advantages.

    Args:
        log_ratio: [rows, tokens]
        advantages: [rows, 1]
        mask: [rows, tokens] bool

    Returns:
        `histogram/ratio_positive` and `histogram/ratio_negative`, [bins] fp32 each.
    """
    place = (torch.asinh(log_ratio.float() / _FINEST) / _HALF_RANGE).clamp(-1, 1)  # −1 … 1
    bins = ((place + 1) / 2 * (_BINS - 1)).round().long()
    counts = torch.zeros(2, _BINS, device=log_ratio.device)
    # One pass for both signs. fp32 represents these whole numbers exactly, so the order of additions does not matter.
    index = bins + _BINS * (advantages < 0)
    counts.view(-1).scatter_add_(0, index.flatten(), (mask & (advantages != 0)).float().flatten())
    return {"histogram/ratio_positive": counts[0], "histogram/ratio_negative": counts[1]}


def combine(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Combine several sets of statistics with the same names into one.

    Args:
        parts: one dictionary per micro-batch or rank.
    """
    combined = {}
    for name in parts[0]:
        values = torch.stack([part[name] for part in parts])
        kind = name.partition("/")[0]
        combined[name] = {"min": values.amin, "max": values.amax}.get(kind, values.sum)(dim=0)
    return combined


def to_vector(statistics: dict[str, Tensor]) -> Tensor:
    """Return all statistics, in the order of their names, as one fp64 vector, so that one collective can send them."""
    return torch.cat([statistics[name].double().flatten() for name in sorted(statistics)])


def from_vector(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Invert `to_vector`, for statistics with the names and shapes of `like`."""
    names = sorted(like)
    parts = vector.split([like[name].numel() for name in names])
    return {name: part.view(like[name].shape) for name, part in zip(names, parts, strict=True)}


def metrics(statistics: dict[str, Tensor]) -> dict[str, float]:
    """Return the metrics of fully combined statistics. With an empty mask a metric is left out, and never NaN."""
    scalars = {name: value.item() for name, value in statistics.items() if value.dim() == 0}
    tokens = scalars["count/tokens"]
    reported = {"tokens_trained": tokens}
    for name, value in scalars.items():
        kind, _, what = name.partition("/")
        if kind == "sum" and tokens > 0:
            reported[f"{what}_mean" if f"min/{what}" in scalars else what] = value / tokens
        elif kind in ("min", "max") and math.isfinite(value):
            reported[f"{what}_{kind}"] = value
        elif kind == "count" and what not in ("tokens", "loss", "normaliser"):
            reported[what] = value
    for name, counts in statistics.items():
        if name.startswith("histogram/"):
            reported |= _quantiles(name.removeprefix("histogram/"), counts)
        elif name.startswith("mean/") and counts[1] > 0:
            reported[name.removeprefix("mean/")] = (counts[0] / counts[1]).item()
    if scalars.get("count/normaliser", 0) > 0:
        reported["loss"] = scalars["count/loss"] / scalars["count/normaliser"]
    square = reported.pop("influence_weights_square", None)
    if square is not None:
        variance = square - reported["influence_weights_mean"] ** 2
        reported["influence_weights_std"] = math.sqrt(max(variance, 0.0))
    square = reported.pop("is_weight_square", None)
    if square:
        # Kish's effective sample size, as a share of the tokens.
        reported["is_ess"] = reported["is_weight_mean"] ** 2 / square
    return reported


def _quantiles(name: str, counts: Tensor) -> dict[str, float]:
    """Return the ratios at the quantiles: exp of the centre of the quantile's bin. {} without tokens."""
    below = counts.double().cumsum(0)
    total = below[-1].item()
    if total == 0:
        return {}
    wanted = torch.tensor([max(math.ceil(quantile * total), 1) for quantile in _QUANTILES], dtype=below.dtype)
    places = torch.searchsorted(below, wanted.to(below.device)).double() / (_BINS - 1) * 2 - 1
    ratios = (torch.sinh(places * _HALF_RANGE) * _FINEST).exp()
    return {f"{name}_q{round(100 * q):02d}": ratio for q, ratio in zip(_QUANTILES, ratios.tolist(), strict=True)}
