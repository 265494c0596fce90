"""Why: a ticket that is lost, or trained twice, shows in no curve of a run.

The ledger and both admissions alone, by random schedules and by each transition that is none. Who drives them, and that
a snapshot goes to a file and back, are test_collector.py and tests/loop_state.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from megatron_fipo.errors import RolloutError
from megatron_fipo.rollout.admission import Admission, Refill, Rounds, Window
from megatron_fipo.rollout.ledger import Ends, Ledger, State, StepCounts, Ticket


def opened(count: int = 1) -> tuple[Ledger, list[Ticket]]:
    ledger = Ledger()
    ledger.settle(3)
    return ledger, ledger.open([f"problem {n}" for n in range(count)], seed_of=lambda number: 100 + number)


def ready(ledger: Ledger, ticket: Ticket, reason: str | None = None) -> None:
    ledger.start(ticket)
    assert ledger.scored(ticket, reason)


def test_a_ticket_on_its_way_to_training() -> None:
    ledger, (first, second) = opened(2)
    assert first == Ticket(0, "problem 0", 100, 0, 3) and second.number == 1
    ready(ledger, second)
    assert ledger.tickets(State.OPEN) == [first] and ledger.tickets(State.READY) == [second]
    ready(ledger, first)
    assert ledger.tickets(State.READY) == [first, second], "by number, whoever was first"
    ledger.take([first])
    assert ledger.settle(4) == [first]
    assert ledger.tickets() == [second] and ledger.version == 4
    assert ledger.ends == Ends(trained=1) and ledger.step == StepCounts(carried_in=1)


def test_a_batch_that_comes_back_is_taken_again() -> None:
    ledger, tickets = opened(2)
    for ticket in tickets:
        ready(ledger, ticket)
    admission = Rounds(2, 2, most_rounds=1, carries_surplus=True)
    taken = admission.take(ledger)
    assert taken is not None
    ledger.take(taken.tickets)
    assert admission.take(ledger) is None and admission.admit(ledger) == 0, "until it is settled"
    ledger.give_back()
    assert admission.take(ledger) == taken
    ledger.take(taken.tickets)
    assert ledger.settle(4) == tickets


def test_a_late_answer_of_an_older_attempt_is_discarded() -> None:
    ledger, (ticket,) = opened()
    ledger.start(ticket)
    again = ledger.restart(ticket)
    assert (again.number, again.seed, again.attempt) == (0, 100, 1)
    assert not ledger.scored(ticket, None) and not ledger.scored(ticket, "all_wrong")
    assert ledger.tickets(State.OPEN) == [again], "the control: nothing has changed"
    ready(ledger, again)
    ledger.take([again])
    ledger.settle(4)
    assert not ledger.scored(again, None), "nor one of a ticket that has ended"


REFUSED: dict[str, tuple[Callable[[Ledger, Ticket], Any], str]] = {
    "scored before it runs": (lambda ledger, ticket: ledger.scored(ticket, None), "is open, and should be running"),
    "taken before it is ready": (lambda ledger, ticket: ledger.take([ticket]), "is open, and should be ready"),
    "rejected before it is scored": (lambda ledger, ticket: ledger.reject(ticket, "x"), "should be scored or ready"),
    "begun again before it runs": (lambda ledger, ticket: ledger.restart(ticket), "is open, and should be running"),
    "started twice": (lambda ledger, ticket: [ledger.start(ticket), ledger.start(ticket)], "is running, and should"),
    "failed twice": (lambda ledger, ticket: [ledger.fail(ticket), ledger.fail(ticket)], "has ended or begun again"),
    "two batches": (lambda ledger, ticket: [ledger.take([]), ledger.take([])], "before the one before it was settled"),
    "settled as no new version": (lambda ledger, _: [ledger.take([]), ledger.settle(3)], "after version 3"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_no_transition_is_refused(fault: str) -> None:
    ledger, (ticket,) = opened()
    act, words = REFUSED[fault]
    with pytest.raises(RolloutError, match=words):
        act(ledger, ticket)


def test_a_state_that_cannot_be_is_refused_and_changes_nothing() -> None:
    ledger, (ticket, _) = opened(2)
    state = ledger.state()
    (first, at), second = state.tickets
    for broken, words in (
        (replace(state, next_number=3), "3 tickets were opened, and 0 that have ended"),
        (replace(state, ends=Ends(trained=1)), "2 tickets were opened, and 1 that have ended"),
        (replace(state, tickets=((first, at), (first, at))), "ticket 0 is there twice"),
        (replace(state, tickets=((first, at), (replace(first, number=7), at))), "ticket 7 is there, and only 2"),
        (replace(state, tickets=((first, State.TAKEN), second)), "is taken, and should be open or ready"),
        (replace(state, step=StepCounts(carried_in=1)), "of the 1 tickets that the step began with and the 0"),
    ):
        with pytest.raises(RolloutError, match=words):
            ledger.load(broken)
        assert ledger.state() == state
    ledger.load(state)
    assert ledger.tickets(State.OPEN)[0] == ticket, "the control"


def test_a_smaller_window_opens_nothing_before_what_is_there_is_trained() -> None:
    ledger, tickets = opened(5)
    assert [Window(2, k).admit(ledger) for k in (0, 1, 2)] == [0, 0, 1]
    for ticket in tickets:
        ready(ledger, ticket)
    taken = Window(2, 0).take(ledger)
    assert taken is not None and taken.tickets == tickets[:2]


class Schedule:
    """A run in which everything happens in random order: verdicts, rejections, updates, kills and resumes."""

    def __init__(self, admission: Admission, seed: int, *, kills: bool = True):
        self.admission, self.drawn, self.kills = admission, random.Random(seed), kills
        self.rejects = self.drawn.choice([0.0, 0.3, 0.8])
        self.ledger = Ledger()
        self.ledger.settle(0)
        self.trained: list[int] = []
        self.rejected: list[int] = []
        self.lags: list[int] = []
        self.sizes: list[int] = []
        self.saved = (self.ledger.state(), 0, 0, 0)

    def act(self) -> None:
        ledger, drawn = self.ledger, self.drawn
        if count := self.admission.admit(ledger):
            assert count > 0
            ledger.open([""] * count, seed_of=lambda number: number)
        for ticket in ledger.tickets(State.OPEN):
            ledger.start(ticket)
        running = ledger.tickets(State.RUNNING)
        for ticket in drawn.sample(running, drawn.randint(0, len(running))):
            if drawn.random() < 0.1:
                ledger.restart(ticket)
            else:
                reason = "all_wrong" if drawn.random() < self.rejects else None
                ledger.scored(ticket, reason)
                self.rejected += [ticket.number] if reason else []
        if ledger.has_batch_out and drawn.random() < 0.5:
            self.end_step()
        elif (taken := self.admission.take(ledger)) is not None:
            ledger.take(taken.tickets)
            for ticket in taken.surplus:
                ledger.reject(ticket, "surplus")
                self.rejected.append(ticket.number)
            for ticket in taken.stopped:
                ledger.stop(ticket)
                self.rejected.append(ticket.number)
            self.lags += [ledger.version - ticket.start_version for ticket in taken.tickets]
            self.sizes.append(len(taken.tickets))
        if self.kills and drawn.random() < 0.1:
            self.resume()

    def end_step(self) -> None:
        if self.drawn.random() < 0.1:
            self.ledger.give_back()
            return
        self.trained += [ticket.number for ticket in self.ledger.settle(self.ledger.version + 1)]
        if self.drawn.random() < 0.3:
            self.saved = (self.ledger.state(), self.ledger.version, len(self.trained), len(self.rejected))

    def resume(self) -> None:
        """In a new process, from the last checkpoint: what was done after it is undone."""
        state, version, trained, rejected = self.saved
        self.ledger = Ledger()
        self.ledger.load(state)
        self.ledger.settle(version)
        del self.trained[trained:], self.rejected[rejected:]

    def check(self) -> None:
        self.ledger.check()
        live = [ticket.number for ticket in self.ledger.tickets()]
        assert sorted([*self.trained, *self.rejected, *live]) == list(range(len(self.trained + self.rejected + live)))
        ends = self.ledger.ends
        assert ends.trained == len(self.trained) and sum(ends.rejected.values()) == len(self.rejected)


@given(
    seed=st.integers(0, 2**32),
    prompts=st.integers(1, 6),
    batch=st.integers(1, 9),
    most=st.integers(1, 4),
    carries=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_in_rounds_every_ticket_is_trained_or_rejected_once(
    seed: int, prompts: int, batch: int, most: int, carries: bool
) -> None:
    schedule = Schedule(Rounds(prompts, batch, most, carries), seed)
    for _ in range(60):
        schedule.act()
        schedule.check()
    assert max(schedule.sizes, default=0) <= prompts


@given(
    seed=st.integers(0, 2**32), prompts=st.integers(1, 6), k=st.integers(0, 3), over=st.sampled_from([1.0, 1.5, 3.0])
)
@settings(max_examples=400, deadline=None)
def test_in_a_window_no_ticket_is_more_than_k_versions_old(seed: int, prompts: int, k: int, over: float) -> None:
    """At k = 0 that is strictly on policy: each ticket trains from the version that it was opened under."""
    schedule = Schedule(Window(prompts, k, over_sampling=over), seed)
    for _ in range(80):
        schedule.act()
        schedule.check()
        assert len(schedule.ledger) <= math.ceil(over * (k + 1) * prompts)
        assert over > 1 or not {"surplus", "stopped"} & set(schedule.ledger.ends.rejected)
    assert max(schedule.lags, default=0) <= k
    assert set(schedule.sizes) <= {prompts}
    assert schedule.trained == sorted(schedule.trained), "in strict order"


@given(
    seed=st.integers(0, 2**32),
    prompts=st.integers(1, 6),
    over=st.floats(1, 3),
    most=st.integers(3, 30),
    carry=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_with_refill_nothing_runs_during_an_update(
    seed: int, prompts: int, over: float, most: int, carry: bool
) -> None:
    schedule = Schedule(Refill(prompts, over, most, carry), seed)
    for _ in range(80):
        schedule.act()
        schedule.check()
        if schedule.ledger.has_batch_out:
            assert not schedule.ledger.tickets(State.OPEN, State.RUNNING, State.SCORED)
    assert max(schedule.sizes, default=0) <= prompts
    assert carry or max(schedule.lags, default=0) == 0, "strictly on policy"


def test_with_refill_the_oldest_that_teach_something_make_the_batch_whoever_ends_first() -> None:
    """Time decides nothing: a step of the groups that end first would be a step of short responses."""
    admission = Refill(2, 1.5, most_rejected=9, carries_surplus=False)
    ledger, (first, second, third) = opened(3)
    assert Refill(2, 1.5, 9, False).admit(Ledger()) == 3 and admission.admit(ledger) == 0
    ready(ledger, second)
    ready(ledger, third)
    assert admission.take(ledger) is None, "the first is still sampled"
    ledger.start(first)
    ledger.scored(first, "all_wrong")
    taken = admission.take(ledger)
    assert taken is not None and list(taken.tickets) == [second, third] and not taken.stopped

    ledger, (first, second, third) = opened(3)
    ready(ledger, first)
    ready(ledger, second)
    taken = admission.take(ledger)
    assert taken is not None and list(taken.tickets) == [first, second] and list(taken.stopped) == [third]


def test_a_step_without_contrast_ends_as_its_admission_says() -> None:
    for admission in (Refill(2, 1.0, 4, True), Window(2, 1, 4)):
        ledger, tickets = opened(4)
        for ticket in tickets[:-1]:
            ready(ledger, ticket, "all_wrong")
        assert admission.take(ledger) is None, "the control"
        ready(ledger, tickets[-1], "all_right")
        if isinstance(admission, Window):
            with pytest.raises(RolloutError, match=r"4 groups were rejected in one step \(1 all_right, 3 all_wrong\)"):
                admission.take(ledger)
        else:
            taken = admission.take(ledger)
            assert taken is not None and taken.gave_up and not taken.tickets and admission.admit(ledger) == 0


def test_the_bound_of_a_window_is_reached_and_one_slot_more_would_break_it() -> None:
    """The control of the test above."""

    class OneMore(Window):
        def admit(self, ledger: Ledger) -> int:
            return (self.max_off_policy_steps + 1) * self.prompts_per_step + 1 - len(ledger)

    def largest_lag(admission: Admission) -> int:
        lags = []
        for seed in range(40):
            schedule = Schedule(admission, seed, kills=False)
            for _ in range(80):
                schedule.act()
            lags += schedule.lags
        return max(lags)

    for k in range(3):
        assert largest_lag(Window(4, k)) == k
        assert largest_lag(OneMore(4, k)) == k + 1
