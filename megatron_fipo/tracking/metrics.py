"""Write the run's numbers to JSONL files, which are complete after a crash and a resume, and give them to trackers.

A row is on disk before `log_step` returns. It is written before the checkpoint of its step, so every step in a
checkpoint has its row. A resume removes the rows of steps that it will repeat. So no step is missing or appears twice.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fipo.errors import DataError
from megatron_fipo.files import write_atomically
from megatron_fipo.tracking.trackers.background import Trackers

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"


class MetricsWriter:
    """Writes a run's metrics on rank 0. `resumed_step` is the last step in the loaded checkpoint, or 0.

    Whoever has opened `trackers` closes them.
    """

    def __init__(self, run_directory: Path, trackers: Trackers | None = None, resumed_step: int = 0) -> None:
        run_directory.mkdir(parents=True, exist_ok=True)
        self._files = {name: run_directory / name for name in (METRICS_FILE, VALIDATION_FILE)}
        for path in self._files.values():
            cut_after_step(path, resumed_step)
        self._trackers = trackers

    def log_step(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Append one training step's numbers, and return the row.

        Values may be Python, NumPy or zero-dimensional torch numbers. NaN and infinities become null in JSON, and are
        left out in trackers.
        """
        return self._append(METRICS_FILE, "train", step, metrics)

    def log_validation(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Append the scores of held-out problems after `step` steps, and return the row."""
        return self._append(VALIDATION_FILE, "validation", step, metrics)

    def has_validation(self, step: int) -> bool:
        """Return whether the scores after `step` steps have been written."""
        return any(row["step"] == step for row in read_rows(self._files[VALIDATION_FILE]))

    def _append(self, name: str, prefix: str, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        numbers = {key: _plain(key, value) for key, value in metrics.items() if key != "step"}
        row = {"step": step, **numbers}
        text = json.dumps(row, allow_nan=False)
        with self._files[name].open("a") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._trackers is not None:
            scalars = {f"{prefix}/{key}": value for key, value in numbers.items() if value is not None}
            self._trackers.log(step, scalars)
        return row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file, oldest first. Without a file there are none.

    A last line that a crash cut short is left out. Raises DataError for any other broken line, for a line that is not a
    row, and if the path is not a text file.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise DataError(f"{path} is not a file; remove it")
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; repair or remove it") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise DataError(f"{path}, line {number}: not JSON ({error}); repair or remove it") from error
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(f"{path}, line {number}: not the row of a step; repair or remove it")
        rows.append(row)
    return rows


def cut_after_step(path: Path, step: int) -> None:
    """Remove the rows of later steps, and a line that a crash cut short. A new run (step 0) keeps no rows.

    The validation before the first step has the row of step 0. It is kept only if a run resumes from a checkpoint.
    """
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if step > 0 and row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def _plain(key: str, value: Any) -> float | int | None:
    number = value.item() if hasattr(value, "item") else value
    if number is not None and not isinstance(number, int | float):
        raise TypeError(f"metric {key} is of type {type(value).__name__}, not a number")
    if isinstance(number, float) and not math.isfinite(number):
        return None
    return number
