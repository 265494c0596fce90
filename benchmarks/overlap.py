"""How much of a step sampling while training hides: pairs of whole runs, k = 0 and k = 1, in turns.

    python -m benchmarks.overlap [PAIRS] [KEY=VALUE …]

What the phases allow is the longest of sampling, everything else, and the CPU seconds of a step spread over all cores,
of the k = 0 run beside it. Two busy cores share caches and memory, so the same work takes more CPU seconds at k = 1.
The last column is the share of all cores' time that was used then: at 1 nothing is left to hide. Run it on an idle
machine: trainer and engine get one core each. The policy stays as it is, so that both runs sample and reject alike at
every step.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import psutil

from benchmarks.measure import machine

WARM_UP = 3
SETTINGS = (
    "run.steps=14",
    "parallel.pipeline=1",
    "rollout.cpu_threads=1",
    "algorithm.tis_cap=2",
    "optimizer.lr=1e-12",
    "optimizer.min_lr=0",
    "validation.every=0",
    "checkpoint.every=0",
)
LIMIT_S = 1800


@dataclass(frozen=True)
class Measured:
    """Means over the steps of one run, without the first ones and the last; seconds."""

    step: float
    sampling: float
    cpu: float
    """CPU seconds per step, of all processes of the run."""


def main() -> None:
    """Print a row per pair."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdigit() else 3
    overrides = [word for word in sys.argv[1:] if "=" in word]
    cores = os.cpu_count() or 1
    print(f"{machine()}; {' '.join(overrides)}\n")
    print(
        f"| sampling, s | the rest, s | CPU / {cores}, s | step at k = 0, s | allowed, s | step at k = 1, s | gain | "
        "of what is allowed | cores used at k = 1 |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    gains, shares = [], []
    for _ in range(count):
        before, after = run(0, overrides), run(1, overrides)
        phases = before.sampling, before.step - before.sampling, before.cpu / cores
        gains.append(before.step / after.step)
        shares.append(max(phases) / after.step)
        row = " | ".join(f"{seconds:.2f}" for seconds in (*phases, before.step, max(phases), after.step))
        used = after.cpu / cores / after.step
        print(f"| {row} | {gains[-1]:.2f} × | {shares[-1]:.2f} | {used:.2f} |", flush=True)
    print(f"\nmedian gain {median(gains):.2f} ×, {median(shares):.2f} of what the phases allow")


def run(k: int, overrides: list[str]) -> Measured:
    """One whole run."""
    with tempfile.TemporaryDirectory(prefix="overlap-") as directory:
        words = [f"run.directory={directory}/run", f"rollout.max_off_policy_steps={k}", *SETTINGS, *overrides]
        command = [sys.executable, "-m", "megatron_fipo.train", *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        metrics = Path(directory, "run/metrics.jsonl")
        steps = int([word for word in words if word.startswith("run.steps=")][-1].split("=")[1])
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
            started = cpu_at(process, metrics, WARM_UP)
            used = cpu_at(process, metrics, steps - 1) - started
            if process.wait(timeout=LIMIT_S):
                raise subprocess.CalledProcessError(process.returncode, command)
        rows = [json.loads(line) for line in metrics.read_text().splitlines()][WARM_UP : steps - 1]
    step, sampling = (fmean(row[key] for row in rows) for key in ("seconds_step", "seconds_sample"))
    return Measured(step, sampling, used / len(rows))


def cpu_at(process: subprocess.Popen[bytes], metrics: Path, step: int) -> float:
    """CPU seconds of a run and all that it has started, when its first `step` steps are done."""
    deadline = time.monotonic() + LIMIT_S
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run has not come to step {step}")
        time.sleep(0.02)
    family = psutil.Process(process.pid)
    return sum(sum(one.cpu_times()[:2]) for one in [family, *family.children(recursive=True)])


if __name__ == "__main__":
    main()
