"""Compare FIPO, FIPO without its filter, DAPO and GRPO where the influence weight really moves (docs/results.md).

python -m benchmarks.science --seeds 5

All arms train the embedded model with experiment=tiny_influence and equal mini-batches. The first seed runs with every
arm before the second seed begins, so a campaign that is cut short is still balanced. The same command goes on where it
stopped: finished runs are not repeated. A run that fails or takes too long is named, and the others go on.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import pairwise, takewhile
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import machine
from megatron_fipo.algorithm.credit import influence_weights
from megatron_fipo.algorithm.sequences import SequenceLayout
from megatron_fipo.comparison import report
from megatron_fipo.comparison.groups import Group, Grouping, group_runs
from megatron_fipo.comparison.runs import Run, find_runs
from megatron_fipo.comparison.scores import GroupScores, series
from megatron_fipo.comparison.tables import in_words
from megatron_fipo.config import FutureKLConfig
from megatron_fipo.evaluation.files import ALL
from megatron_fipo.runs.result import read_run
from megatron_fipo.tracking.credit_file import CreditResponse, credit_path, read_credit, recorded_steps
from megatron_fipo.tracking.intervals import Interval, Values, difference_interval, mean_interval

ARMS: dict[str, tuple[str, ...]] = {
    "fipo": ("algorithm=fipo_7b", "algorithm.name=fipo"),
    "no_filter": ("algorithm=fipo_7b", "algorithm.name=no_filter", "algorithm.future_kl.participation_mask=false"),
    "dapo": ("algorithm=dapo",),
    "grpo": ("algorithm=grpo",),
}
BASELINE = "fipo"
FILTERED = ("fipo", "no_filter")
PHASES = 4
NOTHING = "–"
_EXACT = ("loss", "grad_norm", "ppo_kl")
"""Metrics that no two different updates share to the last digit."""


@dataclass(frozen=True)
class Measure:
    """A number of each run, and how to print it."""

    name: str
    of_run: Callable[[Run], float | None]
    unit: float = 1.0
    digits: int = 3


def over_steps(
    name: str, summarise: Callable[[Sequence[float]], float] = statistics.fmean
) -> Callable[[Run], float | None]:
    """Return a function for a metric's mean, or other summary, over a run's steps; None for a loss without it."""

    def value(run: Run) -> float | None:
        found = [row[name] for row in run.steps.values() if row.get(name) is not None]
        return float(summarise(found)) if found else None

    return value


def area(run: Run) -> float | None:
    """Return the mean of the held-out accuracy over the steps: the area under its curve by the trapezoid rule."""
    found = series(run, "accuracy")
    if len(found) < 2:
        return None
    steps, scores = list(found), list(found.values())
    return float(np.trapezoid(scores, steps) / (steps[-1] - steps[0]))


def clipped_share(run: Run) -> float | None:
    """Return the share of influence weights at a bound of the band, over a run's steps."""
    low, high = over_steps("influence_clipfrac_low")(run), over_steps("influence_clipfrac_high")(run)
    return None if low is None or high is None else low + high


def beyond_c(run: Run) -> float | None:
    """Return the share of tokens with a ratio above clip_ratio_c, which the filter leaves out of the sums.

    Of the responses that the credit files have: 16 of each step, of its later updates.
    """
    bound = math.log(run.settings["algorithm.clip_ratio_c"])
    found = [response.credit.values["log_ratio"] > bound for response in recorded(run)]
    return float(np.concatenate(found).mean()) if found else None


def changed_by_filter(run: Run) -> float | None:
    """Return the share of these tokens whose influence weight is another one with the filter than without.

    Whether the run has the filter or not. None for a loss without influence weights. Tokens of responses that the loss
    leaves out count as unchanged.
    """
    if "influence_weights_std" not in run.steps[run.last_step]:
        return None
    names = [entry.name for entry in fields(FutureKLConfig)]
    own = FutureKLConfig(**{name: run.settings[f"algorithm.future_kl.{name}"] for name in names})
    found = []
    for response in recorded(run):
        log_ratio = torch.tensor(response.credit.values["log_ratio"])[None]
        with_filter, without = (
            influence_weights(
                log_ratio,
                torch.ones_like(log_ratio, dtype=torch.bool),
                torch.tensor([[response.facts["advantage"]]]),
                replace(own, participation_mask=is_on),
                run.settings["algorithm.clip_ratio_c"],
                SequenceLayout(),
            ).weights
            for is_on in (True, False)
        )
        found.append((with_filter != without) & (not response.facts["dropped"]))
    return float(torch.cat(found, dim=1).double().mean()) if found else None


def recorded(run: Run) -> Iterator[CreditResponse]:
    """Yield the responses of the run's credit files."""
    for step in recorded_steps(run.directory):
        yield from read_credit(credit_path(run.directory, step))[1]


MEASURES = (
    Measure("held-out accuracy, mean over the run", area),
    Measure("accuracy in training, mean over steps", over_steps("accuracy")),
    Measure("std of f", over_steps("influence_weights_std")),
    Measure("f at a bound, %", clipped_share, 100, 1),
    Measure("clipped ratios, %", over_steps("pg_clipfrac"), 100, 2),
    Measure("dual-clipped, %", over_steps("pg_clipfrac_lower"), 100, 3),
    Measure("ratio above c, %", beyond_c, 100, 3),
    Measure("f that the filter changes, %", changed_by_filter, 100, 2),
    Measure("responses left out by the dual clip, per step", over_steps("responses_dropped"), 1, 2),
    Measure("policy KL × 10³", over_steps("ppo_kl"), 1000, 2),
    Measure("policy KL × 10³, largest step", over_steps("ppo_kl", max), 1000, 2),
    Measure("gradient norm", over_steps("grad_norm"), 1, 2),
    Measure("gradient norm, largest step", over_steps("grad_norm", max), 1, 2),
)
OVER_TIME = {
    "std of f": ("influence_weights_std", 1.0),
    "clipped ratios, %": ("pg_clipfrac", 100.0),
    "policy KL × 10³": ("ppo_kl", 1000.0),
    "gradient norm": ("grad_norm", 1.0),
}


def main() -> int:
    """Run what is missing, and print the tables. Return 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this; 0: only print (default: %(default)s)")
    parser.add_argument("--directory", type=Path, default=Path("runs/science"), help="default: %(default)s")
    parser.add_argument("--at-a-time", type=int, default=1, help="runs side by side (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for a run (default: %(default)s)")
    parser.add_argument("--target", type=float, default=0.8, help="held-out score to be reached (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="further settings of every run, such as optimizer.lr=2e-4")
    arguments = parser.parse_args()
    wanted = [(seed, arm) for seed in range(1, arguments.seeds + 1) for arm in arguments.arms]
    with ThreadPoolExecutor(arguments.at_a_time) as pool:
        ended = pool.map(
            lambda run: run_once(arguments.directory, run[1], run[0], arguments.timeout, arguments.overrides), wanted
        )
        failed = not all(list(ended))
    runs = [run for run in find_runs([arguments.directory]) if run.is_finished]
    print(f"\n{machine()}\n\n{tables(group_runs(runs), arguments.target)}")
    return int(failed)


def run_once(directory: Path, arm: str, seed: int, timeout_s: float, overrides: Sequence[str]) -> bool:
    """Train one arm with one seed, unless that is done, and say how it ended. Return whether it is finished.

    The output is in output.txt in the run's directory.
    """
    place = directory / f"{arm}-{seed}"
    if is_finished(place):
        return True
    place.mkdir(parents=True, exist_ok=True)
    settings = ["experiment=tiny_influence", *ARMS[arm], f"run.directory={place}", f"run.seed={seed}", *overrides]
    with (place / "output.txt").open("a", encoding="utf-8") as output:
        training = subprocess.Popen(
            [sys.executable, "-m", "megatron_fipo.train", *settings],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            said = f"ended with {training.wait(timeout_s)}"
        except subprocess.TimeoutExpired:
            training.terminate()  # the run ends its own processes
            training.wait()
            said = f"was ended after {timeout_s:.0f} s"
    finished = is_finished(place)
    print(f"{place.name}: {'done' if finished else f'{said}; see {place}/output.txt'}", flush=True)
    return finished


def is_finished(place: Path) -> bool:
    """Return whether a directory holds a run that has done all its steps."""
    return (place / "config.yaml").is_file() and read_run(place).finished


def tables(grouping: Grouping, target: float) -> str:
    """Return Markdown: results by arm, differences to the baseline, and metrics over the steps."""
    baseline = next((group.name for group in grouping.groups if group.name == BASELINE), None)
    comparison = report.build(grouping, baseline, "accuracy", target)
    scores = comparison.by_source[ALL]
    groups = [found.group for found in scores]
    names = [f"{group.name} (seeds: {len(group.runs)})" for group in groups]
    results = [["mean [95 % interval]", *names], ["held-out accuracy at the end", *(in_words(s.final) for s in scores)]]
    results.append([f"step that first reached {target:g}", *(first_step(group, target) for group in groups)])
    results += [[measure.name, *(_cell(measure, group) for group in groups)] for measure in MEASURES]
    others = [found for found in scores if found.group is not comparison.baseline]
    differences = [[f"minus {comparison.baseline.name}", *(found.group.name for found in others)]]
    differences.append(["held-out accuracy at the end", *(in_words(found.difference, "+") for found in others)])
    differences += [
        [measure.name, *(_difference(measure, found, comparison.baseline) for found in others)] for measure in MEASURES
    ]
    parts = [results, differences, _over_time(groups)]
    return (
        "\n\n".join(_markdown(part) for part in parts)
        + "\n\n"
        + "\n".join([*comparison.sentences(), *same_until(groups)])
    )


def same_until(groups: Sequence[Group]) -> list[str]:
    """Return a sentence for each seed: the steps through which FIPO is the same run with and without the filter.

    Both sample with the same seeds, so they differ from the first token on that the filter leaves out.
    """
    with_filter, without = ({run.seed: run for g in groups if g.name == arm for run in g.runs} for arm in FILTERED)
    said = []
    for seed in sorted(with_filter.keys() & without.keys()):
        pairs = [(row, without[seed].steps.get(step, {})) for step, row in sorted(with_filter[seed].steps.items())]
        same = list(takewhile(lambda pair: all(pair[0].get(key) == pair[1].get(key) for key in _EXACT), pairs))
        said.append(f"Seed {seed}: with and without the filter the same run for {len(same)} of {len(pairs)} steps.")
    return said


def first_step(group: Group, target: float) -> str:
    """Return the median step of the first validation at `target`, over the runs that reached it, and their number."""
    reached = [[step for step, score in series(run, "accuracy").items() if score >= target] for run in group.runs]
    first = [min(steps) for steps in reached if steps]
    return (
        f"{np.median(first):g} ({len(first)} of {len(group.runs)} runs)" if first else f"none of {len(group.runs)} runs"
    )


def values_of(measure: Measure, group: Group) -> Values | None:
    """Return a measure of each run as (seeds, 1); None if no run has it."""
    found = [value for run in group.runs if (value := measure.of_run(run)) is not None]
    return np.array(found)[:, None] if found else None


def interval_of(values: Values, baseline: Values | None = None) -> Interval:
    """Return the mean over seeds, or its difference to the baseline's, with its interval, for numbers of any size.

    The intervals of scores are cut off at 1, so numbers are scaled first.
    """
    largest = max(float(np.abs(part).max()) for part in (values, baseline) if part is not None)
    scale = 10 * largest or 1.0
    found = mean_interval(values / scale) if baseline is None else difference_interval(values / scale, baseline / scale)
    ends = [None if end is None else end * scale for end in (found.low, found.high)]
    return Interval(found.mean * scale, *ends)


def _cell(measure: Measure, group: Group) -> str:
    values = values_of(measure, group)
    return NOTHING if values is None else _words(interval_of(values * measure.unit), measure.digits)


def _difference(measure: Measure, found: GroupScores, baseline: Group) -> str:
    ours, theirs = values_of(measure, found.group), values_of(measure, baseline)
    if ours is None or theirs is None:
        return NOTHING
    return _words(interval_of(ours * measure.unit, theirs * measure.unit), measure.digits, "+")


def _words(interval: Interval, digits: int, sign: str = "") -> str:
    shown = f"{interval.mean:{sign}.{digits}f}"
    if interval.low is None:
        return shown
    return f"{shown} [{interval.low:{sign}.{digits}f} {interval.high:{sign}.{digits}f}]"


def _over_time(groups: Sequence[Group]) -> list[list[str]]:
    """Return the mean over seeds of each metric in each quarter of the steps."""
    last = max(run.last_step for group in groups for run in group.runs)
    ends = [round(last * phase / PHASES) for phase in range(PHASES + 1)]
    rows = [["mean over seeds, steps", *(f"{low + 1} to {high}" for low, high in pairwise(ends))]]
    for title, (name, unit) in OVER_TIME.items():
        for group in groups:
            cells = []
            for low, high in pairwise(ends):
                found = [
                    row[name]
                    for run in group.runs
                    for step, row in run.steps.items()
                    if low < step <= high and row.get(name) is not None
                ]
                cells.append(f"{unit * np.mean(found):.3f}" if found else NOTHING)
            if set(cells) != {NOTHING}:
                rows.append([f"{title}, {group.name}", *cells])
    return rows


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


if __name__ == "__main__":
    sys.exit(main())
