"""A run's rollouts behind the calls of link.py: servers, verifiers, the collector, the store of what it has sampled."""

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from megatron_fipo import loop_state
from megatron_fipo.config import Config
from megatron_fipo.engines.control import EngineControl
from megatron_fipo.errors import CheckpointError, one_line
from megatron_fipo.records.sample import Group
from megatron_fipo.rollout import snapshot
from megatron_fipo.rollout.collector import Batch
from megatron_fipo.rollout.events import PartReady, Ready, WeightsWanted
from megatron_fipo.rollout.listener import Listener, Progress
from megatron_fipo.rollout.main_loop import MainLoop
from megatron_fipo.rollout.offers import Offers
from megatron_fipo.rollout.ongoing import Ongoing
from megatron_fipo.rollout.snapshot import Encoded
from megatron_fipo.rollout.training_rollouts import TrainingRollouts
from megatron_fipo.rollout_process.credit_log import CreditLog
from megatron_fipo.rollout_process.link import Offer, Resumed
from megatron_fipo.tracking.phases import compiled_markers, phase_metrics
from megatron_fipo.tracking.problem_files import path_of_step, write_problems
from megatron_fipo.tracking.rollout_log import log_rollouts
from megatron_fipo.tracking.sampling import sampling_metrics
from megatron_fipo.tracking.validation import ValidationResult, score
from megatron_fipo.weights.deadline import Deadline
from megatron_fipo.weights.transport_records import BucketHeader, JoinRequest, WorkerPlace


class RolloutService:
    """Implements `link.RolloutCalls`. All calls come from one thread, but for `write_snapshot`."""

    def __init__(
        self,
        config: Config,
        model_dir: Path,
        run_dir: Path,
        listener: Listener,
        progress: Progress,
        loop: MainLoop | None = None,
    ):
        """Load the problems, see that rewards can be had, and start servers, without waiting for them.

        `progress` hears how far `wait` is. What overlaps with training is sampled whenever `loop` turns.
        """
        self._config, self._run_dir, self._listener, self._progress = config, run_dir, listener, progress
        self._stack = ExitStack()
        self._loop = loop or MainLoop()
        self._stack.callback(self._loop.close)
        self._rollouts = self._stack.enter_context(TrainingRollouts(config, model_dir, run_dir, listener, self._loop))
        self._offers = self._stack.enter_context(Offers(config.algorithm, listener.warn))
        self._credit = CreditLog(config, run_dir, self._rollouts.tokenizer.decode)
        self._control = EngineControl(self._rollouts.pool)
        self._step = self._weight_version = 0
        self._batch: Ongoing[Batch] | None = None
        self._validation: Ongoing[list[Group]] | None = None
        """What is being sampled: one of the two."""
        self._snapshots: dict[int, Encoded] = {}
        self._numbers = itertools.count()
        self._markers = compiled_markers(config.tracking)
        listener.note(f"problems: {self._rollouts.problem_counts}")

    def connect(self) -> None:
        self._rollouts.connect()

    def make_room(self) -> None:
        self._rollouts.make_room()

    def replace_failed(self) -> bool:
        return self._rollouts.replace_failed()

    def begin_batch(self, step: int, weight_version: int) -> None:
        self._step, self._weight_version = step, weight_version
        self._credit.begin(step)
        self._batch, self._validation = self._rollouts.begin_batch(self._progress), None

    def begin_validation(self, step: int) -> None:
        self._step = step
        self._batch, self._validation = None, self._rollouts.begin_validation(self._progress)

    def wait(self) -> Ready | PartReady | WeightsWanted:
        if self._batch is not None:
            return self._batch.wait(self._rollouts.part_ready)
        assert self._validation is not None, "something is begun first"
        return self._validation.wait()

    def part(self) -> bytes:
        return self._offer(self._rollouts.part())

    def break_wait(self) -> None:
        """Have a `wait` that is under way end with asyncio.CancelledError. In the loop's thread, while it turns."""
        if ongoing := self._batch or self._validation:
            ongoing.cancel()

    def taken(self) -> Offer:
        assert self._batch is not None, "a batch is begun first"
        taken, wanted = self._batch.result, self._config.algorithm.prompts_per_step
        self._log(taken.sampled, self._config.tracking.samples_per_step, "step")
        if taken.gave_up:
            self._listener.warn(
                f"step {self._step}: {len(taken.groups)} of {wanted} groups after {taken.generation_batches:g} "
                "generation batches; training on those"
            )
        batch = self._offer(taken.groups[taken.in_parts :])
        return Offer(batch, sampling_metrics(taken, self._weight_version) | phase_metrics(taken.sampled, self._markers))

    def validated(self) -> ValidationResult:
        assert self._validation is not None, "a validation is begun first"
        groups = self._validation.result
        self._rollouts.forget_occupancy()  # it is in no step
        result = score(groups, self._config.validation.samples)
        self._log(groups, self._config.tracking.samples_per_validation, "validation")
        write_problems(path_of_step(self._run_dir, self._step), result.problems)
        return result

    def give_back(self, reason: str) -> bytes:
        return self._offers.give_back(reason)

    def fetched(self) -> None:
        self._offers.fetched()

    def settle(self, version: int) -> None:
        self._rollouts.settle(version)

    def break_off(self) -> None:
        self.break_wait()
        self._rollouts.break_off()

    def record_credit(self, frames: list[bytes]) -> None:
        try:
            self._credit.write(frames)
        except Exception as error:  # what is only looked at ends no run, whatever the file's library raises
            self._listener.warn(f"step {self._step}: credit is not recorded: {type(error).__name__}: {one_line(error)}")

    def busy(self) -> list[tuple[float, float]]:
        return self._rollouts.busy()

    def end_step(self) -> dict[str, int | float]:
        return self._rollouts.end_step()

    def snapshot(self) -> int:
        number, encoded = next(self._numbers), snapshot.encode(self._rollouts.snapshot())
        self._snapshots.clear()  # of one whose checkpoint came to nothing
        self._snapshots[number] = encoded
        return number

    def write_snapshot(self, number: int, directory: str) -> None:
        try:
            self._snapshots.pop(number).write(Path(directory))
        except OSError as error:
            raise CheckpointError(f"{directory}: {error}") from error

    def resume(self, checkpoint: str, step: int) -> Resumed:
        state = loop_state.resume(Path(checkpoint), step, self._rollouts)
        return Resumed(state.seconds, state.results)

    def close(self) -> None:
        self._stack.close()

    def roster(self) -> int:
        return self._control.roster

    def admit(self) -> None:
        self._control.admit()

    def workers_of_server(self) -> list[tuple[WorkerPlace, ...]]:
        return self._control.workers_of_server

    def pause(self, seconds: float) -> None:
        self._loop.run(self._control.pause(Deadline(seconds)))

    def resume_sampling(self, seconds: float) -> None:
        self._loop.run(self._control.resume(Deadline(seconds)))

    def join_transport(self, requests: list[JoinRequest], seconds: float) -> None:
        self._loop.run(self._control.join_transport(requests, Deadline(seconds)))

    def start_weight_update(self, seconds: float) -> None:
        self._loop.run(self._control.start_weight_update(Deadline(seconds)))

    def update_weights(self, header: BucketHeader, seconds: float) -> None:
        self._loop.run(self._control.update_weights(header, Deadline(seconds)))

    def finish_weight_update(self, version: int, seconds: float) -> None:
        self._loop.run(self._control.finish_weight_update(version, Deadline(seconds)))

    def score(self, token_ids: list[int], seconds: float) -> dict[str, list[float | None]]:
        return self._loop.run(self._control.score(token_ids, Deadline(seconds)))

    def _offer(self, groups: Sequence[Group]) -> bytes:
        rows = self._credit.choose(groups)
        frame = self._offers.offer(groups, self._step, self._weight_version, rows)
        found = self._offers.offered.rows
        self._credit.mark(groups, rows, found["sample"].tolist(), found["advantage"].tolist())
        return frame

    def _log(self, groups: Sequence[Group], count: int, of: Literal["step", "validation"]) -> None:
        log_rollouts(self._run_dir, self._step, groups, count, self._rollouts.tokenizer.decode, of)
