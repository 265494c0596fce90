"""Train a model with FIPO: `python -m megatron_fipo.train experiment=tiny` (--help has more).

One process per GPU runs this same loop (SPMD). Rank 0 also reports, and has a second process that samples and judges.
All ranks hold the policy and take part in its updates and in the weight updates. A process that you start by hand
starts all processes of the layout. A process that torchrun or srun starts becomes one of the ranks.
"""

import os
import sys
import time
import warnings
from contextlib import ExitStack
from typing import Any

from megatron_fipo.config import Config, ParallelConfig
from megatron_fipo.config.configure import refusals_in_one_line, run_with_config
from megatron_fipo.config.model_places import fetch_model
from megatron_fipo.launch.first_look import look_first, splits_read
from megatron_fipo.launch.local import adopt_environment, already_launched, launch_training
from megatron_fipo.processes.ending import die_with_library, terminate_on_sigterm
from megatron_fipo.processes.interrupt import CtrlC
from megatron_fipo.processes.reasons import told_at_once
from megatron_fipo.rollout_process.process_start import start_rollout_process


def main(config: Config) -> None:
    """Start the run's processes, or run as one of them."""
    if not already_launched():
        die_with_library()
        look_first(config, splits_read(config))
    fetch_model(config.model.path)  # before the run's processes start, so that only one process downloads
    if not already_launched():
        sys.exit(launch_training(world_size(config.parallel), config))
    ctrl_c = CtrlC()
    terminate_on_sigterm()
    rollouts = start_rollout_process(config) if os.environ.get("RANK") == "0" else None
    # Libraries warn about packages that they would prefer (apex) and about renamed functions. Our errors are
    # exceptions.
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\.")
    from megatron_fipo.assembly import assemble

    with ExitStack() as stack, told_at_once():
        train(assemble(config, stack, ctrl_c, rollouts))


def world_size(parallel: ParallelConfig) -> int:
    """Return the number of processes that a layout needs."""
    return parallel.tensor * parallel.pipeline * parallel.context * (parallel.data or 1)


def train(run: Any) -> None:
    """Run the training loop. `run` is a Trainer; every rank calls each of its methods at the same point."""
    run.push_weights()
    if run.lacks_validation():
        run.validate()
    while run.step < run.config.run.steps:
        run.begin_step()
        started = time.monotonic()
        batch, sampled = run.next_batch()
        if batch is None:
            run.undo_step()
            run.stop()
        updated = run.update(batch)
        del batch  # so that it does not take memory while the next step is sampled
        run.push_weights()
        run.settle(wait=False)
        run.log_step(sampled | updated, time.monotonic() - started)
        if run.is_due(run.config.validation.every):
            run.validate()
        if run.is_due(run.config.checkpoint.every):
            run.save()
        if run.asked_to_stop():
            run.stop()
    run.settle()
    run.finish()


def several(arguments: list[str]) -> None:
    """Train all runs that a command line with -m describes, then end the process."""
    from megatron_fipo.launch.sweep import FLAGS, sweep

    with refusals_in_one_line():
        sweep([text for text in arguments if text not in FLAGS])


if __name__ == "__main__":
    adopt_environment()  # before the configuration is checked against the number of processes
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        several(sys.argv[1:])
    run_with_config(main)
