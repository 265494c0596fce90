"""Where each prompt stands: every one that is opened is trained once, rejected or failed, and none is lost.

    OPEN → RUNNING → SCORED → READY → TAKEN → TRAINED
    SCORED, READY → REJECTED    its group teaches nothing, or the step has no use for it
    OPEN, RUNNING → REJECTED    stopped, since the step is full without it
    TAKEN → READY               the batch came back before its first update
    RUNNING → OPEN              begins again, as another attempt; a late answer of the one before is discarded
    any of the first five → FAILED

No clock, no tokens, no I/O: a ticket names its problem and its seed, and the groups are the collector's.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace

from megatron_fipo.errors import RolloutError

Count = Annotated[int, Meta(ge=0, le=2**62)]
SURPLUS, STOPPED = "surplus", "stopped"
"""Why a ticket is rejected that no step has room for, judged or not; the others are filters.py's reasons."""


class State(StrEnum):
    """Where a ticket stands that has not ended."""

    OPEN = "open"
    RUNNING = "running"
    SCORED = "scored"
    READY = "ready"
    TAKEN = "taken"


class Ticket(Struct, frozen=True, forbid_unknown_fields=True):
    """One prompt to be sampled. What is sampled for it is a function of the seed and of the weights alone."""

    number: Count
    """From 0 in the order of opening; never used again."""
    problem: str
    """The problem's id."""
    seed: Count
    attempt: Count
    """How often it has begun again."""
    start_version: Count
    """The weights at its opening."""


class Ends(Struct, frozen=True, forbid_unknown_fields=True):
    """How the tickets of a run have ended."""

    trained: Count = 0
    rejected: dict[str, Count] = {}
    """By reason."""
    failed: Count = 0
    discarded: Count = 0
    """At a resume that was told to."""
    unknown: Count = 0
    """Before the run's checkpoints had a ledger."""

    def total(self) -> int:
        """Of any kind."""
        return self.trained + sum(self.rejected.values()) + self.failed + self.discarded + self.unknown


class StepCounts(Struct, frozen=True, forbid_unknown_fields=True):
    """A step's tickets so far: carried_in + opened = rejected + failed + those that have not ended."""

    rounds: Count = 0
    """How often tickets were opened."""
    opened: Count = 0
    carried_in: Count = 0
    """Tickets that were there when it began."""
    rejected: dict[str, Count] = {}
    failed: Count = 0


class LedgerState(Struct, frozen=True, forbid_unknown_fields=True):
    """A ledger for a checkpoint: its tickets are OPEN or READY, as a run that goes on from there has them."""

    next_number: Count
    ends: Ends
    step: StepCounts
    tickets: tuple[tuple[Ticket, State], ...]
    """By number."""


class Ledger:
    """All tickets of a run. `version` is that of the weights that the engines have."""

    def __init__(self) -> None:
        self.version = 0
        self.step = StepCounts()
        self.ends = Ends()
        self.has_batch_out = False
        """Whether a batch has been taken, of however few tickets, that is not settled yet."""
        self._next = 0
        self._entries: dict[int, tuple[Ticket, State]] = {}

    def __len__(self) -> int:
        """Tickets that have not ended."""
        return len(self._entries)

    def tickets(self, *states: State) -> list[Ticket]:
        """Those that stand there, or anywhere if no state is given, by number."""
        chosen = states or tuple(State)
        return [ticket for ticket, state in self._in_order() if state in chosen]

    def is_current(self, ticket: Ticket) -> bool:
        """Whether it has not ended, and is no older attempt."""
        entry = self._entries.get(ticket.number)
        return entry is not None and entry[0] == ticket

    def open(self, problems: Sequence[str], seed_of: Callable[[int], int]) -> list[Ticket]:
        """Tickets for these problems, in order. `seed_of` gives the seed of a number."""
        numbers = range(self._next, self._next + len(problems))
        opened = [
            Ticket(number, problem, seed_of(number), 0, self.version)
            for number, problem in zip(numbers, problems, strict=True)
        ]
        self._next += len(opened)
        self._entries |= {ticket.number: (ticket, State.OPEN) for ticket in opened}
        self.step = replace(self.step, rounds=self.step.rounds + 1, opened=self.step.opened + len(opened))
        return opened

    def start(self, ticket: Ticket) -> None:
        """It is being sampled."""
        self._move(ticket, (State.OPEN,), State.RUNNING)

    def restart(self, ticket: Ticket) -> Ticket:
        """The next attempt, which begins again."""
        self._move(ticket, (State.RUNNING,), State.OPEN)
        again = replace(ticket, attempt=ticket.attempt + 1)
        self._entries[ticket.number] = (again, State.OPEN)
        return again

    def scored(self, ticket: Ticket, reason: str | None) -> bool:
        """Its group is judged. READY, or rejected for `reason`. False: an older attempt, whose group counts nowhere."""
        if not self.is_current(ticket):
            return False
        self._move(ticket, (State.RUNNING,), State.SCORED)
        if reason is None:
            self._move(ticket, (State.SCORED,), State.READY)
        else:
            self.reject(ticket, reason)
        return True

    def reject(self, ticket: Ticket, reason: str) -> None:
        """No step will train on it."""
        self._end(ticket, (State.SCORED, State.READY))
        self._count_rejected(reason)

    def stop(self, ticket: Ticket) -> None:
        """It is not needed, and its sampling does not go on."""
        self._end(ticket, (State.OPEN, State.RUNNING, State.SCORED))
        self._count_rejected(STOPPED)

    def fail(self, ticket: Ticket) -> None:
        """It cannot be sampled."""
        self._end(ticket, tuple(State))
        self.ends = replace(self.ends, failed=self.ends.failed + 1)
        self.step = replace(self.step, failed=self.step.failed + 1)

    def discard_all(self) -> list[Ticket]:
        """End all that have not ended, which are returned by number; the step begins anew. For a resume."""
        discarded = self.tickets()
        self._entries = {}
        self.ends = replace(self.ends, discarded=self.ends.discarded + len(discarded))
        self.step, self.has_batch_out = StepCounts(), False
        return discarded

    def take(self, tickets: Sequence[Ticket]) -> None:
        """They are the next batch."""
        if self.has_batch_out:
            raise RolloutError("a batch was taken before the one before it was settled or given back")
        for ticket in tickets:
            self._move(ticket, (State.READY,), State.TAKEN)
        self.has_batch_out = True

    def give_back(self) -> None:
        """Nothing was trained of the batch that is out; its tickets are READY."""
        for ticket in self.tickets(State.TAKEN):
            self._move(ticket, (State.TAKEN,), State.READY)
        self.has_batch_out = False

    def settle(self, version: int) -> list[Ticket]:
        """The engines have these weights. The tickets of the batch that is out, if there is one: they are TRAINED."""
        trained = self.tickets(State.TAKEN)
        if self.has_batch_out:
            if version <= self.version:
                raise RolloutError(f"a batch was settled as version {version}, after version {self.version}")
            for ticket in trained:
                self._end(ticket, (State.TAKEN,))
            self.ends = replace(self.ends, trained=self.ends.trained + len(trained))
            self.step = StepCounts(carried_in=len(self._entries))
            self.has_batch_out = False
        self.version = version
        self.check()
        return trained

    def state(self) -> LedgerState:
        """For a checkpoint. Another process cannot hear the answers to this one's requests: they begin again."""
        self.check()
        return LedgerState(self._next, self.ends, self.step, tuple(_resumed(*entry) for entry in self._in_order()))

    def load(self, state: LedgerState) -> None:
        """Stand where `state` was taken, without a batch out. RolloutError if it cannot be one."""
        loaded = Ledger()
        loaded.version, loaded.step, loaded.ends, loaded._next = self.version, state.step, state.ends, state.next_number
        for ticket, where in state.tickets:
            if where not in (State.OPEN, State.READY):
                raise RolloutError(f"ticket {ticket.number} is {where}, and should be {State.OPEN} or {State.READY}")
            if ticket.number in loaded._entries:
                raise RolloutError(f"ticket {ticket.number} is there twice")
            loaded._entries[ticket.number] = (ticket, where)
        loaded.check()
        self.step, self.ends, self._next, self._entries = loaded.step, loaded.ends, loaded._next, loaded._entries
        self.has_batch_out = False

    def check(self) -> None:
        """Raise RolloutError unless every number below the next is a ticket that has ended or stands somewhere."""
        ended, live, step = self.ends.total(), len(self._entries), self.step
        if self._next != ended + live:
            raise RolloutError(f"{self._next} tickets were opened, and {ended} that have ended + {live} are known")
        if beyond := [number for number in self._entries if not 0 <= number < self._next]:
            raise RolloutError(f"ticket {beyond[0]} is there, and only {self._next} were opened")
        gone = sum(step.rejected.values()) + step.failed
        if step.carried_in + step.opened != gone + live:
            raise RolloutError(
                f"of the {step.carried_in} tickets that the step began with and the {step.opened} that it opened, "
                f"{gone} have ended and {live} are known"
            )

    def metrics(self) -> dict[str, float]:
        """Tickets of the run so far: opened is the sum of the others, and of those from before there was a ledger."""
        return {
            "tickets_opened": self._next,
            "tickets_trained": self.ends.trained,
            "tickets_rejected": sum(self.ends.rejected.values()),
            "tickets_failed": self.ends.failed,
            "tickets_discarded": self.ends.discarded,
            "tickets_in_flight": len(self._entries),
        }

    def _in_order(self) -> Iterator[tuple[Ticket, State]]:
        for number in sorted(self._entries):
            yield self._entries[number]

    def _count_rejected(self, reason: str) -> None:
        self.ends = replace(self.ends, rejected=_one_more(self.ends.rejected, reason))
        self.step = replace(self.step, rejected=_one_more(self.step.rejected, reason))

    def _move(self, ticket: Ticket, states: Collection[State], to: State) -> None:
        self._expect(ticket, states)
        self._entries[ticket.number] = (ticket, to)

    def _end(self, ticket: Ticket, states: Collection[State]) -> None:
        self._expect(ticket, states)
        del self._entries[ticket.number]

    def _expect(self, ticket: Ticket, states: Collection[State]) -> None:
        if not self.is_current(ticket):
            raise RolloutError(f"ticket {ticket.number} in attempt {ticket.attempt} has ended or begun again")
        if (found := self._entries[ticket.number][1]) not in states:
            raise RolloutError(f"ticket {ticket.number} is {found}, and should be {' or '.join(states)}")


def _resumed(ticket: Ticket, state: State) -> tuple[Ticket, State]:
    if state is State.TAKEN:
        return ticket, State.READY
    if state is State.RUNNING:
        return replace(ticket, attempt=ticket.attempt + 1), State.OPEN
    return ticket, state


def _one_more(counts: dict[str, int], reason: str) -> dict[str, int]:
    return dict(Counter(counts) + Counter({reason: 1}))
