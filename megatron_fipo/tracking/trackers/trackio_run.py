"""trackio, which keeps its numbers in a database of this machine (TRACKIO_DIR), or in a Space of the hub."""

import secrets
from collections.abc import Mapping

from megatron_fipo.tracking.trackers.protocol import TrackedRun
from megatron_fipo.tracking.trackers.run_ids import own_id


class TrackioRun:
    """One run of the project `tracking.project`. `trackio show` opens its page."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        # A name is all that identifies a run there.
        name = own_id(run.directory, "trackio", f"{run.name}-{secrets.token_hex(4)}")
        self._run = trackio.init(project=run.project, name=name, config=dict(run.settings), resume="allow", embed=False)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def finish(self) -> None:
        self._run.finish()
