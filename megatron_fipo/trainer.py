"""The state of a run and the parts of a step. Every method is called by every rank together.

What only rank 0 has (problems, servers, verifiers, files, terminal) is None or silent elsewhere.
"""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed

from megatron_fipo import loop_state
from megatron_fipo.config import Config
from megatron_fipo.config.agreement import agreement_limits
from megatron_fipo.config.model_places import model_directory
from megatron_fipo.errors import CheckpointError
from megatron_fipo.launch.local import STOPPED
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.policy import checkpoint, checkpoint_manifest, huggingface_directories, platform
from megatron_fipo.policy.agreement import AgreementCheck
from megatron_fipo.policy.feed import feed_of
from megatron_fipo.policy.finite_updates import FiniteUpdates
from megatron_fipo.policy.micro_batch import MiniBatch
from megatron_fipo.policy.model import describe, start_model_parallel
from megatron_fipo.policy.publishing import PolicyPublisher
from megatron_fipo.policy.saving import Saving
from megatron_fipo.policy.step import train_step
from megatron_fipo.policy.update import Policy
from megatron_fipo.processes.interrupt import CtrlC, Interrupted
from megatron_fipo.processes.leftovers import own_place, remove_outside, say_removed
from megatron_fipo.rollout.events import BrokenOff, Event, Ready, WeightsWanted
from megatron_fipo.rollout.link import Offer
from megatron_fipo.rollout.remote import RemoteControl, RemoteRollouts
from megatron_fipo.runs.directory import RunDirectory, keep_settings, take_directory
from megatron_fipo.tracking.console import Console
from megatron_fipo.tracking.metrics import MetricsWriter
from megatron_fipo.tracking.report import Report
from megatron_fipo.tracking.run_files import distinguishing, write_environment, write_summary
from megatron_fipo.weights.mailbox import trainer_store
from megatron_fipo.weights.ranks import answer_of_rank_0, fact_of_rank_0, only_rank_0
from megatron_fipo.weights.sampling_events import SamplingEvents

STOP_FILE = "stop"


class Trainer:
    """One run on this rank."""

    def __init__(self, config: Config, stack: ExitStack, ctrl_c: CtrlC, process: subprocess.Popen[bytes] | None = None):
        """Join the other ranks; everything that has to be ended is entered into `stack`.

        `process` is the rollout process on rank 0, which has been started.

        Once `prepare` is done, a Ctrl-C that `ctrl_c` hears of on rank 0 ends the run where nothing is lost.

        Raises FipoError: the checkpoint, the model or the data cannot be used.
        """
        self.config, self.stack, self.ctrl_c = config, stack, ctrl_c
        self.model_dir = model_directory(config.model.path)
        stack.callback(platform.stop_process_group)
        platform.start_process_group(config.run.collective_timeout_s)
        self.agreement, self.finite_updates = AgreementCheck(agreement_limits(config)), FiniteUpdates()
        implementation = describe(config.model)
        start_model_parallel(config.parallel, config.run.seed)
        # Rank 0's view for all: under torchrun and srun each rank has read its own clock for the directory's name, and
        # on shared storage one node may see a checkpoint later than another.
        self.first = torch.distributed.get_rank() == 0
        self.place: RunDirectory | None = None
        directory, found = answer_of_rank_0(lambda: self._take_directory(stack))
        self.directory = Path(directory)
        self.resume_from = Path(found) if found else None
        self._name_belongings(stack)
        self.step = checkpoint.step_of(self.resume_from) if self.resume_from else 0
        self.console = stack.enter_context(Console(config.run.steps, self.step, enabled=self.first))
        self.console.note(implementation if ctrl_c.is_led else f"run directory: {self.directory}; {implementation}")
        self.rollouts: RemoteRollouts | None = None
        self.metrics: MetricsWriter | None = None
        self.report: Report | None = None
        only_rank_0(lambda: self._open_run_files(stack, process))
        world_size = torch.distributed.get_world_size()
        self.sampling_events = SamplingEvents(trainer_store(), torch.distributed.get_rank(), world_size)
        self.saving: Saving | None = None
        """The checkpoint that is being written."""
        # On the way out of a run that failed or is stopped by a signal the last complete checkpoint stays.
        stack.callback(lambda: self.saving.abandon() if self.saving else None)
        # The version of the present weights is the step that made them.
        self.version = self.saved_step = self.step
        self.published: dict[str, float] = {}
        """Metrics of the last weight update."""
        self.results: dict[str, Any] = {}
        self.seconds_before = 0.0

    def prepare(self) -> None:
        """Build the policy while the servers start, resume, and connect the two."""
        config = self.config
        with self.console.phase("start"):
            updates = config.run.steps * (config.algorithm.prompts_per_step // config.algorithm.mini_batch_prompts)
            model_config = read_architecture(self.model_dir)
            if (found := self.resume_from) is not None:
                if config.checkpoint.verify and (warning := checkpoint_manifest.verify(found)):
                    self.console.warn(warning)
                only_rank_0(lambda: self._load_loop(found))
            self._make_room()
            self.policy = Policy(config, model_config, str(self.model_dir), updates)
            self.feed = feed_of(self.policy)
            if self.resume_from is not None:
                checkpoint.load(self.policy, self.resume_from)
                self.console.note(f"resumed from {self.resume_from}")
            if self.rollouts is not None:
                self.rollouts.connect()
            control = RemoteControl(self.rollouts) if self.rollouts else None
            self.publisher = PolicyPublisher(self.policy, control, self.directory, self.console.warn)
            self.stack.callback(self.publisher.close)
        self.console.take_seconds()
        self.started = time.monotonic()
        self.ctrl_c.begin()

    def push_weights(self) -> None:
        """Hand the present weights to the servers, as version `step`; what that step took has then been trained."""
        self.version = self.step
        self._push()
        if self.rollouts is not None:
            self.rollouts.settle(self.version)

    def begin_step(self) -> None:
        """Count one step more."""
        self.step += 1

    def undo_step(self) -> None:
        """Go back to the end of the step before; nothing of this one has been trained."""
        self.step -= 1
        if self.rollouts is not None:
            self.rollouts.undo()
        self.console.note(f"Ctrl-C: step {self.step + 1}, half sampled, is dropped; nothing else is lost")

    def next_batch(self) -> tuple[list[MiniBatch] | None, dict[str, float]]:
        """What this rank trains on in this step, and rank 0's metrics of how that came about.

        None: a Ctrl-C broke it off.
        """
        with self.console.phase("sample"):
            if not self._is_sampled(lambda rollouts: rollouts.begin_batch(self.step, self.version)):
                return None, {}
            self._make_room()
            offer: Offer | None = only_rank_0(lambda: self.rollouts.taken() if self.rollouts else None)
            mini_batches = self.feed.get(offer.batch if offer else None, self.rollouts, self.policy.plan)
        return mini_batches, offer.metrics if offer else {}

    def update(self, mini_batches: list[MiniBatch]) -> dict[str, float]:
        """All updates of a step, none if it has no sequences; their metrics together."""

        def warn(text: str) -> None:
            self.console.warn(f"step {self.step}: {text}")

        metrics = train_step(self.policy, mini_batches, self.agreement, self.console.phase, warn)
        if warning := self.finite_updates.judge(metrics):
            warn(warning)
        return metrics

    def log_step(self, metrics: dict[str, float], seconds: float) -> None:
        """Write and show one step."""
        if self.metrics is None or self.rollouts is None or self.report is None:
            return
        self._check_lock()
        metrics |= self.rollouts.end_step() | self.published
        metrics |= self.console.take_seconds() | {"seconds_step": seconds}
        metrics["tokens_per_second"] = metrics.get("response_tokens", 0.0) / seconds
        self.report.add_step(self.metrics.log_step(self.step, metrics), self.console.take_spans())
        self.console.step_line(metrics | {"step": self.step})

    def lacks_validation(self) -> bool:
        """Whether held-out accuracy is due now, at the start: before the first step, or where a stop broke it off."""
        every = self.config.validation.every
        due = every > 0 and (self.step == 0 or self.is_due(every))
        return fact_of_rank_0(due and self.metrics is not None and not self.metrics.has_validation(self.step))

    def validate(self) -> None:
        """Accuracy and length on held-out problems."""
        if not self.config.validation.every:
            return
        with self.console.phase("validate"):
            started = time.monotonic()
            broken_off = not self._is_sampled(lambda rollouts: rollouts.begin_validation(self.step))
            seconds = time.monotonic() - started
        self.console.take_seconds()  # they are in no step
        if broken_off:
            self.console.note(f"Ctrl-C: the validation after step {self.step} is broken off; a resume does it again")
            return
        if self.rollouts is None or self.metrics is None or self.report is None:
            return
        result = self.rollouts.validated()
        which = "after" if self.step else "before"
        # Without any verdict there is no accuracy to remember.
        self.results[f"accuracy_{which}"] = None if math.isnan(result.overall.avg) else result.overall.avg
        self.results[f"response_length_{which}"] = result.overall.response_length_mean
        row = self.metrics.log_validation(self.step, result.metrics() | {"seconds_validate": seconds})
        self.report.add_validation(row, self.console.take_spans())
        self.console.validation(self.step, result)

    def is_due(self, every: int) -> bool:
        """Whether something done every so many steps is due after this one; after the last step it always is."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.run.steps)

    def asked_to_stop(self) -> bool:
        """Whether to stop before the last step: a Ctrl-C, or a file named stop in the run's directory, now removed."""
        if self.step == self.config.run.steps and not self.lacks_validation():
            return False
        file = self.directory / STOP_FILE
        if by_file := self.first and file.exists():
            file.unlink()
            self.console.note(f"stopping after step {self.step}, as {file} asks for")
        return fact_of_rank_0(by_file or self.ctrl_c.asked)

    def stop(self) -> NoReturn:
        """Save what no checkpoint has yet, and end this process in peace."""
        self.settle()
        if self.step > 0 and self.saved_step != self.step:
            self.save()
            self.settle()
        sys.exit(STOPPED)

    def save(self) -> None:
        """Begin a checkpoint of the policy and of the loop; complete when `settle` says so, or at once."""
        self.settle()
        self._check_lock()
        state, write_rollout = only_rank_0(self._loop_state) or ({}, None)
        with self.console.phase("checkpoint"):
            directory, keep = self.directory / "checkpoints", self.config.checkpoint.keep
            try:
                write = checkpoint.start_saving
                self.saving = write(self.policy, directory, self.step, state, keep, self.model_dir, write_rollout)
            except CheckpointError as error:
                self._not_saved(error)
                return
            if self.config.checkpoint.huggingface_every:
                self._save_huggingface(self.saving.target)
        if not self.config.checkpoint.asynchronous:
            self.settle()

    def settle(self, wait: bool = True) -> None:
        """Put the checkpoint that is being written in its place, if there is one: now, or if that is no wait."""
        saving = self.saving
        if saving is None:
            return
        with self.console.phase("checkpoint"):
            if not wait and not saving.is_written():
                return
            self.saving = None
            self._check_lock()
            try:
                saved = saving.finish()
            except CheckpointError as error:
                self._not_saved(error)
                return
            self.saved_step = checkpoint.step_of(saved)
            if self.first and self.config.checkpoint.keep and self.config.checkpoint.huggingface_every:
                huggingface_directories.prune(self.directory / "huggingface", saved)

    def _not_saved(self, error: CheckpointError) -> None:
        """What `checkpoint.on_error` says of a checkpoint that could not be written."""
        if self.config.checkpoint.on_error == "stop":
            raise error
        self.console.warn(f"{error}; the run goes on without it, as checkpoint.on_error=warn says")

    def _save_huggingface(self, saved: Path) -> None:
        """Write the policy beside its checkpoint as a Hugging Face directory, if that is due."""
        directory = self.directory / "huggingface"
        if self.is_due(self.config.checkpoint.huggingface_every) and (
            failure := huggingface_directories.save(self.policy, saved, directory, self.model_dir)
        ):
            # The run has lost nothing: the same weights are in the checkpoint.
            remedy = f"megatron-fipo export {saved} DIRECTORY makes it of the checkpoint"
            self.console.warn(f"step {self.step}: no Hugging Face directory: {failure} ({remedy})")

    def finish(self) -> None:
        """Write what came of the run, and show it."""
        if self.report is None:
            return
        summary: dict[str, Any] = {name: self.results.get(name) for name in loop_state.RESULTS}
        summary |= {"steps": self.step, "seconds": self._seconds(), **distinguishing(self.config)}
        write_summary(self.directory, summary)
        self.report.finish(summary["seconds"], self.console.take_spans())
        self.console.finish(summary, self.directory)

    def _make_room(self) -> None:
        """Where servers share the trainer's GPUs, they sleep from here to the next weight update."""
        if self.config.rollout.shared_gpu:
            only_rank_0(lambda: self.rollouts.make_room() if self.rollouts else None)

    def _push(self) -> None:
        """Hand the present weights, which are `version`, to all servers; to their replacements where some fail."""
        with self.console.phase("weights"):
            published = self.publisher.publish(self.version, self._replace_failed)
        with self.console.phase("log-probs"):
            self.published = published | self.publisher.probe()

    def _replace_failed(self) -> bool:
        return self.rollouts is not None and self.rollouts.replace_failed()

    def _is_sampled(self, begin: Callable[[RemoteRollouts], None]) -> bool:
        """Wait until what rank 0 has begun to sample is there, and give weights to servers that start again meanwhile.

        The one place where the trainer waits for sampling. False after a Ctrl-C. FipoError, on every rank: it cannot go
        on.
        """
        event = self.sampling_events.next(lambda: self._next_event(begin))
        while isinstance(event, WeightsWanted):
            self._push()
            event = self.sampling_events.next(self._next_event)
        return not isinstance(event, BrokenOff)

    def _next_event(self, begin: Callable[[RemoteRollouts], None] | None = None) -> Event:
        """What sampling says next, on rank 0; `begin` begins it."""
        try:
            with self.ctrl_c.breaks():
                if begin and self.rollouts:
                    begin(self.rollouts)
                return self.rollouts.wait() if self.rollouts else Ready()
        except Interrupted:
            return BrokenOff()

    def _seconds(self) -> float:
        """Seconds of training, those before a resume included, without the start of processes and servers."""
        return self.seconds_before + time.monotonic() - self.started

    def _take_directory(self, stack: ExitStack) -> tuple[str, str | None]:
        self.place = take_directory(self.config, stack)
        found = self.place.start.resume_from
        return self.config.run.directory, str(found) if found else None

    def _open_run_files(self, stack: ExitStack, process: subprocess.Popen[bytes] | None) -> None:
        assert self.place is not None and process is not None, "rank 0 has both"
        for warning in keep_settings(self.config, self.directory, self.step, self.place.start):
            self.console.warn(warning)
        write_environment(self.directory, world_size=torch.distributed.get_world_size())
        self.metrics = MetricsWriter(self.directory, self.config.tracking, self.step)
        stack.callback(self.metrics.close)
        self.report = stack.enter_context(Report(self.directory, self.config, self.console.warn))
        self.rollouts = stack.enter_context(RemoteRollouts(process, self.model_dir, self.directory, self.console))

    def _name_belongings(self, stack: ExitStack) -> None:
        """From here on whatever this rank puts outside the run's directory tells whose it is, and goes at the end."""
        if not self.first and os.environ.get("LOCAL_RANK") == "0":  # `take_directory` did the first machine
            say_removed(self.directory, remove_outside(self.directory))
        stack.callback(remove_outside, self.directory)
        stack.enter_context(own_place(self.directory))

    def _check_lock(self) -> None:
        """Before anything is written: nobody else has taken the directory."""
        if self.place is not None:
            self.place.lock.check()

    def _loop_state(self) -> tuple[dict[str, Any], Callable[[Path], None]]:
        assert self.rollouts is not None, "rank 0 has one"
        rollouts, number = self.rollouts, self.rollouts.snapshot()
        content = loop_state.content(self.step, self._seconds(), self.results)
        return content, lambda directory: rollouts.write_snapshot(number, str(directory))

    def _load_loop(self, path: Path) -> None:
        """Have the loop go on from a checkpoint. DataError with file and key if it cannot; on rank 0."""
        checkpoint.check_version(path)
        assert self.rollouts is not None, "rank 0 has one"
        resumed = self.rollouts.resume(str(path), self.step)
        self.seconds_before, self.results = resumed.seconds, resumed.results
