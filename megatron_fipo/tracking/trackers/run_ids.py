"""trackers.json in a run's directory: under which id each tracker knows the run, so that a resume continues it."""

import json
import threading
from pathlib import Path

from megatron_fipo.errors import one_line
from megatron_fipo.files import write_json_atomically

RUN_IDS_FILE = "trackers.json"
_ONE_AT_A_TIME = threading.Lock()
"""Each tracker opens in a thread of its own, and all ids are in one file."""


def kept_id(directory: Path, tracker: str) -> str | None:
    """Return the run's id at `tracker`, or None if it has none yet.

    Raises:
        ValueError: the file is not what `keep_id` writes.
    """
    return _read(directory).get(tracker)


def own_id(directory: Path, tracker: str, fresh: str) -> str:
    """Return the run's id at `tracker`: the one that is kept, or `fresh`, which is kept then. Errors as `kept_id`."""
    found = kept_id(directory, tracker)
    if found is not None:
        return found
    keep_id(directory, tracker, fresh)
    return fresh


def keep_id(directory: Path, tracker: str, run_id: str) -> None:
    """Keep the run's id at `tracker`. After a crash at any point the file has the old or the new content."""
    with _ONE_AT_A_TIME:
        write_json_atomically(directory / RUN_IDS_FILE, _read(directory) | {tracker: run_id})


def _read(directory: Path) -> dict[str, str]:
    path = directory / RUN_IDS_FILE
    try:
        ids = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({one_line(error)}); remove it to begin new runs at trackers") from None
    if not isinstance(ids, dict) or not all(isinstance(value, str) for value in ids.values()):
        raise ValueError(f"{path} does not map trackers to ids; remove it to begin new runs at trackers")
    return ids
