"""Whether the simulator predicts this repository's own runs: real steps against simulated ones.

    python -m benchmarks.simulator [KEY=VALUE …]

The policy stays as it is, so that all runs sample alike. Seconds of decoding, log-probs, updates, weights and the rest
are fitted on the two settings marked so; lengths are theirs too, and rejections of the one with as many samples per
prompt. The others are predictions. Run it on an idle machine: trainer and engine get one core each.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from benchmarks.measure import machine
from megatron_fipo.config import Config
from megatron_fipo.config.configure import load_config
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.simulation.lengths import Lengths
from megatron_fipo.simulation.outcome import Outcome, simulate
from megatron_fipo.simulation.scenarios import MODES, configured
from megatron_fipo.simulation.settings import Measured, Settings
from megatron_fipo.sizing.estimate import model_directory

STEPS, WARM_UP, SIMULATED = 14, 3, 100
FITTED = (8, 8), (32, 16)
PREDICTED = (32, 8), (16, 8), (8, 16)
"""rollout.max_num_seqs and algorithm.samples_per_prompt."""
COMMON = (
    "parallel.pipeline=1",
    "rollout.cpu_threads=1",
    "optimizer.lr=1e-12",
    "optimizer.min_lr=0",
    "algorithm.mini_batch_prompts=8",  # a trainer that waits computes no log-probs then
    "validation.every=0",
    "checkpoint.every=0",
    f"run.steps={STEPS}",
    "tracking.samples_per_step=1000000",
)
DECODES = (1.0, 1e-9), (1e-9, 1.0)
PHASES = "sample", "log_probs", "update", "weights"


@dataclass(frozen=True)
class Run:
    """What a real run did, without its first steps: an array per column, a row per step."""

    config: Config
    seconds: dict[str, np.ndarray]
    tokens: np.ndarray
    """Of responses that were trained on."""
    rejected: float
    """Share of groups."""
    lengths: list[int]


def main() -> None:
    """Print a row per setting."""
    overrides = sys.argv[1:]
    print(f"{machine()}; {' '.join(overrides)}\n")
    runs = {setting: measured_run(setting, overrides) for setting in FITTED + PREDICTED}
    settings = fitted([runs[setting] for setting in FITTED])
    rejected = {samples: runs[places, samples].rejected for places, samples in FITTED}
    print(f"{settings.lengths}, rejected by samples: {rejected}\n{settings.measured}\n")
    print("| `max_num_seqs` | samples | measured s/step | simulated | difference |\n|---|---|---|---|---|")
    for setting, run in runs.items():
        found = played(run, replace(settings, rejected=rejected[setting[1]])).step_s
        step = float(run.seconds["step"].mean())
        note = "fitted" if setting in FITTED else f"{found / step - 1:+.0%}"
        print(f"| {setting[0]} | {setting[1]} | {step:.2f} | {found:.2f} | {note} |")


def measured_run(setting: tuple[int, int], overrides: list[str]) -> Run:
    """Train for real."""
    places, samples = setting
    words = [*COMMON, f"rollout.max_num_seqs={places}", f"algorithm.samples_per_prompt={samples}", *overrides]
    with tempfile.TemporaryDirectory(prefix="simulator-") as directory:
        command = [sys.executable, "-m", "megatron_fipo.train", f"run.directory={directory}/run", *words]
        subprocess.run(
            command, check=True, timeout=900, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        rows = [json.loads(line) for line in Path(directory, "run/metrics.jsonl").read_text().splitlines()]
        files = sorted(Path(directory, "run/samples").glob("*.jsonl"))
        lengths = [json.loads(line)["length"] for file in files for line in file.read_text().splitlines()]
    counted = rows[WARM_UP:]
    seconds = {key: np.array([row[f"seconds_{key}"] for row in counted]) for key in (*PHASES, "step")}
    opened, rejected = (
        rows[-1][f"tickets_{key}"] - rows[WARM_UP - 1][f"tickets_{key}"] for key in ("opened", "rejected")
    )
    config = load_config(words)
    return Run(config, seconds, np.array([row["tokens_trained"] for row in counted]), rejected / opened, lengths)


def fitted(runs: list[Run]) -> Settings:
    """The simulator's settings with which it takes as long as these runs in each phase."""
    lengths = [length for run in runs for length in run.lengths]
    spread = stdev(log(length) for length in lengths)
    updates = [run.config.algorithm.prompts_per_step // run.config.algorithm.mini_batch_prompts for run in runs]
    rest = [run.seconds["step"] - sum(run.seconds[phase] for phase in PHASES) for run in runs]
    measured = Measured(
        decode=(1.0, 0.0),
        log_probs=line([1] * len(runs), runs, "log_probs"),
        update=line(updates, runs, "update"),
        weights=fmean(float(run.seconds["weights"].mean()) for run in runs),
        other=fmean(float(seconds.mean()) for seconds in rest),
    )
    settings = Settings(
        lengths=Lengths(fmean(lengths), spread, runs[0].config.rollout.max_response_length),
        prompt=0.0,  # part of what a sequence costs
        rejected=0.0,
        steps=SIMULATED,
        warm_up=WARM_UP,
        seed=0,
        samples_at_once=None,
        measured=measured,
    )
    # Seconds of sampling are linear in both coefficients: decoding steps, and sequences in them.
    parts = [
        [sampling(run, with_decode(replace(settings, rejected=run.rejected), decode)) for decode in DECODES]
        for run in runs
    ]
    fixed, sequence = np.linalg.solve(np.array(parts), [run.seconds["sample"].mean() for run in runs])
    return with_decode(settings, (float(fixed), float(sequence)))


def with_decode(settings: Settings, decode: tuple[float, float]) -> Settings:
    """The same with other seconds of decoding."""
    return replace(settings, measured=replace(settings.measured, decode=decode))


def line(counts: list[int], runs: list[Run], phase: str) -> tuple[float, float]:
    """Least squares of a phase's seconds: of each of so many, and of each token."""
    columns = np.concatenate(
        [np.stack([np.full_like(run.tokens, n), run.tokens], 1) for n, run in zip(counts, runs, strict=True)]
    )
    found = np.linalg.lstsq(columns, np.concatenate([run.seconds[phase] for run in runs]), rcond=None)[0]
    return float(found[0]), float(found[1])


def played(run: Run, settings: Settings) -> Outcome:
    """The simulated run."""
    model_config = read_architecture(model_directory(run.config.model.path)[0])
    return simulate(MODES[0], configured(run.config, model_config, MODES[0]), model_config, settings)


def sampling(run: Run, settings: Settings) -> float:
    """Simulated seconds of a step in which the engine samples."""
    outcome = played(run, settings)
    return (1 - outcome.engines_idle) * outcome.step_s


if __name__ == "__main__":
    main()
