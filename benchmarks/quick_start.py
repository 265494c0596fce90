"""Run the quick start with several losses and seeds, to compare the effect of FIPO with that of the seed.

python -m benchmarks.quick_start --seeds 5

The runs of the default experiment follow one another. Runs that are already complete in --directory are not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import machine

LONGEST_RUN_S = 3600


@dataclass(frozen=True)
class Run:
    """The results of one run."""

    summary: dict[str, float]
    rows: list[dict[str, float]]
    """metrics.jsonl: one row per step."""


def mean_of(name: str) -> Callable[[Run], float | None]:
    """Return a function for a metric's mean over a run's steps; None if the loss has no such metric."""

    def value(run: Run) -> float | None:
        found = [row[name] for row in run.rows if name in row]
        return statistics.fmean(found) if found else None

    return value


def clipped_share(run: Run) -> float | None:
    """Return the share of influence weights at a bound, over a run's steps, in percent."""
    low, high = mean_of("influence_clipfrac_low")(run), mean_of("influence_clipfrac_high")(run)
    return None if low is None or high is None else 100 * (low + high)


COLUMNS: dict[str, Callable[[Run], float | None]] = {
    "held-out before": lambda run: run.summary["accuracy_before"],
    "held-out after": lambda run: run.summary["accuracy_after"],
    "accuracy over all steps": mean_of("accuracy"),
    "length after": lambda run: run.summary["response_length_after"],
    "ppo_kl × 10³": lambda run: 1000 * (mean_of("ppo_kl")(run) or 0.0),
    "gradient norm": mean_of("grad_norm"),
    "std of f": mean_of("influence_weights_std"),
    "f at a bound, %": clipped_share,
}


def main() -> int:
    """Run the missing runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=["fipo_7b", "dapo"], help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this (default: %(default)s)")
    parser.add_argument("--directory", type=Path, default=Path("runs/quick_start"), help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", help="further settings of every run, such as run.steps=8")
    arguments = parser.parse_args()
    runs = {
        algorithm: [
            read_or_run(arguments.directory / f"{algorithm}-{seed}", algorithm, seed, arguments.overrides)
            for seed in range(1, arguments.seeds + 1)
        ]
        for algorithm in arguments.algorithms
    }
    print(f"\n{machine()}; {arguments.seeds} seeds, mean ± standard deviation over them\n")
    print(table(runs))
    return 0


def read_or_run(directory: Path, algorithm: str, seed: int, overrides: Sequence[str]) -> Run:
    """Return the run in `directory`, after running it if it is not complete. RuntimeError if it fails."""
    if not (directory / "summary.json").exists():
        command = [sys.executable, "-m", "megatron_fipo.train", f"run.directory={directory}", f"algorithm={algorithm}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        print(f"{algorithm}, seed {seed}", flush=True)
        ended = subprocess.run([*command, f"run.seed={seed}", *overrides], env=environment, timeout=LONGEST_RUN_S)
        if ended.returncode:
            raise RuntimeError(f"the run in {directory} ended with {ended.returncode}")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return Run(json.loads((directory / "summary.json").read_text()), [json.loads(line) for line in lines])


def table(runs: dict[str, list[Run]]) -> str:
    """Return Markdown with one row per measure and one column per algorithm."""
    lines = [f"| | {' | '.join(runs)} |", "|---" * (len(runs) + 1) + "|"]
    for name, measure in COLUMNS.items():
        cells = [spread([measure(run) for run in seeds]) for seeds in runs.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float | None]) -> str:
    """Return mean ± standard deviation over seeds; a dash if nothing was measured."""
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    deviation = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.3f}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
