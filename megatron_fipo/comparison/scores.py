"""Scores of groups of runs with intervals over problems and seeds, differences to a baseline, and costs of a score."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_fipo.comparison.groups import Group
from megatron_fipo.comparison.runs import Run
from megatron_fipo.tracking.intervals import Interval, Values, difference_interval, mean_interval
from megatron_fipo.tracking.validation import consensuses

METRICS = {"accuracy": "accuracy", "cons_at_k": "cons", "pass_at_k": "pass_at_k"}
"""Held-out scores in validation.jsonl, each with its column in the files with the problems' scores."""


@dataclass(frozen=True)
class Score:
    """One group's score at some step of each of its runs."""

    interval: Interval
    steps: list[int]
    """The step at which each run's score was taken."""
    over: str
    """What the interval covers, in words: problems, seeds or both."""


@dataclass(frozen=True)
class Cost:
    """The cost of reaching a score, over the runs that reached it."""

    reached: int
    runs: int
    seconds: float | None
    """Median training time, without validation."""
    tokens: float | None
    """Median number of tokens sampled."""


@dataclass(frozen=True)
class GroupScores:
    """Everything that a comparison says about one group."""

    group: Group
    final: Score | None
    best: Score | None
    difference: Score | None
    """The difference to the baseline, at the last step that all runs of both have validated; None for the baseline."""
    cost: Cost


Series = dict[int, float]


def series(run: Run, metric: str, source: str | None = None) -> Series:
    """Return a held-out score by step, for one data source or all. Steps without a verdict are left out."""
    key = metric if source is None else f"{metric}/{source}"
    rows = {step: row.get(key) for step, row in sorted(run.validations.items())}
    if source is not None and not any(value is not None for value in rows.values()):
        return {}
    return {step: float(value) for step, value in rows.items() if isinstance(value, int | float)}


def compare(
    groups: Sequence[Group], baseline: Group, metric: str, target: float | None, source: str | None = None
) -> list[GroupScores]:
    """Return the scores of each group. `metric` is one of METRICS. `target` is the score for `Cost`."""
    return [
        GroupScores(
            group,
            _score(group, metric, source, max),
            _score(group, metric, source, lambda found: max(found, key=lambda step: (found[step], -step))),
            None if group is baseline else _difference(group, baseline, metric, source),
            cost_of(group, metric, target, source),
        )
        for group in groups
    ]


def default_target(groups: Sequence[Group], metric: str, source: str | None = None) -> float | None:
    """Return a score that each group reaches in the mean: the lowest of their last scores, rounded down to a hundredth.

    None if no run has validated.
    """
    means = []
    for group in groups:
        last = [found[max(found)] for run in group.runs if (found := series(run, metric, source))]
        if last:
            means.append(sum(last) / len(last))
    return math.floor(min(means) * 100) / 100 if means else None


def sources_of(groups: Sequence[Group]) -> list[str]:
    """Return the data sources that validation.jsonl reports separately, if there are several."""
    names: dict[str, None] = {}
    for group in groups:
        for run in group.runs:
            for row in run.validations.values():
                names |= {key.removeprefix("accuracy/"): None for key in row if key.startswith("accuracy/")}
    return sorted(names)


def cost_of(group: Group, metric: str, target: float | None, source: str | None = None) -> Cost:
    """Return training time and tokens until a validation first reached `target`: the median over runs that reached it.

    Without a target, no run has reached it.
    """
    seconds, tokens = [], []
    for run in group.runs:
        reached = [
            step for step, value in series(run, metric, source).items() if target is not None and value >= target
        ]
        if reached:
            rows = [row for step, row in run.steps.items() if step <= min(reached)]
            seconds.append(sum(row.get("seconds_step") or 0.0 for row in rows))
            tokens.append(sum(row.get("response_tokens") or 0.0 for row in rows))
    if not seconds:
        return Cost(0, len(group.runs), None, None)
    return Cost(len(seconds), len(group.runs), float(np.median(seconds)), float(np.median(tokens)))


def _score(group: Group, metric: str, source: str | None, choose: Callable[[Series], int]) -> Score | None:
    at = {}
    for index, run in enumerate(group.runs):
        if found := series(run, metric, source):
            at[index] = choose(found)
    if not at:
        return None
    runs, steps = [group.runs[index] for index in at], list(at.values())
    tables = _tables(runs, steps, metric, source)
    if tables is None:
        values: Values = np.array([[series(run, metric, source)[step]] for run, step in zip(runs, steps, strict=True)])
    else:
        common = sorted(set.intersection(*(set(table) for table in tables)))
        values = _matrix(tables, common)
    values = _by_seed(runs, values)
    return Score(mean_interval(values), steps, _over(values))


def _difference(group: Group, baseline: Group, metric: str, source: str | None) -> Score | None:
    ours = [run for run in group.runs if series(run, metric, source)]
    theirs = [run for run in baseline.runs if series(run, metric, source)]
    if not ours or not theirs:
        return None
    common = set.intersection(*(set(series(run, metric, source)) for run in (*ours, *theirs)))
    if not common:
        return None
    step = max(common)
    tables = _tables([*ours, *theirs], [step] * (len(ours) + len(theirs)), metric, source)
    if tables is None:
        values: Values = np.array([[series(run, metric, source)[step]] for run in (*ours, *theirs)])
    else:
        values = _matrix(tables, sorted(set.intersection(*(set(table) for table in tables))))
    parts = _by_seed(ours, values[: len(ours)]), _by_seed(theirs, values[len(ours) :])
    return Score(difference_interval(*parts), [step] * len(ours), _over(*parts))


def _tables(
    runs: Sequence[Run], steps: Sequence[int], metric: str, source: str | None
) -> list[dict[str, float]] | None:
    """Return each run's problems with a verdict and their scores; None if the runs have no problem in common."""
    tables = []
    for run, step in zip(runs, steps, strict=True):
        problems = run.problems(step)
        if problems is None:
            return None
        chosen = [problem for problem in problems if problem.judged and source in (None, problem.data_source)]
        values = consensuses(chosen) if metric == "cons_at_k" else [getattr(each, METRICS[metric]) for each in chosen]
        names = [each.problem for each in chosen[: len(values)]]  # none where no problem has a vote
        tables.append(dict(zip(names, map(float, values), strict=True)))
    return tables if set.intersection(*(set(table) for table in tables)) else None


def _by_seed(runs: Sequence[Run], values: Values) -> Values:
    """Return the mean over the runs of each seed: two runs with the same seed count as one seed."""
    seeds = np.array([run.seed for run in runs])
    return np.array([values[seeds == seed].mean(axis=0) for seed in dict.fromkeys(seeds.tolist())])


def _matrix(tables: Sequence[dict[str, float]], problems: Sequence[str]) -> Values:
    """(runs, problems)"""
    return np.array([[table[problem] for problem in problems] for table in tables])


def _over(*parts: Values) -> str:
    problems = parts[0].shape[1]
    seeds = " and ".join(str(len(part)) for part in parts)
    many = any(len(part) > 1 for part in parts)
    words = []
    if problems > 1:
        words.append(f"{problems} problems")
    words.append(f"{seeds} {'seeds' if many or len(parts) > 1 else 'seed'}")
    return ", ".join(words)
