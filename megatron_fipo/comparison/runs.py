"""Read runs from their directories: settings, rows of metrics, validations with the scores of each problem.

The directory of an evaluation is read too, as a run without steps that was validated once.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_fipo.config import every_setting
from megatron_fipo.errors import DataError, one_line
from megatron_fipo.evaluation.files import ALL, PROBLEMS_FILE, RESULTS_FILE, SETTINGS_FILE
from megatron_fipo.tracking.metrics import METRICS_FILE, VALIDATION_FILE, read_rows
from megatron_fipo.tracking.problem_files import path_of_step, read_problems
from megatron_fipo.tracking.validation import ProblemScores

CONFIG_FILE = "config.yaml"
_SWEEP_DEPTH = 3
"""How many levels below a sweep's directory its runs may be."""

Rows = dict[int, dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One run, finished or not."""

    directory: Path
    settings: dict[str, Any]
    """Every key of its config.yaml with its value. A key that did not exist when the run was made has its default."""
    steps: Rows
    """Metrics by step. If a resume repeated a step, the last row counts."""
    validations: Rows
    """Held-out scores by step."""
    commit: str | None
    """The commit of the source, if it is known."""
    is_evaluation: bool = False

    @property
    def seed(self) -> int:
        return int(self.settings["run.seed"])

    @property
    def last_step(self) -> int:
        return max(self.steps, default=0)

    @property
    def is_finished(self) -> bool:
        """Whether it has done all configured steps."""
        return self.is_evaluation or self.last_step >= int(self.settings["run.steps"])

    def problems(self, step: int) -> list[ProblemScores] | None:
        """Return the scores of each problem in a validation; None for a run that has not kept them."""
        path = self.directory / PROBLEMS_FILE if self.is_evaluation else path_of_step(self.directory, step)
        return _problems(path) if path.is_file() else None


@functools.cache
def _problems(path: Path) -> list[ProblemScores]:
    return read_problems(path)


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Find the runs in these directories. Each is a run's directory, or has runs below it, such as a sweep's.

    If there are runs and evaluations below a directory, only the runs are used.

    Raises:
        DataError: a directory holds no run, or a file of a run cannot be read.
    """
    found: dict[Path, None] = {}
    for path in paths:
        directories = [path] if (path / CONFIG_FILE).is_file() else list(_below(path, _SWEEP_DEPTH))
        trained = [directory for directory in directories if not (directory / SETTINGS_FILE).is_file()]
        directories = trained or directories
        if not directories:
            what = "holds no run: neither it nor a directory in it has a config.yaml" if path.is_dir() else "not found"
            raise DataError(f"{path}: {what}")
        found |= dict.fromkeys(directory.resolve() for directory in directories)
    return [read_run(directory) for directory in found]


def _below(path: Path, depth: int) -> Iterator[Path]:
    if depth == 0 or not path.is_dir():
        return
    for child in sorted(path.iterdir()):
        if (child / CONFIG_FILE).is_file():
            yield child
        elif child.is_dir() and not child.name.startswith("."):
            yield from _below(child, depth - 1)


def read_run(directory: Path) -> Run:
    """Read a run's files. DataError, with file and line, if one cannot be read."""
    if (directory / SETTINGS_FILE).is_file():
        return _read_evaluation(directory)
    return Run(
        directory,
        _settings(directory / CONFIG_FILE),
        {row["step"]: row for row in read_rows(directory / METRICS_FILE)},
        {row["step"]: row for row in read_rows(directory / VALIDATION_FILE)},
        _commit(directory / "environment.json"),
    )


def _read_evaluation(directory: Path) -> Run:
    if not (directory / RESULTS_FILE).is_file():
        raise DataError(f"{directory}: this evaluation is not done; start it again to finish it")
    try:
        results = json.loads((directory / RESULTS_FILE).read_text())
        overall, settings = results["scores"], {**results["settings"], "model.path": results["model"]}
        row: dict[str, Any] = {}
        parts = overall if len(overall) > 2 else {ALL: overall[ALL]}  # with only one data set, "all" is the same
        for name, part in parts.items():
            suffix = "" if name == ALL else f"/{name}"
            row[f"accuracy{suffix}"] = part["avg_at_k"] and part["avg_at_k"]["value"]
            row[f"cons_at_k{suffix}"] = part["cons_at_k"] and part["cons_at_k"]["value"]
            largest = part["pass_at"][str(part["samples"])]
            row[f"pass_at_k{suffix}"] = largest and largest["value"]
            row[f"response_length_mean{suffix}"] = part["response_length"]["mean"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{directory / RESULTS_FILE} cannot be read: {one_line(error)}; evaluate again") from error
    commit = _commit(directory / "environment.json")
    return Run(directory, default_settings() | settings, {}, {0: row}, commit, is_evaluation=True)


def _settings(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("run"), dict):
        raise DataError(f"{path} is not a configuration of a run: it has no section run")
    found = default_settings() | dict(_flat(tree))
    for key in ("run.seed", "run.steps"):
        if not isinstance(found[key], int):
            raise DataError(f"{path}: {key} is {found[key]!r}, not a number")
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@functools.cache
def default_settings() -> dict[str, Any]:
    """Return the schema's defaults of all keys that are not in a section that may be null."""
    defaults: dict[str, Any] = {}
    for key, entry in every_setting():
        if key.count(".") == 1:
            defaults[key] = entry.default_factory() if callable(entry.default_factory) else entry.default
    return defaults


def _commit(path: Path) -> str | None:
    try:
        commit = json.loads(path.read_text()).get("commit")
    except (OSError, ValueError, AttributeError):
        return None
    return commit if isinstance(commit, str) else None
