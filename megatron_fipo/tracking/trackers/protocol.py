"""What a tracker is: it receives a run's numbers, and shows them somewhere else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of its run when it opens."""

    directory: Path
    name: str
    project: str
    offline: bool
    """Keep the numbers on this machine, if the tracker has a service elsewhere."""
    resumed_step: int
    """The last step of the checkpoint from which the run resumes, or 0."""
    settings: Mapping[str, Any]
    """The configuration as nested dictionaries, without passwords."""


class Tracker(Protocol):
    """All its calls come from one thread. Any of them may raise or hang: background.py keeps this from the run."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record the finite numbers of a step, by names such as train/reward_mean.

        A run that resumes repeats the steps after its checkpoint, so that their numbers come again.
        """

    def finish(self) -> None:
        """Write what is still in memory, and end the run there. Called once, unless the process is killed."""


Open = Callable[[TrackedRun], Tracker]
"""Opens a tracker. Its package is imported only then."""
