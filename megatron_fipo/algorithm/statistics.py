"""Statistics that add up: named scalars of micro-batches and ranks become the metrics of one update.

The name says how a scalar combines. `sum/x` adds up and is reported as a mean over response tokens; `count/x` adds up
and is reported as it is; `min/x` and `max/x` are the least and the greatest.
"""

import math

import torch
from torch import Tensor


def combine(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One set of scalars from several, all with the same names.

    Args:
        parts: a dictionary a micro-batch or a rank, of scalars.
    """
    combined = {}
    for name in parts[0]:
        values = torch.stack([part[name] for part in parts])
        kind = name.partition("/")[0]
        combined[name] = {"min": values.amin, "max": values.amax}.get(kind, values.sum)()
    return combined


def to_vector(scalars: dict[str, Tensor]) -> tuple[list[str], Tensor]:
    """Names in a fixed order and their values as one fp64 vector, to cross the wire in one collective."""
    names = sorted(scalars)
    return names, torch.stack([scalars[name].double() for name in names])


def metrics(scalars: dict[str, float]) -> dict[str, float]:
    """Reported metrics of fully combined scalars; none of them is NaN on an empty mask, it is left out."""
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
    if scalars.get("count/normaliser", 0) > 0:
        reported["loss"] = scalars["count/loss"] / scalars["count/normaliser"]
    square = reported.pop("influence_weights_square", None)
    if square is not None:
        variance = square - reported["influence_weights_mean"] ** 2
        reported["influence_weights_std"] = math.sqrt(max(variance, 0.0))
    return reported
