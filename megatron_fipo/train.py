"""Train a model with FIPO: `python -m megatron_fipo.train experiment=tiny` (--help has more).

One process a GPU runs this same loop (SPMD). Rank 0 also samples, judges and reports; the policy, its updates and the
weight updates to the rollout service are everybody's. Started alone, it starts the processes that the layout asks for;
under torchrun or srun it joins them.
"""

import sys
import time
import warnings
from contextlib import ExitStack
from typing import Any

from megatron_fipo.config import Config, ParallelConfig
from megatron_fipo.config.configure import run_with_config
from megatron_fipo.config.model_places import fetch_model
from megatron_fipo.launch.local import STOPPED, adopt_environment, already_launched, launch
from megatron_fipo.processes import terminate_on_sigterm


def main(config: Config) -> None:
    """Start the run's processes, or be one of them."""
    fetch_model(config.model.path)  # before there are processes, so that one fetches
    if not already_launched():
        sys.exit(launch(world_size(config.parallel), config.run.directory))
    terminate_on_sigterm()
    # Libraries warn about what they would rather have (apex, newer names); errors of ours are never warnings.
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\.")
    from megatron_fipo.trainer import Trainer

    with ExitStack() as stack:
        train(Trainer(config, stack))


def world_size(parallel: ParallelConfig) -> int:
    """Processes that a layout takes."""
    return parallel.tensor * parallel.pipeline * parallel.context * (parallel.data or 1)


def train(run: Any) -> None:
    """The loop. `run` is a Trainer, whose methods are called by every rank together."""
    run.prepare()
    run.push_weights()
    if run.step == 0:
        run.validate()
    while run.step < run.config.run.steps:
        run.step += 1
        started = time.monotonic()
        sequences, sampled = run.sample()
        updated = run.update(sequences)
        run.push_weights()
        run.settle(wait=False)
        run.log_step(sampled | updated, time.monotonic() - started)
        if run.is_due(run.config.validation.every):
            run.validate()
        stops = run.step < run.config.run.steps and run.asked_to_stop()
        if stops or run.is_due(run.config.checkpoint.every):
            run.save()
        if stops:
            run.settle()
            sys.exit(STOPPED)
    run.settle()
    run.finish()


if __name__ == "__main__":
    adopt_environment()  # before the configuration is checked against the number of processes
    run_with_config(main)
