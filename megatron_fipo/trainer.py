"""The parts of a step, over the parts of a run. Every method is called by every rank together.

assembly.py makes a Trainer, train.py has the loop. What only rank 0 has (runs/leader.py) is None elsewhere.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from megatron_fipo import loop_state
from megatron_fipo.config import Config
from megatron_fipo.credit_page.page import write_credit_page
from megatron_fipo.errors import DataError
from megatron_fipo.launch.local import STOPPED
from megatron_fipo.policy.agreement import AgreementCheck
from megatron_fipo.policy.feed import Feed
from megatron_fipo.policy.finite_updates import FiniteUpdates
from megatron_fipo.policy.micro_batch import MiniBatch
from megatron_fipo.policy.publishing import PolicyPublisher
from megatron_fipo.policy.step import Part, StepData, score_part, train_step
from megatron_fipo.policy.update import Policy
from megatron_fipo.processes.interrupt import CtrlC, Interrupted
from megatron_fipo.rollout.events import BrokenOff, Event, Ready, WeightsWanted
from megatron_fipo.rollout_process.link import Offer, RolloutCalls
from megatron_fipo.runs.checkpoints import RunCheckpoints
from megatron_fipo.runs.leader import Leader
from megatron_fipo.runs.sampling_events import SamplingEvents
from megatron_fipo.tracking.console import Console, Span
from megatron_fipo.tracking.credit_file import recorded_steps
from megatron_fipo.tracking.page import CREDIT_PAGE
from megatron_fipo.tracking.panels import ENGINES
from megatron_fipo.tracking.run_files import distinguishing, write_summary
from megatron_fipo.weights.ranks import fact_of_rank_0, only_rank_0

STOP_FILE = "stop"
_T = TypeVar("_T")


@dataclass
class RunProgress:
    """How far a run has come. Changes with each step."""

    step: int
    """Training steps done, and the one that is being done."""
    began: float
    """By time.monotonic: when training began, had it gone on without a break."""
    results: dict[str, float | None]
    """What validations so far have told, by loop_state.RESULTS; on rank 0."""


class Trainer:
    """One run on this rank."""

    def __init__(
        self,
        *,
        config: Config,
        ctrl_c: CtrlC,
        directory: Path,
        console: Console,
        leader: Leader | None,
        policy: Policy,
        feed: Feed,
        publisher: PolicyPublisher,
        checkpoints: RunCheckpoints,
        sampling_events: SamplingEvents,
        agreement: AgreementCheck,
        finite_updates: FiniteUpdates,
        progress: RunProgress,
    ):
        """Every part is ready; the engines have no weights yet."""
        self.config, self.progress = config, progress
        self._ctrl_c, self._directory, self._console, self._leader = ctrl_c, directory, console, leader
        self._policy, self._feed, self._publisher, self._checkpoints = policy, feed, publisher, checkpoints
        self._sampling_events = sampling_events
        self._agreement, self._finite_updates = agreement, finite_updates
        # The version of the present weights is the step that made them.
        self._version = progress.step
        self._published: dict[str, float] = {}
        """Metrics of the last weight update."""

    @property
    def step(self) -> int:
        """Training steps done, or the one that is being done."""
        return self.progress.step

    def push_weights(self) -> None:
        """Hand the present weights to the servers, as version `step`; what that step took has then been trained."""
        self._version = self.step
        self._publish()
        self._on_rank_0(lambda rollouts: rollouts.settle(self._version))

    def begin_step(self) -> None:
        """Count one step more."""
        self.progress.step += 1

    def undo_step(self) -> None:
        """Go back to the end of the step before: nothing of this one has been trained."""
        self.progress.step -= 1
        self._on_rank_0(lambda rollouts: rollouts.break_off())
        if not self.config.rollout.max_off_policy_steps:
            self._console.note(f"Ctrl-C: step {self.step + 1}, half sampled, is dropped; nothing else is lost")
        elif self.step == self._checkpoints.saved_step:
            kept = f"the checkpoint of step {self.step} has" if self.step else "nothing is kept of"
            self._console.note(f"stopped before step {self.step + 1}; {kept} what was sampled for it by then")
        else:
            self._console.note(f"stopped before step {self.step + 1}; what is sampled for it is kept")

    def next_batch(self) -> tuple[StepData | None, dict[str, float]]:
        """What this rank trains on in this step, and rank 0's metrics of how that came about.

        None: a stop, such as Ctrl-C, broke it off.
        """
        parts: list[Part] = []
        with self._console.phase("sample"):
            if not self._is_sampled(lambda rollouts: rollouts.begin_batch(self.step, self._version), parts):
                return None, {}
            if self.config.rollout.shared_gpu:  # the servers sleep from here to the next weight update
                self._on_rank_0(lambda rollouts: rollouts.make_room())
                self._policy.return_to_gpu()
            offer: Offer | None = self._on_rank_0(lambda rollouts: rollouts.taken())
            mini_batches = self._fetch(offer.batch if offer else None)
        return StepData(parts, mini_batches), dict(offer.metrics) if offer else {}

    def update(self, data: StepData) -> dict[str, float]:
        """All updates of a step, none if it has no sequences; their metrics together."""

        def warn(text: str) -> None:
            self._console.warn(f"step {self.step}: {text}")

        metrics = train_step(self._policy, data, self._agreement, self._console.phase, warn)
        self._record_credit()
        if warning := self._finite_updates.judge(metrics):
            warn(warning)
        return metrics

    def log_step(self, metrics: dict[str, float], seconds: float) -> None:
        """Write and show one step."""
        told = self._on_rank_0(lambda rollouts: (rollouts.end_step(), rollouts.busy()))
        if (leader := self._leader) is None or told is None:
            return
        leader.check_lock()
        sampled, busy = told
        metrics |= sampled | self._published
        metrics |= self._console.take_seconds() | {"seconds_step": seconds}
        metrics["tokens_per_second"] = metrics.get("response_tokens", 0.0) / seconds
        sampling = [Span(ENGINES, *stretch) for stretch in busy]
        leader.report.add_step(leader.metrics.log_step(self.step, metrics), [*self._console.take_spans(), *sampling])
        self._console.step_line(metrics | {"step": self.step})

    def lacks_validation(self) -> bool:
        """Whether held-out accuracy is due now, at the start: before the first step, or where a stop broke it off."""
        every, leader = self.config.validation.every, self._leader
        due = every > 0 and (self.step == 0 or self.is_due(every))
        return fact_of_rank_0(due and leader is not None and not leader.metrics.has_validation(self.step))

    def validate(self) -> None:
        """Accuracy and length on held-out problems."""
        if not self.config.validation.every:
            return
        with self._console.phase("validate"):
            started = time.monotonic()
            broken_off = not self._is_sampled(lambda rollouts: rollouts.begin_validation(self.step), [])
            seconds = time.monotonic() - started
        self._console.take_seconds()  # they are in no step
        if broken_off:
            self._console.note(f"stopped: the validation after step {self.step} is broken off; a resume does it again")
            return
        if (leader := self._leader) is None:
            return
        result = leader.rollouts.validated()
        which = "after" if self.step else "before"
        # Without any verdict there is no accuracy to remember.
        self.progress.results[f"accuracy_{which}"] = None if math.isnan(result.overall.avg) else result.overall.avg
        self.progress.results[f"response_length_{which}"] = result.overall.response_length_mean
        row = leader.metrics.log_validation(self.step, result.metrics() | {"seconds_validate": seconds})
        leader.report.add_validation(row, self._console.take_spans())
        self._console.validation(self.step, result)

    def is_due(self, every: int) -> bool:
        """Whether something done every so many steps is due after this one; after the last step it always is."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.run.steps)

    def asked_to_stop(self) -> bool:
        """Whether to stop before the last step: a Ctrl-C, or a file named stop in the run's directory."""
        if self.step == self.config.run.steps and not self.lacks_validation():
            return False
        file = self._directory / STOP_FILE
        if by_file := self._leader is not None and file.exists():
            self._console.note(f"stopping after step {self.step}, as {file} asks for")
        return fact_of_rank_0(by_file or self._ctrl_c.asked)

    def stop(self) -> NoReturn:
        """Save what no checkpoint has yet, and end this process in peace. The file that asked for it is removed."""
        self._on_rank_0(lambda _: (self._directory / STOP_FILE).unlink(missing_ok=True))
        self.settle()
        if self.step > 0 and self._checkpoints.saved_step != self.step:
            self.save()
            self.settle()
        sys.exit(STOPPED)

    def save(self) -> None:
        """Begin a checkpoint of the policy and of the loop; complete when `settle` says so, or at once."""
        with_huggingface = self.is_due(self.config.checkpoint.huggingface_every)
        self._checkpoints.save(self.step, self._seconds(), self.progress.results, with_huggingface=with_huggingface)

    def settle(self, *, wait: bool = True) -> None:
        """Put the checkpoint that is being written in its place, if there is one: now, or if that is no wait."""
        self._checkpoints.settle(wait=wait)

    def finish(self) -> None:
        """Write what came of the run, and show it."""
        if (leader := self._leader) is None:
            return
        summary: dict[str, Any] = {name: self.progress.results.get(name) for name in loop_state.RESULTS}
        summary |= {"steps": self.step, "seconds": self._seconds(), **distinguishing(self.config)}
        write_summary(self._directory, summary)
        self._write_credit_page()
        leader.report.finish(summary["seconds"], self._console.take_spans())
        self._console.finish(summary, self._directory)

    def _on_rank_0(self, call: Callable[[RolloutCalls], _T]) -> _T | None:
        """What rank 0's rollouts answer to a call, there; None elsewhere. A failure is every rank's."""
        leader = self._leader
        return only_rank_0(lambda: call(leader.rollouts) if leader else None)

    def _record_credit(self) -> None:
        """Have the values per token that this step's updates kept written to the run's directory, if there are any."""
        if self._policy.credit is None:
            return
        with self._console.phase("update"):
            frames = self._policy.credit.collect()
            self._on_rank_0(lambda rollouts: rollouts.record_credit(frames) if frames else None)

    def _write_credit_page(self) -> None:
        """Write the page of the last step that is recorded, to which the report then has a link."""
        if not (steps := recorded_steps(self._directory)):
            return
        try:
            write_credit_page(self._directory, steps[-1])
        except (OSError, DataError) as error:
            self._console.warn(f"no {CREDIT_PAGE}: {error}")

    def _publish(self) -> None:
        """Hand the present weights, which are `_version`, to all servers; to their replacements where some fail."""
        leader = self._leader
        with self._console.phase("weights"):
            published = self._publisher.publish(
                self._version, lambda: leader is not None and leader.rollouts.replace_failed()
            )
        with self._console.phase("log-probs"):
            self._published = published | self._publisher.probe()

    def _is_sampled(self, begin: Callable[[RolloutCalls], None], parts: list[Part]) -> bool:
        """Wait until what rank 0 has begun to sample is there, and give weights to servers that start again meanwhile.

        The one place where the trainer waits for sampling. `parts` gets what is certain of a batch before it is whole,
        with its old log-probs. False after a stop. FipoError, on every rank: it cannot go on.
        """
        event = self._sampling_events.next(lambda: self._next_event(begin))
        while not isinstance(event, Ready | BrokenOff):
            if isinstance(event, WeightsWanted):
                self._publish()
            else:
                parts.append(self._next_part(is_first=not parts))
            event = self._sampling_events.next(self._next_event)
        return isinstance(event, Ready)

    def _next_part(self, *, is_first: bool) -> Part:
        mini_batches = self._fetch(self._on_rank_0(lambda rollouts: rollouts.part()))
        with self._console.phase("log-probs"):
            return score_part(self._policy, mini_batches, self._agreement, is_first=is_first)

    def _fetch(self, frame: bytes | None) -> list[MiniBatch]:
        """This rank's mini-batches of what was offered, which rank 0 has the frame of."""
        return self._feed.get(frame, self._leader.rollouts if self._leader else None, self._policy.plan)

    def _next_event(self, begin: Callable[[RolloutCalls], None] | None = None) -> Event:
        """What sampling says next, on rank 0; `begin` begins it."""
        if self._leader is None:
            return Ready()
        try:
            with self._ctrl_c.breaks():
                if begin is not None:
                    begin(self._leader.rollouts)
                return self._leader.rollouts.wait()
        except Interrupted:
            return BrokenOff()

    def _seconds(self) -> float:
        """Seconds of training, those before a resume included, without the start of processes and servers."""
        return time.monotonic() - self.progress.began
