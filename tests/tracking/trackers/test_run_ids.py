"""Why: an id that is lost makes a resume begin a second run at its tracker."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_fipo.tracking.trackers.run_ids import keep_id, kept_id


def test_trackers_that_open_at_the_same_time_all_keep_their_ids(tmp_path: Path) -> None:
    """Without the lock most of these fail, on the partial file of another, or are overwritten."""
    names = [f"tracker-{number}" for number in range(60)]
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda name: keep_id(tmp_path, name, f"id of {name}"), names))
    assert {name: kept_id(tmp_path, name) for name in names} == {name: f"id of {name}" for name in names}
