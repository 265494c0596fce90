"""How old the weights are that sampled what a step trains on."""

from collections.abc import Sequence
from statistics import fmean

import numpy

from megatron_fipo.records.sample import Group


def lag_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Return metrics of the lag, in steps, over the tokens that the policy produced; none without any.

    Args:
        version: of the weights that the step starts from. A token's lag is this less the version that sampled it.
    """
    samples = [sample for group in groups for sample in group.samples if sample.actions]
    if not samples:
        return {}
    spans = [span for sample in samples for span in sample.versions]
    tokens = numpy.bincount([version - span.version for span in spans], weights=[len(span) for span in spans])
    shares, lags = tokens / tokens.sum(), numpy.arange(len(tokens))
    versions = [len({span.version for span in sample.versions}) for sample in samples]
    metrics = {f"lag_share_{lag}": float(share) for lag, share in zip(lags, shares, strict=True)}
    return metrics | {
        "lag_mean": float(shares @ lags),
        "lag_max": float(lags[-1]),
        "versions_per_sample_mean": fmean(versions),
        "versions_per_sample_max": max(versions),
        "mixed_samples": sum(count > 1 for count in versions),
        "group_version_spread": fmean(_spread(group) for group in groups if any(s.actions for s in group.samples)),
    }


def _spread(group: Group) -> int:
    """Versions between the oldest and the newest that sampled a group's tokens."""
    found = [span.version for sample in group.samples for span in sample.versions]
    return max(found) - min(found)
