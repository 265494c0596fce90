"""TensorBoard event files in run.directory/tensorboard."""

import time
from collections.abc import Mapping

from megatron_fipo.tracking.trackers.protocol import TrackedRun


class TensorBoard:
    """Writes scalars by TensorBoard's own writer, which needs neither torch nor TensorFlow."""

    def __init__(self, run: TrackedRun) -> None:
        # Imported here: a run without TensorBoard files does not need the package.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(run.directory / "tensorboard"))
        # TensorBoard then hides the values of earlier files in this directory from this step on.
        first_step = run.resumed_step + 1 if run.resumed_step else 0
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=float(value)) for tag, value in scalars.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()
