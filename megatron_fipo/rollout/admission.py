"""How many tickets to open, and which make the next batch: pure functions of the ledger, without clock or tokens.

`Rounds` is synchronous: whole generation batches, as the published recipes have them. `Window` keeps engines busy while
the policy is updated, and bounds how stale what is trained on can be.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_fipo.config import AlgorithmConfig
from megatron_fipo.rollout.ledger import Ledger, State, Ticket


@dataclass(frozen=True)
class Take:
    """The next batch."""

    tickets: Sequence[Ticket]
    """By number, at most as many as a step trains on; fewer, possibly none, when `gave_up`."""
    surplus: Sequence[Ticket] = ()
    """READY tickets that no later step is to have."""
    gave_up: bool = False
    """The batch is not full, and nothing more is sampled for it."""


class Admission(Protocol):
    """Decides by the ledger alone, and changes nothing."""

    def admit(self, ledger: Ledger) -> int:
        """Tickets to open now."""

    def take(self, ledger: Ledger) -> Take | None:
        """The next batch, once it is there."""


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
        if ledger.has_batch_out or _unfinished(ledger) or ledger.step.rounds >= self.most_rounds:
            return 0
        return self.batch if len(ledger.tickets(State.READY)) < self.prompts_per_step else 0

    def take(self, ledger: Ledger) -> Take | None:
        """The oldest READY tickets, once no generation batch is to come."""
        if ledger.has_batch_out or _unfinished(ledger) or self.admit(ledger):
            return None
        ready = ledger.tickets(State.READY)
        chosen, beyond = ready[: self.prompts_per_step], ready[self.prompts_per_step :]
        return Take(chosen, () if self.carries_surplus else beyond, gave_up=len(chosen) < self.prompts_per_step)


@dataclass(frozen=True)
class Window:
    """So many tickets at a time that each trains at most `max_off_policy_steps` (k) versions after its opening.

    With P prompts per step there are (k + 1) P slots. A slot is held until the ticket is rejected, has failed, or the
    weights of its step are published. Batches are taken in strict order of numbers. So at most (k + 1) P − 1 older
    tickets train before one, and its lag is at most k; at k = 0 nothing runs during an update.
    """

    prompts_per_step: int
    max_off_policy_steps: int

    def admit(self, ledger: Ledger) -> int:
        """As many as there are free slots; none where a resume has fewer slots than there are tickets."""
        return max(0, (self.max_off_policy_steps + 1) * self.prompts_per_step - len(ledger))

    def take(self, ledger: Ledger) -> Take | None:
        """The oldest tickets, once they are a full batch and all READY."""
        oldest = ledger.tickets()[: self.prompts_per_step]
        if ledger.has_batch_out or len(oldest) < self.prompts_per_step or oldest != self._ready(ledger):
            return None
        return Take(oldest)

    def _ready(self, ledger: Ledger) -> list[Ticket]:
        return ledger.tickets(State.READY)[: self.prompts_per_step]


def rounds(algorithm: AlgorithmConfig) -> Rounds:
    """The rounds that the configuration asks for."""
    filtered = algorithm.filter_groups
    batch = algorithm.generation_batch_prompts if filtered.enable else None
    return Rounds(
        algorithm.prompts_per_step,
        batch or algorithm.prompts_per_step,
        filtered.max_num_gen_batches,
        filtered.surplus == "carry",
    )


def _unfinished(ledger: Ledger) -> bool:
    return bool(ledger.tickets(State.OPEN, State.RUNNING, State.SCORED))
