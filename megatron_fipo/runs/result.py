"""Read a run's directory, for notebooks and for scripts that start many runs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_fipo.errors import DataError
from megatron_fipo.policy.checkpoint_places import complete
from megatron_fipo.tracking.metrics import METRICS_FILE, VALIDATION_FILE, read_rows
from megatron_fipo.tracking.run_files import CONFIG_FILE, SUMMARY_FILE

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunResult:
    """A run, finished or not, as described by its files."""

    directory: Path
    summary: Row
    """Accuracy before and after, steps, seconds; empty while the run is not finished."""
    metrics: tuple[Row, ...]
    """One row per step. docs/algorithm.md explains each metric."""
    validation: tuple[Row, ...]
    """One row per validation."""
    checkpoints: tuple[Path, ...]
    """The complete checkpoints, oldest first."""

    @property
    def finished(self) -> bool:
        """Whether the run has done all its steps."""
        return bool(self.summary)

    @property
    def report(self) -> Path:
        """The page with its curves, for a browser."""
        return self.directory / "report.html"

    @property
    def config(self) -> Path:
        """The configuration with which it began."""
        return self.directory / CONFIG_FILE

    def samples(self, step: int | None = None) -> tuple[Row, ...]:
        """Return the rollouts that were kept, with their rewards, of one step or of all steps. Raises DataError."""
        pattern = "step-*.jsonl" if step is None else f"step-{step:06d}.jsonl"
        return tuple(row for path in sorted((self.directory / "samples").glob(pattern)) for row in _rows(path))


def read_run(directory: str | Path) -> RunResult:
    """Read the run in a directory.

    Raises:
        DataError: there is no run, or a file of it is damaged.
    """
    path = Path(directory).resolve()
    if not (path / CONFIG_FILE).is_file():
        raise DataError(f"{path} holds no run: {CONFIG_FILE} is not there")
    metrics = _rows(path / METRICS_FILE)
    return RunResult(
        directory=path,
        summary=_summary(path / SUMMARY_FILE, metrics[-1]["step"] if metrics else 0),
        metrics=metrics,
        validation=_rows(path / VALIDATION_FILE),
        checkpoints=tuple(complete(path / "checkpoints")),
    )


def _rows(path: Path) -> tuple[Row, ...]:
    return tuple(MappingProxyType(row) for row in read_rows(path))


def _summary(path: Path, steps: int) -> Row:
    """Return the result of a finished run. A run that was extended after an earlier end is not finished."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; remove it") from None
    return MappingProxyType(found if found.get("steps") == steps else {})
