"""The charts of report.html, with the metrics that each one shows. report.js fills them with a run's numbers."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """One metric over the steps."""

    key: str
    """Its name in metrics.jsonl, or in validation.jsonl."""
    name: str
    """Its name in the legend. "{k}" stands for the number of samples per held-out problem."""
    held_out: bool = False
    """Whether the metric is in validation.jsonl."""
    low: str | None = None
    high: str | None = None
    """The metrics that bound a shaded band."""
    spread: str | None = None
    """Instead of `low` and `high`: a metric that is the half-width of the shaded band around the line."""
    dash: str = "solid"
    symbol: str = "circle"


@dataclass(frozen=True)
class Panel:
    """One chart over the steps. A curve is left out if the run lacks its metric, and a chart if it has no curves."""

    title: str
    y: str
    """Name of the vertical axis, with its unit."""
    lines: tuple[Curve, ...]
    percent: bool = False
    kind: str = "lines"
    """lines, or stack for stacked bars."""


PHASES = ("start", "sample", "verify", "log-probs", "update", "weights", "validate", "checkpoint")
"""In the order of a step. Colours and the rows of the timeline have the same order."""
ENGINES = "engines"
"""The row of the timeline that shows when some engine samples; with rollout.max_off_policy_steps while others do."""


def _phase_curve(phase: str) -> Curve:
    if phase == "validate":
        return Curve("seconds_validate", phase, held_out=True)
    return Curve(f"seconds_{phase.replace('-', '_')}", phase)


PANELS = (
    Panel(
        "Accuracy on held-out problems",
        "share right",
        (
            Curve("accuracy", "avg@{k}", held_out=True),
            Curve("cons_at_k", "cons@{k}", held_out=True, dash="dash", symbol="square-open"),
            Curve("pass_at_k", "pass@{k}", held_out=True, dash="dot", symbol="diamond-open"),
        ),
    ),
    Panel("Reward", "mean per response", (Curve("reward_mean", "reward"),)),
    Panel(
        "Response length",
        "tokens",
        (
            Curve(
                "response_length_mean",
                "training, middle half shaded",
                low="response_length_q25",
                high="response_length_q75",
            ),
            Curve("response_length_mean", "held-out", held_out=True, dash="dash", symbol="square-open"),
        ),
    ),
    Panel(
        "Response length by verdict, 10 to 90 % shaded",
        "tokens, median",
        (
            Curve(
                "response_length_right_q50", "right", low="response_length_right_q10", high="response_length_right_q90"
            ),
            Curve(
                "response_length_wrong_q50",
                "wrong",
                low="response_length_wrong_q10",
                high="response_length_wrong_q90",
                dash="dash",
            ),
        ),
    ),
    Panel(
        "Responses that reflect, verify and go back",
        "share of responses",
        (
            Curve("marker_share_reflection", "reflect"),
            Curve("marker_share_verification", "verify", dash="dash"),
            Curve("marker_share_backtracking", "go back", dash="dot"),
        ),
        percent=True,
    ),
    Panel(
        "Long without thinking",
        "share",
        (
            Curve("repeated_ngrams", "repeated 8 tokens"),
            Curve("latex_padding", "LaTeX padding, of characters", dash="dash"),
        ),
        percent=True,
    ),
    Panel(
        "Influence weight f: mean ± std",
        "weight",
        (Curve("influence_weights_mean", "mean", spread="influence_weights_std"),),
    ),
    Panel(
        "Influence weights at the band's bounds",
        "share of tokens",
        (
            Curve("influence_clipfrac_low", "lower bound"),
            Curve("influence_clipfrac_high", "upper bound", dash="dash"),
        ),
        percent=True,
    ),
    Panel("Entropy", "nats per token", (Curve("entropy", "entropy"),)),
    Panel("Accuracy in training", "share of responses right", (Curve("accuracy", "accuracy"),)),
    Panel("Policy KL, old to new (ppo_kl)", "nats per token", (Curve("ppo_kl", "ppo_kl"),)),
    Panel(
        "Clipped ratios",
        "share of tokens",
        (Curve("pg_clipfrac", "clipped"), Curve("pg_clipfrac_lower", "dual-clipped", dash="dash")),
        percent=True,
    ),
    Panel("Gradient norm, before clipping", "norm", (Curve("grad_norm", "norm"),)),
    Panel(
        "Trainer against engine: |Δ log-prob|",
        "nats per token",
        (
            Curve("log_prob_diff_mean", "whole"),
            Curve("log_prob_diff_quarter_1", "first quarter", dash="dot"),
            Curve("log_prob_diff_quarter_4", "last quarter", dash="dash"),
            Curve("probe_diff_max", "fixed text, the engine that differs most", dash="dashdot"),
        ),
    ),
    Panel(
        "Load of experts: the fullest against the mean",
        "times the mean",
        (Curve("router_load", "mean over layers"), Curve("router_load_max", "worst layer", dash="dash")),
    ),
    Panel(
        "Losses of routers, without their coefficients",
        "mean over layers and tokens",
        (Curve("router_aux_loss", "even load: 1"), Curve("router_z_loss", "squared logsumexp", dash="dash")),
    ),
    Panel(
        "Routers that would choose otherwise",
        "share of tokens and layers",
        (Curve("router_changed", "than replayed"), Curve("router_mismatch", "than the engine", dash="dash")),
        percent=True,
    ),
    Panel(
        "Groups sampled",
        "groups per step",
        (
            Curve("groups_kept", "trained on"),
            Curve("groups_dropped_all_right", "all right"),
            Curve("groups_dropped_all_wrong", "all wrong"),
            Curve("groups_dropped_surplus", "surplus"),
        ),
        kind="stack",
    ),
    Panel(
        "Lag: how old the weights are that sampled what is trained on",
        "steps",
        (Curve("lag_mean", "mean"), Curve("lag_max", "largest", dash="dash")),
    ),
    Panel(
        "Importance weights of tokens",
        "share of tokens",
        (
            Curve("is_ess", "effective"),
            Curve("is_capped", "above tis_cap", dash="dash"),
            Curve("is_masked", "outside of is_bounds", dash="dot"),
        ),
        percent=True,
    ),
    Panel("Throughput", "response tokens per second", (Curve("tokens_per_second", "whole step"),)),
    Panel(
        "Time by phase",
        "seconds per step",
        tuple(_phase_curve(phase) for phase in PHASES if phase != "start"),
        kind="stack",
    ),
)


def columns(held_out: bool) -> Iterator[str]:
    """Yield every metric of metrics.jsonl, or of validation.jsonl, that some chart needs. Some appear twice."""
    for line in (line for panel in PANELS for line in panel.lines if line.held_out == held_out):
        yield from (key for key in (line.key, line.low, line.high, line.spread) if key is not None)
