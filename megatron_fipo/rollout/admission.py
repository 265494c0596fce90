"""How many tickets to open, and which make the next batch: pure functions of the ledger, without clock or tokens.

`Rounds` and `Refill` are synchronous: whole generation batches, as the published recipes have them, or a slot refilled
as soon as its group is rejected. `Window` keeps engines busy while the policy is updated, and bounds how stale what is
trained on can be.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_fipo.config import AlgorithmConfig
from megatron_fipo.errors import RolloutError
from megatron_fipo.rollout.ledger import STOPPED, SURPLUS, Ledger, State, Ticket


@dataclass(frozen=True)
class Take:
    """The next batch."""

    tickets: Sequence[Ticket]
    """By number, at most as many as a step trains on; fewer, possibly none, when `gave_up`."""
    surplus: Sequence[Ticket] = ()
    """READY tickets that no later step is to have."""
    stopped: Sequence[Ticket] = ()
    """Tickets that are still sampled, and not needed."""
    gave_up: bool = False
    """The batch is not full, and nothing more is sampled for it."""


class Admission(Protocol):
    """Decides by the ledger alone, and changes nothing."""

    @property
    def prompts_per_step(self) -> int:
        """Tickets of a full batch."""

    def admit(self, ledger: Ledger) -> int:
        """Tickets to open now."""

    def take(self, ledger: Ledger) -> Take | None:
        """The next batch, once it is there. RolloutError: it will never be."""

    def generation_batches(self, ledger: Ledger) -> float:
        """How many have been sampled for this step, or as many prompts as that."""


@dataclass(frozen=True)
class Rounds:
    """Generation batches until a step is full; each ends before the next one begins, and before anything is taken.

    A step that is not full after `most_rounds` trains on what it has, where DAPO's released code ends the run. READY
    tickets beyond the step are the next one's, or its surplus unless `carries_surplus`.
    """

    prompts_per_step: int
    batch: int
    most_rounds: int
    carries_surplus: bool

    def admit(self, ledger: Ledger) -> int:
        """A generation batch, if the step is not full and has batches left."""
        if ledger.has_batch_out or _unfinished(ledger) or self.generation_batches(ledger) >= self.most_rounds:
            return 0
        return self.batch if len(ledger.tickets(State.READY)) < self.prompts_per_step else 0

    def take(self, ledger: Ledger) -> Take | None:
        """The oldest READY tickets, once no generation batch is to come."""
        if ledger.has_batch_out or _unfinished(ledger) or self.admit(ledger):
            return None
        ready = ledger.tickets(State.READY)
        chosen, beyond = ready[: self.prompts_per_step], ready[self.prompts_per_step :]
        return Take(chosen, () if self.carries_surplus else beyond, gave_up=len(chosen) < self.prompts_per_step)

    def generation_batches(self, ledger: Ledger) -> float:
        """Whole ones; as many prompts where a resume has another admission."""
        return -(-ledger.step.opened // self.batch)


@dataclass(frozen=True)
class Refill:
    """As many tickets at a time as a step probably needs; a rejected one is replaced at once. k = 0.

    For each group that the step lacks, `over_sampling` tickets are under way. The oldest P tickets that are not
    rejected are the batch, once all are READY: which they are depends on no clock, and a long response is waited for.
    The tickets after them are stopped, or carried where they are READY and `carries_surplus`. Nothing runs during an
    update.
    """

    prompts_per_step: int
    over_sampling: float
    most_rejected: int
    """In one step. After them it trains on what it has."""
    carries_surplus: bool

    def admit(self, ledger: Ledger) -> int:
        """As many as the step lacks, times `over_sampling`, less those that are being sampled."""
        if ledger.has_batch_out or self._gives_up(ledger):
            return 0
        lacking = self.prompts_per_step - len(ledger.tickets(State.READY))
        return max(0, math.ceil(self.over_sampling * lacking) - len(_unfinished(ledger)))

    def take(self, ledger: Ledger) -> Take | None:
        """The oldest tickets, once they are a full batch and all READY."""
        if ledger.has_batch_out:
            return None
        if gave_up := self._gives_up(ledger):
            chosen = ledger.tickets(State.READY)[: self.prompts_per_step]
        elif not (chosen := _oldest_if_ready(ledger, self.prompts_per_step)):
            return None
        beyond = [ticket for ticket in ledger.tickets(State.READY) if ticket not in chosen]
        surplus = () if self.carries_surplus else beyond
        return Take(chosen, surplus, _unfinished(ledger), gave_up and len(chosen) < self.prompts_per_step)

    def generation_batches(self, ledger: Ledger) -> float:
        """By the number of prompts."""
        return ledger.step.opened / self.prompts_per_step

    def _gives_up(self, ledger: Ledger) -> bool:
        return _filtered(ledger) >= self.most_rejected


@dataclass(frozen=True)
class Window:
    """So many tickets at a time that each trains at most `max_off_policy_steps` (k) versions after its opening.

    With P prompts per step there are (k + 1) P slots. A slot is held until the ticket is rejected, has failed, or the
    weights of its step are published. Batches are taken in strict order of numbers. So at most (k + 1) P − 1 older
    tickets train before one, and its lag is at most k; at k = 0 nothing runs during an update.

    With `over_sampling`, so many tickets are under way for each slot that no judged one has, since most filters reject
    many. Where fewer are rejected, those that would train too late are stopped when a batch is taken: the last of those
    that were opened together, however long their responses are.
    """

    prompts_per_step: int
    max_off_policy_steps: int
    most_rejected: int | None = None
    """In one step. A short batch in place of an error would break the bound."""
    over_sampling: float = 1.0

    def admit(self, ledger: Ledger) -> int:
        """As many as there are free slots; none where a resume has fewer slots than there are tickets."""
        unfinished = len(_unfinished(ledger))
        free = (self.max_off_policy_steps + 1) * self.prompts_per_step - (len(ledger) - unfinished)
        return max(0, math.ceil(self.over_sampling * free) - unfinished)

    def take(self, ledger: Ledger) -> Take | None:
        """The oldest tickets, once they are a full batch and all READY."""
        if ledger.has_batch_out:
            return None
        if oldest := _oldest_if_ready(ledger, self.prompts_per_step):
            return Take(oldest, *self._too_late(ledger, oldest))
        if self.most_rejected is not None and _filtered(ledger) >= self.most_rejected:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(ledger.step.rejected.items()))
            raise RolloutError(
                f"{_filtered(ledger)} groups were rejected in one step ({counts}), the most that "
                "algorithm.filter_groups.max_num_gen_batches allows: the problems are too easy or too hard"
            )
        return None

    def generation_batches(self, ledger: Ledger) -> float:
        """By the number of prompts."""
        return ledger.step.opened / self.prompts_per_step

    def _too_late(self, ledger: Ledger, chosen: Sequence[Ticket]) -> tuple[list[Ticket], list[Ticket]]:
        """Tickets that no batch after the chosen one may train on: READY ones, and others."""
        if self.over_sampling == 1:
            return [], []  # none by the number of slots; after a resume with fewer, what there is trains all the same
        newest, oldest_allowed = chosen[-1].number, ledger.version - self.max_off_policy_steps + 1
        ready, unfinished = ledger.tickets(State.READY), _unfinished(ledger)
        late = [ticket for ticket in ready if ticket.number > newest and ticket.start_version < oldest_allowed]
        return late, [ticket for ticket in unfinished if ticket.start_version < oldest_allowed]


def certain(ledger: Ledger, prompts_per_step: int) -> list[Ticket]:
    """The first tickets of the next batch, as far as they are in it whatever is still to come.

    READY tickets before the first that is still being sampled: each admission takes batches in the order of numbers.
    """
    if ledger.has_batch_out:
        return []
    ready, unfinished = ledger.tickets(State.READY)[:prompts_per_step], _unfinished(ledger)
    return [ticket for ticket in ready if not unfinished or ticket.number < unfinished[0].number]


def admission_of(algorithm: AlgorithmConfig, max_off_policy_steps: int) -> Admission:
    """The admission that the configuration asks for."""
    prompts, filtered = algorithm.prompts_per_step, algorithm.filter_groups
    most, carries = filtered.max_num_gen_batches, filtered.surplus == "carry"
    if max_off_policy_steps:
        # The first step fills the whole window.
        most_rejected = (max_off_policy_steps + 1) * most * prompts
        return Window(prompts, max_off_policy_steps, most_rejected, filtered.over_sampling or 1.0)
    if filtered.enable and filtered.over_sampling is not None:
        return Refill(prompts, filtered.over_sampling, most * prompts, carries)
    return rounds(algorithm)


def rounds(algorithm: AlgorithmConfig) -> Rounds:
    """The rounds that the configuration asks for, where it asks for none of the others."""
    filtered = algorithm.filter_groups
    batch = algorithm.generation_batch_prompts if filtered.enable else None
    return Rounds(
        algorithm.prompts_per_step,
        batch or algorithm.prompts_per_step,
        filtered.max_num_gen_batches,
        filtered.surplus == "carry",
    )


def _oldest_if_ready(ledger: Ledger, count: int) -> list[Ticket]:
    """The oldest `count` tickets, if there are so many and all are READY; else none."""
    oldest = ledger.tickets()[:count]
    return oldest if len(oldest) == count and oldest == ledger.tickets(State.READY)[:count] else []


def _filtered(ledger: Ledger) -> int:
    """Groups of the step that taught nothing."""
    return sum(count for reason, count in ledger.step.rejected.items() if reason not in (SURPLUS, STOPPED))


def _unfinished(ledger: Ledger) -> list[Ticket]:
    return ledger.tickets(State.OPEN, State.RUNNING, State.SCORED)
