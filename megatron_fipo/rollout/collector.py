"""Tickets in, judged groups out: which problems are sampled, and which of their groups make the next batch.

Knows neither servers nor terminals: how a group comes about is a function that it is given. Where sampling and training
take turns, its state between two steps is the prompt order, the ledger, and the groups that wait for a step. Where they
overlap, it is what has come of the groups that are being sampled, too.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from msgspec import Struct

from megatron_fipo.data.order import OrderState, PromptSampler
from megatron_fipo.errors import DataError, RolloutError
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.sample import Group
from megatron_fipo.rollout.admission import Admission, certain
from megatron_fipo.rollout.filters import GroupFilter
from megatron_fipo.rollout.ledger import SURPLUS, Ledger, LedgerState, State, StepCounts, Ticket
from megatron_fipo.rollout.work import Begun, Work


@dataclass(frozen=True)
class Sampler:
    """How groups come about."""

    work: Callable[[Problem, int], Work]
    """What a problem asks for, under this seed."""
    judged: Callable[[Work], Awaitable[Group]]
    """Samples what the work lacks, and judges the group."""
    begin: Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]
    """Has a coroutine go on in the event loop."""


@dataclass(frozen=True)
class Batch:
    """What one step trains on."""

    tickets: Sequence[Ticket]
    groups: Sequence[Group]
    """The tickets', in their order; fewer than a step has room for, possibly none, when `gave_up`."""
    sampled: Sequence[Group]
    """All that was sampled since the batch before, trained on or not, in the order of their tickets.

    Where sampling and training overlap, those of tickets up to the batch's last that no batch before had."""
    counts: StepCounts
    generation_batches: float
    left: int
    """Tickets that have not ended and are not in the batch."""
    gave_up: bool
    in_parts: int = 0
    """The first so many groups have been handed over in parts before."""


class CollectorState(Struct, frozen=True):
    """A collector between two steps, or in the middle of one. Made of references: all in it is immutable."""

    order: OrderState
    ledger: LedgerState
    groups: Mapping[int, Group]
    """Those of READY tickets, by number."""
    begun: Mapping[int, Begun] = {}
    """What there is of OPEN ones, by number."""


class RolloutCollector:
    """All prompts of a run, from being drawn to being trained on."""

    def __init__(
        self,
        problems: Sequence[Problem],
        prompts: PromptSampler,
        admission: Admission,
        reject: GroupFilter,
        sampler: Sampler,
        seed_of: Callable[[int], int],
        *,
        overlaps: bool = False,
        part_prompts: int | None = None,
    ):
        """Nothing is opened yet.

        Args:
            seed_of: gives the seed of a ticket's number.
            overlaps: sampling goes on while a batch is trained on.
            part_prompts: a batch is handed over in parts of so many, a multiple of an update's, before it is whole;
                None: in none.
        """
        self._prompts, self._admission, self._reject = prompts, admission, reject
        self._sampler, self._seed_of, self._overlaps = sampler, seed_of, overlaps
        self._drawn_from = problems
        self._places = {problem.id: place for place, problem in enumerate(problems)}
        self._ledger = Ledger()
        self._groups: dict[int, Group] = {}
        self._work: dict[int, Work] = {}
        """Of tickets that are OPEN or RUNNING, as far as anything was asked for."""
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._sampled: dict[int, Group] = {}
        self._failures: list[Exception] = []
        self._changed = asyncio.Event()
        self._part_prompts, self._in_parts = part_prompts, 0
        self.part_ready = asyncio.Event()
        """Set while `part` has something new."""
        self._is_wanted = False
        """Whether a batch has been asked for in this process."""
        self._settled = None if overlaps else self.snapshot()

    async def next_batch(self) -> Batch:
        """Sample until admission says that a batch is there. Raises what a group's sampling does."""
        self._is_wanted = True
        while True:
            self._changed.clear()
            if self._failures:
                raise self._failures[0]
            self._open_and_start()
            if (batch := self._take()) is not None:
                return batch
            if not self._tasks:
                raise RolloutError(f"no batch is there, and none of {len(self._ledger)} tickets waits to be sampled")
            await self._changed.wait()

    def part(self) -> list[Group]:
        """The next groups of the batch that is being sampled, which are in it whatever is still to come."""
        tickets = self._certain_parts()
        groups = [self._groups[ticket.number] for ticket in tickets]
        self._in_parts += len(groups)
        self.part_ready.clear()
        return groups

    def give_back(self) -> None:
        """Nothing of the batch was trained: it is the next one again."""
        self._ledger.give_back()

    def settle(self, version: int, *, opens: bool = True) -> list[Ticket]:
        """The engines have the weights `version`: those after the step of the batch that was taken, if one was.

        Args:
            opens: whether more tickets may be opened at once; none are after the last step.

        Returns:
            The tickets that were trained.

        Raises:
            RolloutError: the ledger does not add up.
        """
        trained = self._ledger.settle(version)
        for ticket in trained:
            del self._groups[ticket.number]
        if not self._overlaps:
            self._settled = self.snapshot()
        elif self._is_wanted and opens:
            self._open_and_start()
        return trained

    async def break_off(self) -> None:
        """Nobody waits for the batch any more: nothing of it has been trained.

        What was begun since the last `settle` or `restore` is dropped where sampling and training take turns. Else
        nothing is.
        """
        if self._settled is not None:
            await self._cancel(list(self._tasks))
            self.restore(self._settled)
        elif self._ledger.has_batch_out:
            self.give_back()
            self._sampled = self._groups | self._sampled
        self._in_parts = 0
        self.part_ready.clear()

    def metrics(self) -> dict[str, float]:
        """Tickets of the run so far, by how they ended."""
        return self._ledger.metrics()

    def snapshot(self) -> CollectorState:
        """The present state. RolloutError if the ledger does not add up."""
        ledger = self._ledger.state()
        ready = {ticket.number: self._groups[ticket.number] for ticket, at in ledger.tickets if at is State.READY}
        begun = {number: found for number, work in sorted(self._work.items()) if (found := work.so_far()).parts}
        return CollectorState(self._prompts.state(), ledger, ready, begun)

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

        Nothing may be sampled meanwhile.
        """
        lacking = [
            ticket for ticket, at in state.ledger.tickets if at is State.OPEN and ticket.problem not in self._places
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
        self._groups, self._failures = dict(state.groups), []
        # Those that were rejected before the checkpoint are known by their number only.
        self._sampled = dict(self._groups) if self._overlaps else {}
        discarded = self._ledger.discard_all() if discard else []
        if discarded:
            self._put_back(discarded)
            self._groups, self._sampled = {}, {}
        self._work = {ticket.number: self._work_of(ticket) for ticket in self._ledger.tickets(State.OPEN)}
        for number, work in self._work.items():
            if number in state.begun:
                _go_on(work, state.begun[number], number)
        if not self._overlaps:
            self._settled = self.snapshot()
        return len(discarded)

    def _open_and_start(self) -> None:
        """Open as many tickets as admission wants, and begin to sample all that are OPEN."""
        count = self._admission.admit(self._ledger)
        drawn = [self._drawn_from[index] for index in self._prompts.take(count)]
        if drawn:
            self._ledger.open([problem.id for problem in drawn], self._seed_of)
        for ticket in self._ledger.tickets(State.OPEN):
            self._ledger.start(ticket)
            if ticket.number not in self._work:
                self._work[ticket.number] = self._work_of(ticket)
            self._tasks[ticket.number] = self._sampler.begin(self._collect(ticket, self._work[ticket.number]))

    def _work_of(self, ticket: Ticket) -> Work:
        return self._sampler.work(self._drawn_from[self._places[ticket.problem]], ticket.seed)

    async def _collect(self, ticket: Ticket, work: Work) -> None:
        """Sample and judge one group. Its slot is free, or it waits for its step, as soon as it is judged."""
        try:
            group = await self._sampler.judged(work)
            reason = self._reject(group)
            if self._ledger.scored(ticket, reason):
                self._sampled[ticket.number] = group
                if reason is None:
                    self._groups[ticket.number] = group
            del self._work[ticket.number], self._tasks[ticket.number]
            if self._certain_parts():
                self.part_ready.set()
            if self._overlaps:
                self._open_and_start()
        except Exception as error:
            self._failures.append(error)
        finally:
            self._changed.set()

    def _take(self) -> Batch | None:
        if (taken := self._admission.take(self._ledger)) is None:
            return None
        batches = self._admission.generation_batches(self._ledger)
        self._ledger.take(taken.tickets)
        for ticket in taken.surplus:
            self._ledger.reject(ticket, SURPLUS)
            del self._groups[ticket.number]
        self._stop(taken.stopped)
        sampled = self._sampled_until(taken.tickets)
        groups = [self._groups[ticket.number] for ticket in taken.tickets]
        left = len(self._ledger) - len(taken.tickets)
        in_parts, self._in_parts = self._in_parts, 0
        self.part_ready.clear()
        return Batch(taken.tickets, groups, sampled, self._ledger.step, batches, left, taken.gave_up, in_parts)

    def _certain_parts(self) -> list[Ticket]:
        """The tickets of the next parts, if these are certain."""
        if self._part_prompts is None:
            return []
        sure = certain(self._ledger, self._admission.prompts_per_step)[self._in_parts :]
        return sure[: len(sure) // self._part_prompts * self._part_prompts]

    def _sampled_until(self, tickets: Sequence[Ticket]) -> list[Group]:
        """See Batch.sampled."""
        last = tickets[-1].number if self._overlaps and tickets else max(self._sampled, default=-1)
        numbers = sorted(number for number in self._sampled if number <= last)
        return [self._sampled.pop(number) for number in numbers]

    def _stop(self, tickets: Sequence[Ticket]) -> None:
        """They are not needed. Their problems come next, under other tickets."""
        for ticket in tickets:
            self._ledger.stop(ticket)
            self._tasks.pop(ticket.number).cancel()
            del self._work[ticket.number]
        self._put_back(tickets)

    def _put_back(self, tickets: Sequence[Ticket]) -> None:
        places = self._places
        self._prompts.put_back([places[ticket.problem] for ticket in tickets if ticket.problem in places])

    async def _cancel(self, numbers: Sequence[int]) -> None:
        tasks = [self._tasks.pop(number) for number in numbers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _go_on(work: Work, begun: Begun, number: int) -> None:
    """Have the work go on with what there is. DataError: that is of another prompt, or of other samples."""
    if not numpy.array_equal(work.problem.token_ids, begun.problem.token_ids):
        raise DataError(
            f"ticket {number} was begun with another prompt of the problem {work.problem.id} than the data has now "
            "(checkpoint.in_flight=discard begins it anew)"
        )
    if beyond := [index for index in begun.parts if index >= work.samples]:
        raise DataError(
            f"ticket {number} has a sample {beyond[0]}, and algorithm.samples_per_prompt is {work.samples} now "
            "(checkpoint.in_flight=discard begins it anew)"
        )
    for index, part in begun.parts.items():
        work.add(index, part)
