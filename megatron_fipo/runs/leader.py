"""What rank 0 alone has: the run's directory and files, and the rollouts."""

from dataclasses import dataclass

from megatron_fipo.rollout_process.link import RolloutCalls
from megatron_fipo.runs.directory import RunDirectory
from megatron_fipo.tracking.metrics import MetricsWriter
from megatron_fipo.tracking.report import Report


@dataclass(frozen=True)
class Leader:
    """Rank 0's parts of a run; the other ranks have None in its place."""

    place: RunDirectory
    metrics: MetricsWriter
    report: Report
    rollouts: RolloutCalls

    def check_lock(self) -> None:
        """See that nobody else has taken the run's directory, before anything is written there."""
        self.place.lock.check()
