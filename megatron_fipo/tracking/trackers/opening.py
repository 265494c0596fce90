"""Open the trackers that tracking.to names."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_fipo.config import Config
from megatron_fipo.tracking.secrets import without_passwords
from megatron_fipo.tracking.trackers.background import BackgroundTracker, Trackers
from megatron_fipo.tracking.trackers.mlflow_run import MLflowRun
from megatron_fipo.tracking.trackers.protocol import Open, TrackedRun
from megatron_fipo.tracking.trackers.tensorboard import TensorBoard
from megatron_fipo.tracking.trackers.trackio_run import TrackioRun
from megatron_fipo.tracking.trackers.weights_and_biases import WeightsAndBiases, end_service

TRACKERS: Mapping[str, Open] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflowRun,
    "trackio": TrackioRun,
}


def _nothing() -> None:
    """Abandon a tracker that has no process of its own."""


_ABANDON: Mapping[str, Callable[[], None]] = {"wandb": end_service}


def open_trackers(
    directory: Path,
    config: Config,
    resumed_step: int,
    warn: Callable[[str], None],
    trackers: Mapping[str, Open] = TRACKERS,
) -> Trackers:
    """Open those of `trackers` that tracking.to names, each in its own thread. Nothing that fails there raises here."""
    run = TrackedRun(
        directory=directory,
        name=config.run.name,
        project=config.tracking.project,
        offline=config.tracking.offline,
        resumed_step=resumed_step,
        settings=without_passwords(dataclasses.asdict(config)),
    )
    opened = [
        BackgroundTracker(name, functools.partial(trackers[name], run), abandon=_ABANDON.get(name, _nothing))
        for name in dict.fromkeys(config.tracking.to)
    ]
    return Trackers(opened, warn)
