"""Runs' directories with the files that compare reads, made of a few numbers: a real run of each would take minutes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_fipo.config.configure import load_config
from megatron_fipo.tracking.metrics import METRICS_FILE, VALIDATION_FILE
from megatron_fipo.tracking.problem_files import path_of_step, write_problems
from megatron_fipo.tracking.run_files import write_config
from megatron_fipo.tracking.validation import ProblemScores, combine

SAMPLES = 4


def problem(index: int, right: int, source: str = "toy") -> ProblemScores:
    """A problem of which `right` of four samples are right."""
    share, majority, solved = right / SAMPLES, float(right > SAMPLES / 2), float(right > 0)
    name = f"problem-{index}"
    return ProblemScores(name, source, SAMPLES, SAMPLES, right, share, majority, solved, 100, 0, 0, 0)


def make_run(
    directory: Path,
    validations: Mapping[int, Sequence[int]],
    *overrides: str,
    steps: int = 20,
    last_step: int | None = None,
    keep_problems: bool = True,
    sources: Sequence[str] = (),
) -> Path:
    """A run of `steps` steps, five seconds and 1,000 tokens each, that came to `last_step`.

    `validations` has, by step, how many of four samples of each problem are right;
    `sources` each problem's data source.
    """
    directory.mkdir(parents=True)
    write_config(directory, load_config([f"run.steps={steps}", *overrides]))
    done = steps if last_step is None else last_step
    rows = [
        {"step": step, "seconds_step": 5.0, "response_tokens": 1000.0, "reward_mean": 0.0}
        for step in range(1, done + 1)
    ]
    (directory / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = []
    for step, right in validations.items():
        names = sources or ["toy"] * len(right)
        problems = [problem(index, count, names[index]) for index, count in enumerate(right)]
        lines.append(json.dumps({"step": step, **combine(problems, SAMPLES).metrics()}) + "\n")
        if keep_problems:
            write_problems(path_of_step(directory, step), problems)
    (directory / VALIDATION_FILE).write_text("".join(lines))
    return directory
