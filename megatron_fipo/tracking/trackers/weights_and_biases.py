"""Weights & Biases, with its service or offline. The key is where `wandb login` or WANDB_API_KEY has put it."""

import contextlib
import secrets
from collections.abc import Mapping
from typing import Any

import psutil

from megatron_fipo.tracking.trackers.protocol import TrackedRun
from megatron_fipo.tracking.trackers.run_ids import own_id

_OPENS_S = 90.0


class WeightsAndBiases:
    """One run at W&B. Its files are in run.directory/wandb, from where `wandb sync` uploads an offline run."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        run_id = own_id(run.directory, "wandb", secrets.token_hex(8))
        # Without a mode here, that of WANDB_MODE holds.
        mode: dict[str, Any] = {"mode": "offline"} if run.offline else {}
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run_id,
            resume="allow",
            dir=str(run.directory),
            config=dict(run.settings),
            settings=wandb.Settings(
                **mode,
                init_timeout=_OPENS_S,
                # Its output would be between the lines of the run, and the run keeps its own logs.
                console="off",
                silent=True,
                # The command line and the source tree are in environment.json, without passwords.
                x_disable_meta=True,
                disable_git=True,
                disable_code=True,
            ),
        )
        # W&B refuses a step below one that it has: a resume repeats some. So the step is a number like the others.
        self._run.define_metric("step", hidden=True)
        for kind in ("train", "validation"):
            self._run.define_metric(f"{kind}/*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def finish(self) -> None:
        self._run.finish()


def end_service() -> None:
    """Kill W&B's own process beside this one. As long as it hangs, W&B's exit handler would keep this process too."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "wandb" in child.name():
                child.kill()
