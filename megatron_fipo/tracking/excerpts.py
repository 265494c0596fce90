"""A few responses of a run for its report: two each from early, in the middle and late, to see how they change."""

import json
from pathlib import Path
from typing import Any

_LONGEST = 3000
"""Characters of a response that the page shows: a page is copied and sent. The files have the rest."""
_LARGEST_FILE = 20_000_000
"""Bytes. A larger file would take a moment to read, at each update of the page."""


def excerpts(directory: Path) -> list[dict[str, Any]]:
    """Return up to six responses, from the files of the first, the middle and the last step that has one.

    Of each step they are the one with the worst and the one with the best reward. Each has step, length (in tokens),
    accuracy (None without a verdict) and text. A file that is no longer there or cannot be read is left out.
    """
    paths = sorted((directory / "samples").glob("step-*.jsonl"))
    chosen = sorted({0, len(paths) // 2, len(paths) - 1}) if paths else []
    return [shown for index in chosen for shown in _of_step(paths[index])]


def _of_step(path: Path) -> list[dict[str, Any]]:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            return []
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        judged = sorted(rows, key=lambda row: (row["reward"] is not None, row["reward"] or 0.0))
        return [_shown(row) for row in ([judged[0], judged[-1]] if len(judged) > 1 else judged)]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    text = row["response"]
    more = f"\n… and {len(text) - _LONGEST} more characters" if len(text) > _LONGEST else ""
    return {key: row[key] for key in ("step", "length", "accuracy")} | {"text": text[:_LONGEST] + more}
