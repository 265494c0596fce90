"""The report's panels, drawn by matplotlib as inline SVG."""

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#2563a8", "#d9822b", "#3a8f5c", "#a8405f", "#6b5bb0", "#7a7a7a", "#b59b2a")
_FEW_POINTS = 40

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One small plot over the steps."""

    title: str
    lines: dict[str, str]
    """Metric of metrics.jsonl → label."""
    validation: dict[str, str]
    """Metric of validation.jsonl → label."""
    band: tuple[str, str] | None = None
    """Two metrics between which to shade."""
    stacked: bool = False
    """Areas on top of each other, instead of lines."""


PANELS = (
    Panel("Reward", {"reward_mean": "mean reward"}, {}),
    Panel(
        "Accuracy (avg, cons and pass@k: held-out)",
        {"accuracy": "training"},
        {"accuracy": "avg@k", "cons_at_k": "cons@k", "pass_at_k": "pass@k"},
    ),
    Panel("Response length (tokens)", {"response_length_mean": "training"}, {"response_length_mean": "held-out"}),
    Panel("Entropy (nats a token)", {"entropy": "entropy"}, {}),
    Panel(
        "Influence weight f",
        {"influence_weights_mean": "mean"},
        {},
        band=("influence_weights_min", "influence_weights_max"),
    ),
    Panel(
        "Share of clipped influence weights",
        {"influence_clipfrac_low": "at the lower bound", "influence_clipfrac_high": "at the upper bound"},
        {},
    ),
    Panel("Policy KL (ppo_kl)", {"ppo_kl": "old policy to new"}, {}),
    Panel("Share of clipped ratios", {"pg_clipfrac": "clipped", "pg_clipfrac_lower": "dual-clipped"}, {}),
    Panel("Gradient norm", {"grad_norm": "before clipping"}, {}),
    Panel(
        "Mean |trainer − engine| log-prob",
        {
            "log_prob_diff_mean": "whole response",
            "log_prob_diff_quarter_1": "first quarter",
            "log_prob_diff_quarter_4": "last quarter",
        },
        {},
    ),
    Panel("Tokens a second", {"tokens_per_second": "whole step"}, {}),
    Panel(
        "Seconds in each phase",
        {
            "seconds_sample": "sample",
            "seconds_verify": "verify",
            "seconds_log_probs": "log-probs",
            "seconds_update": "update",
            "seconds_weights": "weights",
            "seconds_validate": "validate",
            "seconds_checkpoint": "checkpoint",
        },
        {},
        stacked=True,
    ),
)


def draw(panel: Panel, steps: Rows, validations: Rows) -> str:
    """The panel as an `<svg>` element; an empty string when the run has none of its metrics."""
    shown = [key for key in panel.lines if _present(steps, key)]
    held_out = [key for key in panel.validation if _present(validations, key)]
    if not shown and not held_out:
        return ""
    # Imported here: only rank 0 draws, and the import takes a quarter of a second. A Figure of its own, without pyplot,
    # leaves no state behind.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title, "font.size": 9}):
        figure = Figure(figsize=(5.2, 2.8))
        axes = figure.subplots()
        if panel.stacked:
            _draw_stack(axes, panel, shown, steps)
        else:
            _draw_lines(axes, panel, shown, steps)
        for key, colour in zip(held_out, _COLOURS[1:], strict=False):
            axes.plot(*_series(validations, key), "o-", color=colour, markersize=4, label=panel.validation[key])
        _style(axes, panel.title)
        _arrange(figure, several=len(axes.get_legend_handles_labels()[0]) > 1)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _draw_lines(axes: "Axes", panel: Panel, keys: list[str], steps: Rows) -> None:
    marker = "." if len(steps) <= _FEW_POINTS else ""
    for key, colour in zip(keys, _COLOURS if len(keys) > 1 else _COLOURS[:1], strict=False):
        axes.plot(*_series(steps, key), color=colour, marker=marker, linewidth=1.4, label=panel.lines[key])
    if panel.band is not None and all(_present(steps, key) for key in panel.band):
        (x, low), (_, high) = (_series(steps, key) for key in panel.band)
        axes.fill_between(x, low, high, color=_COLOURS[0], alpha=0.15, linewidth=0, label="least to greatest")


def _draw_stack(axes: "Axes", panel: Panel, keys: list[str], steps: Rows) -> None:
    x = [row["step"] for row in steps]
    heights = [[row.get(key) or 0.0 for row in steps] for key in keys]
    # Bars for a short run, whose single long phases (a validation) an area would smear over their neighbours.
    axes.stackplot(x, heights, step="mid", labels=[panel.lines[key] for key in keys], colors=_COLOURS, linewidth=0)


def _style(axes: "Axes", title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5), useOffset=False)
    axes.figure.text(0.02, 0.98, title, va="top", fontweight="bold", fontsize=10)


def _arrange(figure: "Figure", several: bool) -> None:
    """Margins by hand, in half the time of matplotlib's layout engine; the legend above the curves and not on them."""
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.17, top=0.74 if several else 0.86)
    if several:
        figure.legend(
            loc="upper left", bbox_to_anchor=(0.0, 0.93), ncols=4, frameon=False, fontsize=8, columnspacing=1.2
        )


def _present(rows: Rows, key: str) -> bool:
    return any(row.get(key) is not None for row in rows)


def _series(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """Steps and values; NaN, a gap in the line, where a row lacks the metric."""
    values = (row.get(key) for row in rows)
    return [row["step"] for row in rows], [math.nan if value is None else float(value) for value in values]
