"""How much of a step sampling while training hides: pairs of whole runs, k = 0 and k = 1, in turns.

    python -m benchmarks.overlap [PAIRS] [KEY=VALUE …]

What the phases allow is the longer of sampling and everything else of the k = 0 run beside it. Run it on an idle
machine: trainer and engine get one core each.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median

from benchmarks.measure import machine

STEPS, WARM_UP = 14, 3
SETTINGS = (
    "parallel.pipeline=1",
    "rollout.cpu_threads=1",
    "algorithm.tis_cap=2",
    "validation.every=0",
    "checkpoint.every=0",
    f"run.steps={STEPS}",
)


def main() -> None:
    """Print a row per pair."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdigit() else 3
    overrides = [word for word in sys.argv[1:] if "=" in word]
    print(f"{machine()}; {STEPS - WARM_UP} steps of each run, {' '.join(overrides)}\n")
    print(
        "| sampling, s | the rest, s | step at k = 0, s | allowed, s | step at k = 1, s | gain | of what is allowed |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    gains, shares = [], []
    for _ in range(count):
        before, after = run(0, overrides), run(1, overrides)
        step, sampling = (fmean(row[key] for row in before) for key in ("seconds_step", "seconds_sample"))
        allowed, found = max(sampling, step - sampling), fmean(row["seconds_step"] for row in after)
        gains.append(step / found)
        shares.append(allowed / found)
        seconds = (sampling, step - sampling, step, allowed, found)
        row = " | ".join(f"{value:.2f}" for value in seconds)
        print(f"| {row} | {gains[-1]:.2f} × | {shares[-1]:.2f} |", flush=True)
    print(f"\nmedian gain {median(gains):.2f} ×, {median(shares):.2f} of what the phases allow")


def run(k: int, overrides: list[str]) -> list[dict[str, float]]:
    """The rows of a run's steps, without the first ones."""
    with tempfile.TemporaryDirectory(prefix="overlap-") as directory:
        words = [f"run.directory={directory}/run", f"rollout.max_off_policy_steps={k}", *SETTINGS, *overrides]
        command = [sys.executable, "-m", "megatron_fipo.train", *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, timeout=900, stdout=subprocess.DEVNULL, env=environment)
        rows = [json.loads(line) for line in Path(directory, "run/metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] > WARM_UP]


if __name__ == "__main__":
    main()
