"""A comparison as rows of text for the terminal and the page, and as plain numbers for CSV."""

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from megatron_fipo.comparison.groups import Group, Grouping
from megatron_fipo.comparison.runs import Run
from megatron_fipo.comparison.scores import GroupScores, Score, series
from megatron_fipo.tracking.console_table import duration

NOTHING = "-"
Table = list[list[str]]
"""Rows of cells. The first row has the titles."""
_Column = tuple[str, Callable[[GroupScores], str]]
"""A title, and the function that gives a group's cell."""


def score_table(scores: Sequence[GroupScores], target: float | None) -> Table:
    """Return a row for each group: last and best score, difference to the baseline, and cost of the target, if any.

    For evaluations, which have neither steps nor a cost, a row has the score and the difference.
    """
    if all(run.is_evaluation for found in scores for run in found.group.runs):
        columns: list[_Column] = [
            ("model", lambda found: found.group.name),
            ("score", lambda found: in_words(found.final)),
            ("to the baseline", lambda found: in_words(found.difference, sign="+")),
        ]
    else:
        columns = [
            ("group", lambda found: found.group.name),
            ("seeds", lambda found: ", ".join(str(seed) for seed in found.group.seeds)),
            ("last", lambda found: in_words(found.final)),
            ("at step", lambda found: _steps(found.final)),
            ("best", lambda found: in_words(found.best)),
            ("at step", lambda found: _steps(found.best)),
            ("to the baseline", lambda found: in_words(found.difference, sign="+")),
        ]
        if target is not None:
            columns += [(f"time to {target:g}", _time), ("tokens", _tokens)]
    return [[title for title, _ in columns], *([cell(found) for _, cell in columns] for found in scores)]


def _time(found: GroupScores) -> str:
    cost = found.cost
    share = "" if cost.reached == cost.runs else f" ({cost.reached} of {cost.runs} runs)"
    return NOTHING if cost.seconds is None else f"{duration(cost.seconds)}{share}"


def _tokens(found: GroupScores) -> str:
    return NOTHING if found.cost.tokens is None else short(found.cost.tokens)


def difference_table(grouping: Grouping) -> Table:
    """Return the keys that are not the same in all groups; none if there is only one group."""
    rows = [["key", *(group.name for group in grouping.groups)]]
    rows += [[key, *(_value(value) for value in values)] for key, values in grouping.differences.items()]
    return rows


def run_table(groups: Sequence[Group], metric: str) -> Table:
    """Return a row for each run."""
    rows = [["run", "group", "seed", "steps", "last", "best", "at step", "time", "tokens"]]
    for group in groups:
        for run in group.runs:
            found = series(run, metric)
            best = max(found, key=lambda step: (found[step], -step)) if found else None
            rows.append(
                [
                    run.directory.name,
                    group.name,
                    str(run.seed),
                    f"{run.last_step}" if run.is_finished else f"{run.last_step} of {run.settings['run.steps']}",
                    f"{found[max(found)]:.3f}" if found else NOTHING,
                    NOTHING if best is None else f"{found[best]:.3f}",
                    NOTHING if best is None else str(best),
                    duration(total(run, "seconds_step")),
                    short(total(run, "response_tokens")),
                ]
            )
    return rows


def groups_csv(by_source: dict[str, list[GroupScores]], metric: str, target: float | None) -> str:
    """Return a line for each data source and group."""
    lines: list[dict[str, Any]] = []
    for source, scores in by_source.items():
        for found in scores:
            line: dict[str, Any] = {"data_source": source, "group": found.group.name, "metric": metric}
            line |= {"runs": len(found.group.runs), "seeds": " ".join(str(seed) for seed in found.group.seeds)}
            for name, score in (("last", found.final), ("best", found.best), ("difference", found.difference)):
                line |= _numbers(name, score)
            line |= {"target": target, "reached_target": found.cost.reached}
            line |= {"seconds_to_target": found.cost.seconds, "tokens_to_target": found.cost.tokens}
            lines.append(line)
    return _csv(lines)


def runs_csv(groups: Sequence[Group], metric: str) -> str:
    """Return a line for each validation of each run."""
    lines = [
        {
            "group": group.name,
            "run": str(run.directory),
            "seed": run.seed,
            "step": step,
            metric: value,
            "seconds": total(run, "seconds_step", step),
            "tokens": total(run, "response_tokens", step),
        }
        for group in groups
        for run in group.runs
        for step, value in series(run, metric).items()
    ]
    return _csv(lines)


def total(run: Run, metric: str, until: int | None = None) -> float:
    """Return the sum of a metric over a run's steps, up to `until`."""
    return sum(row.get(metric) or 0.0 for step, row in run.steps.items() if until is None or step <= until)


def in_words(score: Score | None, sign: str = "") -> str:
    """Return a text such as 0.533 [0.36 0.70], or for a difference, with sign "+", +0.053 [-0.06 +0.17]."""
    if score is None:
        return NOTHING
    found = score.interval
    ends = "" if found.low is None else f" [{found.low:{sign}.3f} {found.high:{sign}.3f}]"
    return f"{found.mean:{sign}.3f}{ends}"


def verdict(found: GroupScores, baseline: Group) -> str | None:
    """Return a sentence about the difference to the baseline; None for the baseline, and without a difference."""
    if found.difference is None:
        return None
    difference, step = found.difference.interval, found.difference.steps[0]
    name, over = found.group.name, found.difference.over
    if found.group.runs[0].is_evaluation:
        when, unknown = "", ""
    else:
        when = f" at step {step}"
        alone = [group.name for group in (found.group, baseline) if len(set(group.seeds)) == 1]
        unknown = f"; other seeds may say otherwise: {' and '.join(alone)} ran with one" if alone else ""
    if not difference.is_known:
        return f"{name} and {baseline.name} differ by {difference.mean:+.3f}{when}; {over} give no interval"
    shown = f"{in_words(found.difference, sign='+')}{when}, over {over}{unknown}"
    if difference.excludes_zero():
        return f"{name} is {'above' if difference.mean > 0 else 'below'} {baseline.name}: {shown}"
    return f"{name} and {baseline.name} cannot be told apart: {shown}"


def short(value: float) -> str:
    """Return three digits and a unit: 1.23M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _steps(score: Score | None) -> str:
    if score is None:
        return NOTHING
    low, high = min(score.steps), max(score.steps)
    return str(low) if low == high else f"{low} to {high}"


def _value(value: Any) -> str:
    return "null" if value is None else str(value)


def _numbers(name: str, score: Score | None) -> dict[str, float | int | str | None]:
    if score is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None, f"{name}_over": None}
    found = score.interval
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_over": score.over}


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()
