"""Curves of groups over the steps: the mean over seeds, with a band from the minimum to the maximum."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from megatron_fipo.comparison.groups import Group
from megatron_fipo.comparison.runs import Run
from megatron_fipo.comparison.scores import series
from megatron_fipo.tracking.page import Chart, Line

_TRAINING = {
    "reward_mean": ("Reward in training", "mean reward"),
    "response_length_mean": ("Response length in training", "tokens"),
    "entropy": ("Entropy", "nats per token"),
    "influence_weights_std": ("Spread of the influence weight f", "standard deviation"),
    "ppo_kl": ("Policy KL", "ppo_kl"),
    "pg_clipfrac": ("Share of clipped ratios", "share"),
    "grad_norm": ("Gradient norm, before clipping", "norm"),
    "tokens_per_second": ("Tokens per second", "whole step"),
}
_HELD_OUT = {"accuracy": "avg@k", "cons_at_k": "cons@k", "pass_at_k": "pass@k"}


def charts(groups: Sequence[Group], sources: Sequence[str]) -> list[Chart]:
    """Return charts of held-out scores, over all problems and for each data source, and then of training metrics.

    A chart is left out if no run has its metric at two or more steps.
    """
    drawn = [
        *(_held_out(groups, metric, None, f"Held-out {label}") for metric, label in _HELD_OUT.items()),
        *(_held_out(groups, "accuracy", source, f"Held-out avg@k: {source}") for source in sources),
        _held_out(groups, "response_length_mean", None, "Held-out response length", "tokens"),
    ]
    for metric, (title, axis) in _TRAINING.items():
        drawn.append(Chart(title, axis, _lines(groups, partial(_training, metric))))
    return [chart for chart in drawn if any(len(line.x) > 1 for line in chart.lines)]


def _held_out(groups: Sequence[Group], metric: str, source: str | None, title: str, axis: str = "share right") -> Chart:
    return Chart(title, axis, _lines(groups, partial(series, metric=metric, source=source)))


def _training(metric: str, run: Run) -> dict[int, float]:
    found = {step: row.get(metric) for step, row in sorted(run.steps.items())}
    return {step: float(value) for step, value in found.items() if isinstance(value, int | float)}


def _lines(groups: Sequence[Group], of_run: Callable[[Run], Mapping[int, float]]) -> list[Line]:
    lines = []
    for group in groups:
        curves = [found for run in group.runs if (found := of_run(run))]
        steps = sorted(set().union(*curves))
        if not steps:
            continue
        # If some runs are shorter, the mean continues over the others.
        values = [[curve[step] for curve in curves if step in curve] for step in steps]
        means: list[float | None] = [math.fsum(found) / len(found) for found in values]
        band = len(curves) > 1
        low, high = [min(found) for found in values], [max(found) for found in values]
        lines.append(Line(group.name, steps, means, low if band else None, high if band else None))
    return lines
