"""Measure the quick start's speed on this machine: its start, its steps, and sampling by a server or in process.

python -m benchmarks.one_machine [--against CHECKOUT] [--results FILE]

Runs of this checkout and of another one, such as an older commit's `git worktree`, alternate, and so do the two ways of
sampling. So other load on the machine affects all of them alike, and the ratios are meaningful. Each run is the default
experiment without validations and checkpoints. All runs use the packages of this environment.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from benchmarks.sampling_ways import WAYS, Way

HERE = Path(__file__).resolve().parents[1]
PHASES = {
    "a step": "seconds_step",
    "sampling": "seconds_sample",
    "log-probs": "seconds_log_probs",
    "updates": "seconds_update",
    "weights to the server": "seconds_weights",
}
LONGEST_RUN_S = 900


@dataclass(frozen=True)
class Run:
    """The times of one run."""

    start: float
    """Seconds from its command to its first step."""
    rows: list[dict[str, float]]
    """metrics.jsonl, one row per step."""


def main() -> None:
    """Measure in turns and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout to compare with")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each checkout (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run (default: %(default)s)")
    parser.add_argument("--samplings", type=int, default=20, help="samplings in each way (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="a JSON file for all that was measured")
    arguments = parser.parse_args()
    checkouts = {"this": HERE} | ({"against": arguments.against.resolve()} if arguments.against else {})
    print(machine())
    ways = sample_in_turns(arguments.samplings)
    print_ways(ways)
    runs: dict[str, list[Run]] = {name: [] for name in checkouts}
    for _ in range(arguments.rounds):
        for name, checkout in checkouts.items():
            runs[name].append(run_once(checkout, arguments.steps))
    print_runs(runs)
    if arguments.results:
        found = {
            "machine": machine(),
            "commits": {name: commit_of(checkout) for name, checkout in checkouts.items()},
            "sampling": ways,
            "runs": {name: summary(found) for name, found in runs.items()},
        }
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(found, indent=1) + "\n")


def sample_in_turns(times: int) -> dict[str, list[dict[str, float]]]:
    """Do the same samplings in each way. The first two of each are only a warm-up. Tokens have to agree."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    with Way("server") as server, Way("in_process") as in_process:
        for index in range(times + 2):
            for way in (server, in_process):
                found[way.name].append(way.sample(seed=100 * index))
    for one, other in zip(*found.values(), strict=True):
        if one["tokens"] != other["tokens"]:
            sys.exit(f"a server samples {one['tokens']} tokens where vLLM in process samples {other['tokens']}")
    return {name: results[2:] for name, results in found.items()}


def run_once(checkout: Path, steps: int) -> Run:
    """Do one run of the default experiment by the code of `checkout`."""
    with tempfile.TemporaryDirectory(prefix="one-machine-") as directory:
        command = [sys.executable, "-m", "megatron_fipo.train", f"run.directory={directory}/run", f"run.steps={steps}"]
        metrics, log = Path(directory, "run", "metrics.jsonl"), Path(directory, "log")
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        with log.open("wb") as output:
            began = time.time()
            process = subprocess.Popen(
                [*command, "validation.every=0", "checkpoint.every=0"],
                cwd=checkout,
                env=environment,
                stdout=output,
                stderr=output,
            )
        try:
            while not (metrics.exists() and metrics.read_text().count("\n")):
                if process.poll() is not None or time.time() - began > LONGEST_RUN_S:
                    sys.exit(f"a run of {checkout} took no step: {log.read_text()[-2000:]}")
                time.sleep(0.05)
            first_step_ended = time.time() - began
            process.wait(timeout=LONGEST_RUN_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=60)
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return Run(first_step_ended - rows[0]["seconds_step"], rows)


def summary(runs: list[Run]) -> dict[str, float]:
    """Return the median seconds by phase. The first step of a run, a warm-up, is separate."""
    later = [row for run in runs for row in run.rows[1:]]
    found = {"start to first step": statistics.median(run.start for run in runs)}
    found["the first step"] = statistics.median(run.rows[0]["seconds_step"] for run in runs)
    return found | {name: statistics.median(row[key] for row in later) for name, key in PHASES.items()}


def print_ways(ways: dict[str, list[dict[str, float]]]) -> None:
    """Print the seconds of a sampling in each way, in Markdown."""
    seconds = {name: statistics.median(result["seconds"] for result in found) for name, found in ways.items()}
    cpu = {name: statistics.median(result["cpu_seconds"] for result in found) for name, found in ways.items()}
    print(
        "\n| sampling of one step, medians | server | vLLM in the same process | speed / same process |"
        "\n|---|---|---|---|"
    )
    for what, values in (("seconds", seconds), ("processor seconds", cpu)):
        ratio = values["in_process"] / values["server"]
        print(f"| {what} | {values['server']:.3f} | {values['in_process']:.3f} | {ratio:.2f} |")
    paired = [b["seconds"] / a["seconds"] for a, b in zip(ways["server"], ways["in_process"], strict=True)]
    print(f"\nMedian of the ratios of consecutive samplings: {statistics.median(paired):.2f}", flush=True)


def print_runs(runs: dict[str, list[Run]]) -> None:
    """Print the seconds by phase and checkout, in Markdown."""
    summaries = {name: summary(found) for name, found in runs.items()}
    both = "against" in summaries
    print(f"\n| seconds, medians | {' | '.join(summaries)} |{' this / against |' if both else ''}")
    print("|---" * (len(summaries) + 1 + both) + "|")
    for name, value in summaries["this"].items():
        cells = [f"{found[name]:.2f}" for found in summaries.values()]
        cells += [f"{value / summaries['against'][name]:.2f}"] if both else []
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def commit_of(checkout: Path) -> Any:
    """Return the commit that is checked out there; None if it is unknown."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


if __name__ == "__main__":
    main()
