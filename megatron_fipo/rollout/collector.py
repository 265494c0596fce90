"""Tickets in, judged groups out: which problems are sampled, and which of their groups make the next batch.

Knows neither servers nor terminals: how groups come about is a function that it is given. Between two steps its state
is the prompt order, the ledger, and the groups that wait for a step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from msgspec import Struct

from megatron_fipo.data.order import OrderState, PromptSampler
from megatron_fipo.errors import DataError, RolloutError
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.sample import Group
from megatron_fipo.rollout.admission import Admission
from megatron_fipo.rollout.events import Steps
from megatron_fipo.rollout.filters import GroupFilter
from megatron_fipo.rollout.ledger import SURPLUS, Ledger, LedgerState, State, StepCounts, Ticket

SampleGroups = Callable[[Sequence[Problem], Sequence[int]], Steps[Sequence[Group]]]
"""Samples and judges a group for each problem, under its seed; they come back in the problems' order."""


@dataclass(frozen=True)
class Batch:
    """What one step trains on."""

    tickets: Sequence[Ticket]
    groups: Sequence[Group]
    """The tickets', in their order; fewer than a step has room for, possibly none, when `gave_up`."""
    sampled: Sequence[Group]
    """All that was sampled since the batch before, trained on or not."""
    counts: StepCounts
    left: int
    """Tickets that have not ended and are not in the batch."""
    gave_up: bool


class CollectorState(Struct, frozen=True):
    """A collector between two steps, or in the middle of one. Made of references: all in it is immutable."""

    order: OrderState
    ledger: LedgerState
    groups: Mapping[int, Group]
    """Those of READY tickets, by number."""


class RolloutCollector:
    """All prompts of a run, from being drawn to being trained on."""

    def __init__(
        self,
        problems: Sequence[Problem],
        prompts: PromptSampler,
        admission: Admission,
        reject: GroupFilter,
        sample: SampleGroups,
        seed_of: Callable[[int], int],
    ):
        """`seed_of` gives the seed of a ticket's number."""
        self._prompts, self._admission, self._reject = prompts, admission, reject
        self._sample_groups, self._seed_of = sample, seed_of
        self._drawn_from = problems
        self._by_id = {problem.id: problem for problem in problems}
        self._ledger = Ledger()
        self._groups: dict[int, Group] = {}
        self._sampled: list[Group] = []
        self._settled = self.snapshot()

    def next_batch(self) -> Steps[Batch]:
        """Sample until admission says that a batch is there."""
        while (batch := self._take()) is None:
            count = self._admission.admit(self._ledger)
            drawn = [self._drawn_from[index] for index in self._prompts.take(count)]
            if drawn:
                self._ledger.open([problem.id for problem in drawn], self._seed_of)
            if not (waiting := self._ledger.tickets(State.OPEN)):
                raise RolloutError(f"no batch is there, and none of {len(self._ledger)} tickets waits to be sampled")
            yield from self._collect(waiting)
        return batch

    def give_back(self) -> None:
        """Nothing of the batch was trained: it is the next one again."""
        self._ledger.give_back()

    def settle(self, version: int) -> list[Ticket]:
        """The engines have the weights `version`: those after the step of the batch that was taken, if one was.

        Returns:
            The tickets that were trained.

        Raises:
            RolloutError: the ledger does not add up.
        """
        trained = self._ledger.settle(version)
        for ticket in trained:
            del self._groups[ticket.number]
        self._settled = self.snapshot()
        return trained

    def undo(self) -> None:
        """Stand where the last `settle` or `restore` left it: what was begun since is dropped."""
        self.restore(self._settled)

    def metrics(self) -> dict[str, float]:
        """Tickets of the run so far, by how they ended."""
        return self._ledger.metrics()

    def snapshot(self) -> CollectorState:
        """The present state. RolloutError if the ledger does not add up."""
        ledger = self._ledger.state()
        ready = {ticket.number: self._groups[ticket.number] for ticket, at in ledger.tickets if at is State.READY}
        return CollectorState(self._prompts.state(), ledger, ready)

    def restore(self, state: CollectorState, *, new_order: bool = False, discard: bool = False) -> int:
        """Go on where `state` stood: no problem skipped, none repeated.

        Args:
            state: a snapshot, of this process or another.
            new_order: the data or its order is another one, of which a new epoch begins.
            discard: end all tickets that have not ended. Their problems, if the data has them, come next.

        Returns:
            How many tickets were discarded.

        Raises:
            DataError: it belongs to other data or another order.
            RolloutError: its ledger does not add up.
        """
        lacking = [
            ticket for ticket, at in state.ledger.tickets if at is State.OPEN and ticket.problem not in self._by_id
        ]
        if lacking and not discard:
            raise DataError(
                f"ticket {lacking[0].number} is for the problem {lacking[0].problem}, which the data lacks "
                "(checkpoint.in_flight=discard resumes without it)"
            )
        if new_order:
            self._prompts.start_over(state.order)
        else:
            self._prompts.load(state.order)
        self._ledger.load(state.ledger)
        self._groups, self._sampled = dict(state.groups), []
        discarded = self._ledger.discard_all() if discard else []
        if discarded:
            places = {problem.id: place for place, problem in enumerate(self._drawn_from)}
            self._prompts.put_back([places[ticket.problem] for ticket in discarded if ticket.problem in places])
            self._groups = {}
        self._settled = self.snapshot()
        return len(discarded)

    def _collect(self, tickets: Sequence[Ticket]) -> Steps[None]:
        for ticket in tickets:
            self._ledger.start(ticket)
        problems = [self._by_id[ticket.problem] for ticket in tickets]
        groups = yield from self._sample_groups(problems, [ticket.seed for ticket in tickets])
        # In the order of their numbers, so that a run repeats.
        for ticket, group in zip(tickets, groups, strict=True):
            reason = self._reject(group)
            if self._ledger.scored(ticket, reason):
                self._sampled.append(group)
                if reason is None:
                    self._groups[ticket.number] = group

    def _take(self) -> Batch | None:
        if (taken := self._admission.take(self._ledger)) is None:
            return None
        self._ledger.take(taken.tickets)
        for ticket in taken.surplus:
            self._ledger.reject(ticket, SURPLUS)
            del self._groups[ticket.number]
        sampled, self._sampled = self._sampled, []
        groups = [self._groups[ticket.number] for ticket in taken.tickets]
        left = len(self._ledger) - len(taken.tickets)
        return Batch(taken.tickets, groups, sampled, self._ledger.step, left, taken.gave_up)
