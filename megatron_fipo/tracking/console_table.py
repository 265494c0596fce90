"""The line per step: the columns that fit on the terminal, and numbers of a fixed width."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Value = float | None


def duration(seconds: float) -> str:
    """Return seconds in a readable form: 12 s, 3 min 05 s, 2 h 07 min."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _fixed(places: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{places}f}"


def _scientific(value: float) -> str:
    """Return two digits in few characters: 1.2e-4 and not 1.2e-04."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _thousands(value: float) -> str:
    """Return three digits and a unit: 950, 12.3k, 4.56M."""
    for divisor, unit in ((1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * divisor:
            return f"{value / divisor:#.3g}".rstrip(".") + unit
    return f"{value:.0f}"


def tenths(value: float) -> str:
    """Return one decimal for numbers that are not large: 29.4, 10423."""
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _metric(key: str) -> Callable[[Mapping[str, Any]], Value]:
    return lambda metrics: metrics.get(key)


def _clipped_weights(metrics: Mapping[str, Any]) -> Value:
    sides = [metrics.get(f"influence_clipfrac_{side}") for side in ("low", "high")]
    known = [side for side in sides if side is not None]
    return sum(known) if known else None


@dataclass(frozen=True)
class Column:
    """One number of the line."""

    title: str
    width: int
    value: Callable[[Mapping[str, Any]], Value]
    text: Callable[[float], str]
    rank: int
    """Its priority on a narrow terminal. Columns with the lowest ranks are shown first."""


LEGEND = "f: influence weight, its std and its share at the band's bounds; times in s"

# Ranks 0 to 5 take 75 characters: how well a run learns, whether it is stable, how fast it is. Then the phases' times.
COLUMNS = (
    Column("step", 4, _metric("step"), _fixed(0), 0),
    Column("reward", 6, _metric("reward_mean"), _fixed(3), 1),
    Column("acc", 5, _metric("accuracy"), _fixed(3), 1),
    Column("length", 6, _metric("response_length_mean"), tenths, 1),
    Column("f mean", 6, _metric("influence_weights_mean"), _fixed(3), 10),
    Column("f std", 6, _metric("influence_weights_std"), _fixed(4), 2),
    Column("f clip", 6, _clipped_weights, lambda value: f"{value:.1%}", 2),
    Column("ppo_kl", 7, _metric("ppo_kl"), _scientific, 6),
    Column("entropy", 7, _metric("entropy"), _fixed(3), 4),
    Column("grad", 7, _metric("grad_norm"), _scientific, 4),
    Column("|Δlogp|", 7, _metric("log_prob_diff_mean"), _scientific, 3),
    Column("tok/s", 5, _metric("tokens_per_second"), _thousands, 5),
    Column("sample", 6, _metric("seconds_sample"), tenths, 7),
    Column("verify", 6, _metric("seconds_verify"), tenths, 9),
    Column("logp", 6, _metric("seconds_log_probs"), tenths, 8),
    Column("update", 6, _metric("seconds_update"), tenths, 7),
    Column("sync", 6, _metric("seconds_weights"), tenths, 8),
    Column("step s", 6, _metric("seconds_step"), tenths, 3),
)


LAG = Column("lag", 6, _metric("lag_mean"), _fixed(2), 9)
"""In place of the time that judging takes, where that overlaps with training."""


class StepTable:
    """The layout of the columns for a terminal's width."""

    def __init__(self, width: int, *, overlaps: bool = False) -> None:
        """`overlaps`: sampling and judging go on during the updates."""
        self._width = width
        self._all = tuple(LAG if overlaps and each.title == "verify" else each for each in COLUMNS)
        self._columns = _fitting(self._all, width)

    def fit(self, width: int) -> bool:
        """Choose the columns for a new width. Return whether they have changed."""
        if width == self._width:
            return False
        old, self._width, self._columns = self._columns, width, _fitting(self._all, width)
        return old != self._columns

    def header(self) -> str:
        """Return the titles of the columns."""
        return " ".join(column.title.rjust(column.width) for column in self._columns)

    def line(self, metrics: Mapping[str, Any]) -> str:
        """Return one step's numbers, with `-` for a number that is missing or not finite."""
        return " ".join(_cell(column, metrics).rjust(column.width) for column in self._columns)


def _cell(column: Column, metrics: Mapping[str, Any]) -> str:
    value = column.value(metrics)
    if value is None or math.isnan(value):
        return "-"
    return column.text(value) if math.isfinite(value) else str(value)


def _fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """Return the columns that fit, chosen by rank, in the table's order."""
    chosen: list[Column] = []
    for column in sorted(columns, key=lambda column: column.rank):
        if sum(taken.width + 1 for taken in chosen) + column.width <= width:
            chosen.append(column)
    return [column for column in columns if column in chosen]
