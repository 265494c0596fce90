"""The state of a run and the parts of a step. Every method is called by every rank together.

What only rank 0 has (problems, servers, verifiers, files, terminal) is None or silent elsewhere.
"""

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed
from megatron.core import parallel_state

from megatron_fipo import loop_state
from megatron_fipo.carried_groups import Arrays
from megatron_fipo.config import Config
from megatron_fipo.config.agreement import agreement_limits
from megatron_fipo.config.model_places import model_directory
from megatron_fipo.errors import CheckpointError, FipoError, RefusedOnRank0, RolloutError
from megatron_fipo.experience import Experience, training_sequences
from megatron_fipo.leftovers import own_place, remove_outside, say_removed
from megatron_fipo.loop_state import LoopState
from megatron_fipo.policy import checkpoint, checkpoint_manifest, huggingface_directories, platform
from megatron_fipo.policy.agreement import AgreementCheck
from megatron_fipo.policy.batches import Sequences, share
from megatron_fipo.policy.model import describe, start_model_parallel
from megatron_fipo.policy.saving import Saving
from megatron_fipo.policy.update import Policy, gather_parameters
from megatron_fipo.run_directory import take_directory
from megatron_fipo.tracking.console import Console
from megatron_fipo.tracking.kept_samples import keep_samples
from megatron_fipo.tracking.metrics import MetricsWriter
from megatron_fipo.tracking.problem_files import path_of_step, write_problems
from megatron_fipo.tracking.report import Report
from megatron_fipo.tracking.run_files import distinguishing, write_config, write_environment, write_summary
from megatron_fipo.tracking.sampling import sampling_metrics
from megatron_fipo.weights.architectures import read_architecture
from megatron_fipo.weights.mailbox import StandBy, trainer_store
from megatron_fipo.weights.reshard import export
from megatron_fipo.weights.transfer import open_transfer

STOP_FILE = "stop"
_T = TypeVar("_T")


class Trainer:
    """One run on this rank."""

    def __init__(self, config: Config, stack: ExitStack):
        """Join the other ranks; everything that has to be ended is entered into `stack`.

        Raises:
            FipoError: the checkpoint, the model or the data cannot be used.
        """
        self.config, self.stack = config, stack
        self.model_dir = model_directory(config.model.path)
        stack.callback(platform.stop_process_group)
        platform.start_process_group(config.run.collective_timeout_s)
        self.agreement = AgreementCheck(agreement_limits(config))
        implementation = describe(config.model)
        start_model_parallel(config.parallel, config.run.seed)
        # Rank 0's view for all: under torchrun and srun each rank has read its own clock for the directory's name, and
        # on shared storage one node may see a checkpoint later than another.
        self.first = torch.distributed.get_rank() == 0
        self.place = self._by_rank_0(lambda: take_directory(config.run, stack))
        found = self.place.resume_from if self.place else None
        told = [config.run.directory, str(found) if found else ""]
        torch.distributed.broadcast_object_list(told, src=0)
        self.directory = Path(told[0])
        self.resume_from = Path(told[1]) if told[1] else None
        self._name_belongings(stack)
        self.step = checkpoint.step_of(self.resume_from) if self.resume_from else 0
        self.console = stack.enter_context(Console(config.run.steps, self.step, enabled=self.first))
        self.console.note(implementation)
        self.experience: Experience | None = None
        self.metrics: MetricsWriter | None = None
        self.report: Report | None = None
        self._by_rank_0(lambda: self._open_run_files(stack))
        self.stand_by = StandBy(trainer_store())
        self.saving: Saving | None = None
        """The checkpoint that is being written."""
        stack.callback(self._abandon_saving)
        self.version = self.step
        """The version of the present weights: the step that made them."""
        self.results: dict[str, Any] = {}
        self.seconds_before = 0.0

    def prepare(self) -> None:
        """Build the policy while the servers start, resume, and connect the two."""
        config = self.config
        with self.console.phase("start"):
            updates = config.run.steps * (config.algorithm.prompts_per_step // config.algorithm.mini_batch_prompts)
            geometry = read_architecture(self.model_dir)
            if (found := self.resume_from) is not None:
                if config.checkpoint.verify and (warning := checkpoint_manifest.verify(found)):
                    self.console.warn(warning)
                self._by_rank_0(lambda: self._load_loop(found))
            self._make_room()
            self.policy = Policy(config, geometry, str(self.model_dir), updates)
            if self.resume_from is not None:
                checkpoint.load(self.policy, self.resume_from)
                self.console.note(f"resumed from {self.resume_from}")
            leads = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
            self.transfer = open_transfer(
                config.rollout,
                self.experience.connect(self._revive).control if self.experience else None,
                stage=parallel_state.get_pipeline_model_parallel_rank(),
                num_stages=config.parallel.pipeline,
                is_leader=leads and parallel_state.get_tensor_model_parallel_rank() == 0,
                run_dir=self.directory,
            )
            self.stack.callback(self.transfer.close)
        self.console.take_seconds()
        self.started = time.monotonic()

    def push_weights(self) -> None:
        """Hand the present weights to the rollout service, as version `step`."""
        self.version = self.step
        self._push()

    def sample(self) -> tuple[Sequences, dict[str, float]]:
        """This step's sequences, on every rank, and rank 0's metrics of how they came about."""
        sequences, metrics = None, {}
        with self.console.phase("sample") as phase:
            collected = self._while_serving(lambda experience: experience.collect(phase))
            self._make_room()
            if collected is not None:
                selection, sampled = collected
                sequences = training_sequences(selection.groups, self.config.algorithm, self.version)
                metrics = sampling_metrics(selection.counts, sampled)
                keep_samples(self.directory, self.step, sampled, self.config.tracking.samples_per_step)
                if selection.gave_up:
                    self.console.warn(
                        f"step {self.step}: {len(selection.groups)} of {self.config.algorithm.prompts_per_step} groups "
                        f"after {selection.counts.num_gen_batches} generation batches; training on those"
                    )
            sequences = share(sequences)
        return sequences, metrics

    def update(self, sequences: Sequences) -> dict[str, float]:
        """All updates of a step, none if it has no sequences; their metrics together."""
        mini_batches = self.policy.plan(sequences)
        with self.console.phase("log-probs"):
            agreement = self.policy.score(mini_batches)
        if warning := self.agreement.judge(agreement):
            self.console.warn(f"step {self.step}: {warning}")
        with self.console.phase("update"):
            updates = [self.policy.update(mini_batch) for mini_batch in mini_batches]
            gather_parameters(self.policy.chunks)
        return agreement | _over_updates(updates)

    def log_step(self, metrics: dict[str, float], seconds: float) -> None:
        """Write and show one step."""
        if self.metrics is None or self.experience is None or self.report is None:
            return
        self._check_lock()
        metrics |= self.experience.service.end_step()
        metrics |= self.console.take_seconds() | {"seconds_step": seconds}
        metrics["tokens_per_second"] = metrics.get("response_tokens", 0.0) / seconds
        self.report.add_step(self.metrics.log_step(self.step, metrics), self.console.take_spans())
        self.console.step_line(metrics | {"step": self.step})
        if metrics["updates_skipped"]:
            left_out = int(metrics["updates_skipped"])
            self.console.warn(f"step {self.step}: {left_out} updates left out, their gradients are not finite")

    def validate(self) -> None:
        """Accuracy and length on held-out problems."""
        if not self.config.validation.every:
            return
        with self.console.phase("validate") as phase:
            started = time.monotonic()
            validated = self._while_serving(lambda experience: experience.validate(phase))
            seconds = time.monotonic() - started
        self.console.take_seconds()  # they are in no step
        if validated is None or self.metrics is None or self.report is None:
            return
        result, groups = validated
        count = self.config.tracking.samples_per_validation
        keep_samples(self.directory, self.step, groups, count, of="validation")
        which = "after" if self.step else "before"
        # Without any verdict there is no accuracy to remember.
        self.results[f"accuracy_{which}"] = None if math.isnan(result.overall.avg) else result.overall.avg
        self.results[f"response_length_{which}"] = result.overall.response_length_mean
        write_problems(path_of_step(self.directory, self.step), result.problems)
        row = self.metrics.log_validation(self.step, result.metrics() | {"seconds_validate": seconds})
        self.report.add_validation(row, self.console.take_spans())
        self.console.validation(self.step, result)

    def is_due(self, every: int) -> bool:
        """Whether something done every so many steps is due after this one; after the last step it always is."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.run.steps)

    def asked_to_stop(self) -> bool:
        """Whether somebody has put a file named stop into the run's directory, which this removes.

        A file and not a signal: a job's signals reach servers and verifiers too, which would end on them.
        """
        asked = self.first and (self.directory / STOP_FILE).exists()
        if asked:
            (self.directory / STOP_FILE).unlink()
            self.console.note(f"stopping after step {self.step}, as {self.directory / STOP_FILE} asks for")
        return self._on_rank_0(asked)

    def save(self) -> None:
        """Begin a checkpoint of the policy and of the loop; complete when `settle` says so, or at once."""
        self.settle()
        self._check_lock()
        state, arrays = self._by_rank_0(self._loop_state) or ({}, {})
        with self.console.phase("checkpoint"):
            directory, keep = self.directory / "checkpoints", self.config.checkpoint.keep
            try:
                self.saving = checkpoint.start_saving(
                    self.policy, directory, self.step, state, keep, self.model_dir, arrays
                )
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
            if self.first and self.config.checkpoint.keep and self.config.checkpoint.huggingface_every:
                huggingface_directories.prune(self.directory / "huggingface", saved)

    def _not_saved(self, error: CheckpointError) -> None:
        """What `checkpoint.on_error` says of a checkpoint that could not be written."""
        if self.config.checkpoint.on_error == "stop":
            raise error
        self.console.warn(f"{error}; the run goes on without it, as checkpoint.on_error=warn says")

    def _abandon_saving(self) -> None:
        """On the way out of a run that failed or is stopped by a signal: the last complete checkpoint stays."""
        if self.saving is not None:
            self.saving.abandon()

    def _save_huggingface(self, saved: Path) -> None:
        """Write the policy beside its checkpoint as a Hugging Face directory, if that is due."""
        directory = self.directory / "huggingface"
        if self.is_due(self.config.checkpoint.huggingface_every):
            failure = huggingface_directories.save(self.policy, saved, directory, self.model_dir)
            if failure:
                # The run has lost nothing: the same weights are in the checkpoint.
                remedy = f"python tools/convert_hf.py to-hf {saved} DIRECTORY makes it of the checkpoint"
                self.console.warn(f"step {self.step}: no Hugging Face directory: {failure} ({remedy})")

    def finish(self) -> None:
        """Write what came of the run, and show it."""
        if self.report is None:
            return
        names = [f"{what}_{when}" for what in ("accuracy", "response_length") for when in ("before", "after")]
        summary: dict[str, Any] = {name: self.results.get(name) for name in names}
        summary |= {"steps": self.step, "seconds": self._seconds(), **distinguishing(self.config)}
        write_summary(self.directory, summary)
        self.report.finish(summary["seconds"], self.console.take_spans())
        self.console.finish(summary, self.directory)

    def _make_room(self) -> None:
        """Where servers share the trainer's GPUs, they sleep from here to the next weight update."""
        if self.config.rollout.shared_gpu:
            if self.experience is not None:
                self.experience.make_room()
            self._on_rank_0(False)  # the other ranks wait for it

    def _push(self) -> None:
        """Hand the present weights, which are `version`, to all servers; to their replacements where some fail."""
        if self.config.rollout.shared_gpu:
            platform.release_memory()
        with self.console.phase("weights"):
            while True:
                if self.experience is not None:
                    self.experience.service.admit()
                try:
                    self.transfer.push(export(self.policy.chunks, self.policy.geometry), self.version)
                    return
                except RolloutError:
                    if not self._on_rank_0(self.experience is not None and self.experience.lose_failed()):
                        raise

    def _while_serving(self, work: Callable[[Experience], _T]) -> _T | None:
        """What `work`, which samples, returns on rank 0; the other ranks stand by to revive the servers with it."""
        if self.experience is None:
            while self.stand_by.hear():
                self._push()
            return None
        result = work(self.experience)
        self.stand_by.tell(False)
        return result

    def _revive(self) -> None:
        """Called on rank 0 within `_while_serving` when no server is left: all ranks give restarted ones weights."""
        self.stand_by.tell(True)
        self._push()

    def _on_rank_0(self, fact: bool) -> bool:
        """Rank 0's `fact`, on every rank."""
        told = torch.tensor([fact], dtype=torch.int64)
        torch.distributed.broadcast(told, src=0)
        return bool(told.item())

    def _by_rank_0(self, work: Callable[[], _T]) -> _T | None:
        """What `work` returns on rank 0. What it refuses is refused by every rank.

        The others would else lose rank 0 in the middle of a collective, and tell of that.
        """
        refusal: list[Any] = ["", 0]
        result, refused = None, None
        if self.first:
            try:
                result = work()
            except FipoError as error:
                refusal, refused = [str(error), error.exit_code], error
        torch.distributed.broadcast_object_list(refusal, src=0)
        if refused is not None:
            raise refused
        if refusal[0]:
            raise RefusedOnRank0(*refusal)
        return result

    def _seconds(self) -> float:
        """Seconds of training, those before a resume included, without the start of processes and servers."""
        return self.seconds_before + time.monotonic() - self.started

    def _open_run_files(self, stack: ExitStack) -> None:
        write_config(self.directory, self.config)
        write_environment(self.directory, world_size=torch.distributed.get_world_size())
        self.metrics = MetricsWriter(self.directory, self.config.tracking, self.step)
        stack.callback(self.metrics.close)
        self.report = stack.enter_context(Report(self.directory, self.config, self.console.warn))
        self.experience = stack.enter_context(Experience(self.config, self.model_dir, self.directory, self.console))
        self.console.note(f"problems: {self.experience.problem_counts}")

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

    def _loop_state(self) -> tuple[dict[str, Any], Arrays]:
        assert self.experience is not None, "rank 0 has one"
        state = LoopState(
            step=self.step, seconds=self._seconds(), results=self.results, experience=self.experience.state()
        )
        return loop_state.encode(state)

    def _load_loop(self, path: Path) -> None:
        """Have the loop go on from a checkpoint. DataError with file and key if it cannot; on rank 0."""
        checkpoint.check_version(path)
        assert self.experience is not None, "rank 0 has one"
        state = self.experience.resume(path / checkpoint.TRAINER_STATE, path / checkpoint.TRAINER_ARRAYS, self.step)
        self.seconds_before, self.results = state.seconds, state.results


def _over_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """A step's metrics from its updates': least, greatest, sum or mean by name; ppo_kl of the first by itself."""
    collected: dict[str, list[float]] = defaultdict(list)
    for metrics in updates:
        for name, value in metrics.items():
            collected[name].append(value)
    combined: dict[str, float] = {"updates": float(len(updates)), "updates_skipped": 0.0}
    for name, values in collected.items():
        if name.endswith("_min"):
            combined[name] = min(values)
        elif name.endswith("_max"):
            combined[name] = max(values)
        elif name in ("updates_skipped", "tokens_trained", "responses_dropped"):
            combined[name] = sum(values)
        else:
            combined[name] = sum(values) / len(values)
    if updates:
        combined["ppo_kl_first"] = updates[0]["ppo_kl"]
    return combined
