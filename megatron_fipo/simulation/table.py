"""The table of modes, as the terminal shows it."""

from collections.abc import Sequence

from rich.table import Table

from megatron_fipo.simulation.outcome import Outcome

HEADINGS = (
    *("nodes", "step s", "× today", "tokens/s/GPU", "trainer idle", "engines idle", "places used"),
    *("lag mean", "max", "prefilled again"),
)
"""Of the columns after the mode's name."""


def table(outcomes: Sequence[Outcome], today: Outcome) -> Table:
    """A row for each outcome; `today` is what speed is compared with."""
    made = Table(title="Simulated, not measured", title_justify="left")
    made.add_column("mode")
    for name in HEADINGS:
        made.add_column(name, justify="right")
    for outcome in outcomes:
        made.add_row(outcome.mode.title, *cells(outcome, today))
    return made


def cells(outcome: Outcome, today: Outcome) -> list[str]:
    """A row's numbers, without the mode's name."""
    return [
        outcome.placement.text,
        f"{outcome.step_s:,.0f}" if outcome.step_s >= 100 else f"{outcome.step_s:.3g}",
        f"{today.step_s / outcome.step_s:.2f}",
        f"{outcome.tokens_per_gpu_s:,.0f}",
        f"{max(0.0, outcome.trainer_idle):.0%}",
        f"{max(0.0, outcome.engines_idle):.0%}",
        f"{outcome.places_used:.0%}",
        f"{outcome.lag_mean:.2f}",
        f"{outcome.lag_max}",
        f"{outcome.prefilled_again:.1%}",
    ]
