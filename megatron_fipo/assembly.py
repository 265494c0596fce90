"""From a configuration to a Trainer, complete, resumed where the run's directory has a checkpoint.

Every function is called by every rank together.
"""

import os
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch.distributed

from megatron_fipo.config import Config
from megatron_fipo.config.agreement import agreement_limits
from megatron_fipo.config.model_places import model_directory
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.policy import checkpoint, checkpoint_manifest, platform
from megatron_fipo.policy.agreement import AgreementCheck
from megatron_fipo.policy.feed import feed_of
from megatron_fipo.policy.finite_updates import FiniteUpdates
from megatron_fipo.policy.model import describe, start_model_parallel
from megatron_fipo.policy.publishing import PolicyPublisher
from megatron_fipo.policy.update import Policy
from megatron_fipo.processes.interrupt import CtrlC
from megatron_fipo.processes.leftovers import own_place, remove_outside, say_removed
from megatron_fipo.rollout_process.link import Resumed
from megatron_fipo.rollout_process.remote import RemoteControl, RemoteRollouts
from megatron_fipo.runs.checkpoints import RunCheckpoints
from megatron_fipo.runs.directory import RunDirectory, keep_settings, take_directory
from megatron_fipo.runs.leader import Leader
from megatron_fipo.runs.sampling_events import SamplingEvents
from megatron_fipo.tracking.console import Console
from megatron_fipo.tracking.metrics import MetricsWriter
from megatron_fipo.tracking.report import Report
from megatron_fipo.tracking.run_files import write_environment
from megatron_fipo.tracking.trackers.opening import open_trackers
from megatron_fipo.trainer import STOP_FILE, RunProgress, Trainer
from megatron_fipo.weights.mailbox import trainer_store
from megatron_fipo.weights.ranks import answer_of_rank_0, only_rank_0


@dataclass(frozen=True)
class _Place:
    """A run's directory, alike on every rank."""

    directory: Path
    resume_from: Path | None
    step: int
    """Training steps that are done."""
    taken: RunDirectory | None
    """On rank 0."""


def assemble(
    config: Config, stack: ExitStack, ctrl_c: CtrlC, process: "subprocess.Popen[bytes] | None" = None
) -> Trainer:
    """Join the other ranks, and build the policy while the servers start; resume, and connect the two.

    Args:
        stack: gets everything that has to be ended.
        ctrl_c: from now on a Ctrl-C that it hears of on rank 0 ends the run where nothing is lost.
        process: on rank 0, the rollout process, which has been started.

    Raises:
        FipoError: the checkpoint, the model or the data cannot be used.
    """
    model_dir = model_directory(config.model.path)
    stack.callback(platform.stop_process_group)
    platform.start_process_group(config.run.collective_timeout_s)
    implementation = describe(config.model)
    start_model_parallel(config.parallel, config.run.seed)
    place = _take_place(config, stack)
    is_first = place.taken is not None
    overlaps = config.rollout.max_off_policy_steps > 0
    console = stack.enter_context(Console(config.run.steps, place.step, enabled=is_first, overlaps=overlaps))
    console.note(implementation if ctrl_c.is_led else f"run directory: {place.directory}; {implementation}")
    leader = only_rank_0(lambda: _open_leader(config, place, model_dir, process, console, stack))
    with console.phase("start"):
        seconds, results = _resume_loop(config, place, leader, console)
        if config.rollout.shared_gpu:  # the servers sleep until the first weight update
            only_rank_0(lambda: leader.rollouts.make_room() if leader else None)
        policy = _build_policy(config, place, model_dir, console)
        if leader is not None:
            leader.rollouts.connect()
        control = RemoteControl(leader.rollouts) if leader else None
        publisher = PolicyPublisher(policy, control, place.directory, console.warn)
        stack.callback(publisher.close)
    console.take_seconds()
    ctrl_c.begin()
    return Trainer(
        config=config,
        ctrl_c=ctrl_c,
        directory=place.directory,
        console=console,
        leader=leader,
        policy=policy,
        feed=feed_of(policy),
        publisher=publisher,
        checkpoints=RunCheckpoints(config, policy, model_dir, place.directory, place.step, leader, console, stack),
        sampling_events=SamplingEvents(
            trainer_store(), torch.distributed.get_rank(), torch.distributed.get_world_size()
        ),
        agreement=AgreementCheck(agreement_limits(config)),
        finite_updates=FiniteUpdates(),
        progress=RunProgress(place.step, time.monotonic() - seconds, results),
    )


def _take_place(config: Config, stack: ExitStack) -> _Place:
    """Have rank 0 take the run's directory; from here on what any rank puts outside of it tells whose it is.

    Rank 0's view holds for all: under torchrun and srun each rank has read its own clock for the directory's name, and
    on shared storage one node may see a checkpoint later than another.
    """
    taken: list[RunDirectory] = []

    def take() -> tuple[str, str | None]:
        taken.append(take_directory(config, stack))
        found = taken[0].start.resume_from
        return config.run.directory, str(found) if found else None

    directory, found = answer_of_rank_0(take)
    path, resume_from = Path(directory), Path(found) if found else None
    if not taken and os.environ.get("LOCAL_RANK") == "0":  # `take_directory` did the first machine
        say_removed(path, remove_outside(path))
    stack.callback(remove_outside, path)
    stack.enter_context(own_place(path))
    step = checkpoint.step_of(resume_from) if resume_from else 0
    return _Place(path, resume_from, step, taken[0] if taken else None)


def _open_leader(
    config: Config,
    place: _Place,
    model_dir: Path,
    process: "subprocess.Popen[bytes] | None",
    console: Console,
    stack: ExitStack,
) -> Leader:
    """Open the run's files, and have the rollout process start the servers; on rank 0."""
    assert place.taken is not None and process is not None, "rank 0 has both"
    for warning in keep_settings(config, place.directory, place.step, place.taken.start):
        console.warn(warning)
    write_environment(place.directory, world_size=torch.distributed.get_world_size())
    trackers = open_trackers(place.directory, config, place.step, console.warn)
    stack.callback(trackers.close)
    metrics = MetricsWriter(place.directory, trackers, place.step)
    report = stack.enter_context(Report(place.directory, config, console.warn))
    # Nothing is lost by it where sampling and training overlap; else the step that is being sampled is finished.
    overlaps, stop = config.rollout.max_off_policy_steps > 0, place.directory / STOP_FILE
    rollouts = stack.enter_context(
        RemoteRollouts(process, model_dir, place.directory, console, lambda: overlaps and stop.exists())
    )
    return Leader(place.taken, metrics, report, rollouts)


def _resume_loop(
    config: Config, place: _Place, leader: Leader | None, console: Console
) -> tuple[float, dict[str, float | None]]:
    """Have sampling go on from the checkpoint, if there is one: seconds and results of the run so far, on rank 0."""
    found = place.resume_from
    if found is None:
        return 0.0, {}
    if config.checkpoint.verify and (warning := checkpoint_manifest.verify(found)):
        console.warn(warning)

    def resume() -> Resumed | None:
        checkpoint.check_version(found)
        return leader.rollouts.resume(str(found), place.step) if leader else None

    resumed = only_rank_0(resume)
    return (resumed.seconds, resumed.results) if resumed else (0.0, {})


def _build_policy(config: Config, place: _Place, model_dir: Path, console: Console) -> Policy:
    """Build the policy and fill it from the model, or from the checkpoint."""
    updates = config.run.steps * (config.algorithm.prompts_per_step // config.algorithm.mini_batch_prompts)
    policy = Policy(config, read_architecture(model_dir), str(model_dir), updates)
    if place.resume_from is not None:
        checkpoint.load(policy, place.resume_from)
        console.note(f"resumed from {place.resume_from}")
    return policy
