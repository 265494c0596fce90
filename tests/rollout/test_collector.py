"""Why: what is trained on is decided here, and a prompt that is skipped or trained twice shows in no curve.

The real collector, ledger, admission and checkpoint files; a coroutine in this process stands for servers and
verifiers, since what is asked for is what matters, and is killed hundreds of times. That runs on real servers resume
with the same prompts is tests/end_to_end/test_train.py.
"""

import asyncio
import random
from pathlib import Path

import pytest

from megatron_fipo.data.order import PromptSampler
from megatron_fipo.errors import DataError
from megatron_fipo.records.sample import Group
from megatron_fipo.rollout.admission import Refill, Rounds, Window
from megatron_fipo.rollout.seeds import request_seed
from tests.rollout.seeded_engines import (
    PROBLEMS,
    Engines,
    Killed,
    batch_of,
    begun,
    collector,
    numbers,
    rejecting,
    through_files,
)


def test_problems_are_drawn_in_order_and_asked_for_by_their_numbers_seeds() -> None:
    engines = Engines()
    rollouts = begun(Rounds(2, 3, 9, carries_surplus=True), engines)
    batch = batch_of(rollouts, engines)
    drawn = [PROBLEMS[index].id for index in PromptSampler(7, seed=1, shuffle=True).take(3)]
    assert engines.asked == [(name, request_seed(1, "train", n)) for n, name in enumerate(drawn)]
    assert [group.problem.id for group in batch.groups] == [ticket.problem for ticket in batch.tickets] == drawn[:2]
    assert [group.problem.id for group in batch.sampled] == drawn
    assert (numbers(batch), batch.left, batch.gave_up, batch.counts.rounds) == ([0, 1], 1, False, 1)


def test_generation_batches_follow_until_the_step_is_full() -> None:
    engines = rejecting(True, False, True, True)
    rollouts = begun(Rounds(2, 2, 9, carries_surplus=True), engines)
    batch = batch_of(rollouts, engines)
    assert (numbers(batch), batch.left, batch.counts.rounds) == ([1, 4], 1, 3)
    assert batch.counts.rejected == {"all_right": 3} and len(batch.sampled) == 6
    rollouts.settle(1)
    batch = batch_of(rollouts, engines)
    assert (numbers(batch), batch.counts.carried_in, batch.counts.rounds) == ([5, 6], 1, 1)
    assert len(batch.sampled) == 2, "what was carried in was sampled in the step before"


def test_surplus_is_carried_in_order_or_dropped() -> None:
    for carries, second, left in ((True, [2, 3], 0), (False, [4, 5], 0)):
        engines = Engines()
        rollouts = begun(Rounds(2, 4, 9, carries), engines)
        first = batch_of(rollouts, engines)
        assert (first.left, first.counts.rejected) == ((2, {}) if carries else (0, {"surplus": 2}))
        assert rollouts.settle(1) == first.tickets
        batch = batch_of(rollouts, engines)
        assert (numbers(batch), batch.left) == (second, left), carries
        assert batch.counts.rounds == (0 if carries else 1)


def test_gives_up_after_the_last_round_with_what_there_is() -> None:
    engines = rejecting(True, False, True, True, True, True)
    rollouts = begun(Rounds(3, 1, 3, carries_surplus=True), engines)
    batch = batch_of(rollouts, engines)
    assert (numbers(batch), batch.gave_up, batch.counts.rounds) == ([1], True, 3)
    rollouts.settle(1)
    batch = batch_of(rollouts, engines)
    assert (numbers(batch), batch.gave_up, batch.counts.rounds) == ([], True, 3), "the next step has all its rounds"
    rollouts.settle(2)
    assert numbers(batch_of(rollouts, engines)) == [6, 7, 8]


def test_a_batch_that_is_given_back_is_the_next_one() -> None:
    engines = Engines()
    rollouts = begun(Rounds(2, 3, 9, carries_surplus=True), engines)
    batch = batch_of(rollouts, engines)
    rollouts.give_back()
    again = batch_of(rollouts, engines)
    assert again.tickets == batch.tickets and again.groups == batch.groups and not again.sampled
    assert rollouts.settle(1) == batch.tickets


def test_a_step_that_is_broken_off_is_done_again_with_the_same_tickets() -> None:
    engines = Engines()
    rollouts = begun(Rounds(2, 3, 9, carries_surplus=True), engines)
    batch_of(rollouts, engines)
    rollouts.settle(1)
    before, asked = rollouts.snapshot(), len(engines.asked)
    waiting = engines.loop.begin(rollouts.next_batch())
    engines.go_on(5)
    assert not waiting.done() and rollouts.snapshot().begun, "in its middle"
    waiting.cancel()
    engines.loop.run(rollouts.break_off())
    assert rollouts.snapshot() == before
    assert numbers(batch_of(rollouts, engines)) == [2, 3]
    assert engines.asked[asked : asked + 3] == engines.asked[asked + 3 :], "the control: it was asked for twice"


def test_where_training_overlaps_nothing_is_dropped_when_nobody_waits_any_more() -> None:
    engines = Engines()
    rollouts = begun(Window(2, 1), engines, overlaps=True)
    waiting = engines.loop.begin(rollouts.next_batch())
    engines.go_on(9)
    waiting.cancel()
    engines.loop.run(rollouts.break_off())
    assert not waiting.done() or waiting.cancelled()
    assert rollouts.snapshot().begun
    assert numbers(batch_of(rollouts, engines)) == [0, 1] and len(engines.asked) == 4, "none was asked for again"
    engines.loop.run(rollouts.break_off())
    assert numbers(batch_of(rollouts, engines)) == [0, 1], "it had been taken, and nobody had it"


def test_sampling_goes_on_while_a_batch_is_trained_on() -> None:
    """And the control: at k = 0 nothing is begun before the next batch is asked for."""
    for k, sampled in ((0, 0), (1, 2), (2, 4)):
        engines = Engines()
        rollouts = begun(Window(2, k), engines, overlaps=k > 0)
        batch_of(rollouts, engines)
        engines.go_on(1000)
        assert len(rollouts.snapshot().groups) == 2 + sampled
        rollouts.settle(1)
        engines.go_on(1000)
        assert len(engines.asked) == 2 + sampled + (2 if k else 0), "the slots of the trained ones are free"
        assert len(rollouts.snapshot().groups) == (2 * (k + 1) if k else 0)


def test_the_slot_of_a_rejected_group_is_filled_at_once() -> None:
    engines = rejecting(True, False, True, False)
    rollouts = begun(Window(2, 1), engines, overlaps=True)
    batch = batch_of(rollouts, engines)
    assert numbers(batch) == [1, 3] and batch.counts.rejected == {"all_right": 2}
    assert [group.problem.id for group in batch.sampled] == [problem for problem, _ in engines.asked[:4]]
    assert len(rollouts.snapshot().ledger.tickets) == 4, "while the batch is trained on"


def test_stopped_groups_are_sampled_no_further_and_their_problems_come_next() -> None:
    engines = Engines()
    rollouts = begun(Refill(2, 2.0, 99, carries_surplus=True), engines)
    order = PromptSampler(7, seed=1, shuffle=True).take(70)
    seen: list[str] = []
    for step in range(1, 4):
        batch = batch_of(rollouts, engines)
        tokens = engines.tokens
        engines.go_on(1000)
        assert engines.tokens == tokens, "nothing runs during an update"
        seen += [ticket.problem for ticket in batch.tickets]
        rollouts.settle(step)
    state = rollouts.snapshot()
    waiting = [ticket.problem for ticket, _ in state.ledger.tickets]
    waiting += [PROBLEMS[index].id for index in state.order.returned]
    drawn = len(seen) + len(waiting)
    assert sorted(seen + waiting) == sorted(PROBLEMS[index].id for index in order[:drawn]), "none is lost"
    assert rollouts.snapshot().ledger.ends.rejected.get("stopped", 0) > 0, "the control"


@pytest.mark.parametrize("kind", ["rounds", "refill", "window"])
@pytest.mark.parametrize("seed", range(5))
def test_parts_are_the_beginning_of_the_batch(kind: str, seed: int) -> None:
    """Whatever is rejected, carried over or broken off on the way."""
    drawn, engines = random.Random(seed), Engines(rejects=0.4)
    admission = {
        "rounds": Rounds(6, drawn.randint(1, 9), 50, carries_surplus=True),
        "refill": Refill(6, 1.5, 10**6, carries_surplus=drawn.random() < 0.5),
        "window": Window(6, 1),
    }[kind]
    rollouts = collector(admission, engines, overlaps=kind == "window", part_prompts=2)
    rollouts.settle(0)
    sizes: list[int] = []
    for step in range(1, 13):
        waiting, handed_over = engines.loop.begin(rollouts.next_batch()), list[Group]()
        breaks_off = drawn.random() < 0.3
        while not waiting.done():
            engines.go_on(drawn.randint(1, 20))
            if rollouts.part_ready.is_set() and not waiting.done():
                part = rollouts.part()
                sizes.append(len(part))
                handed_over += part
                if breaks_off:
                    break
        if not waiting.done():
            waiting.cancel()
            engines.loop.run(rollouts.break_off())
            handed_over = []
            waiting = engines.loop.begin(rollouts.next_batch())
        batch = engines.loop.run(asyncio.wait_for(waiting, 60))
        assert batch.in_parts == len(handed_over) and batch.groups[: batch.in_parts] == handed_over
        rollouts.settle(step)
    assert sizes and all(each and each % 2 == 0 for each in sizes), "the control: some came in parts"


def test_what_ends_a_group_ends_the_wait_for_the_batch() -> None:
    engines = Engines(groups_to_live=1)
    rollouts = begun(Rounds(2, 2, 9, carries_surplus=True), engines)
    with pytest.raises(Killed):
        batch_of(rollouts, engines)


def test_what_is_discarded_at_a_resume_comes_next_and_is_counted(tmp_path: Path) -> None:
    admission = Rounds(2, 4, 9, carries_surplus=True)
    first = Engines()
    rollouts = begun(admission, first)
    batch_of(rollouts, first)
    rollouts.settle(1)
    state = through_files(rollouts.snapshot(), tmp_path / "step-000001", step=1)
    engines = Engines()
    resumed = collector(admission, engines)
    assert resumed.restore(state, discard=True) == 2
    again = through_files(resumed.snapshot(), tmp_path / "again", step=1)
    assert not again.groups and not again.ledger.tickets and len(again.order.returned) == 2
    resumed = collector(admission, engines)
    resumed.restore(again)
    resumed.settle(1)
    batch = batch_of(resumed, engines)
    order = [PROBLEMS[index].id for index in PromptSampler(7, seed=1, shuffle=True).take(6)]
    assert [group.problem.id for group in batch.sampled] == order[2:], "the two that were discarded, and the next two"
    assert engines.asked == [(name, request_seed(1, "train", n)) for n, name in enumerate(order[2:], start=4)]
    found = resumed.metrics()
    assert (found["tickets_opened"], found["tickets_trained"], found["tickets_discarded"]) == (8, 2, 2)
    assert collector(admission, engines).restore(state) == 0, "the control"


def test_a_ticket_of_a_problem_that_is_gone_is_refused() -> None:
    engines = Engines()
    rollouts = begun(Rounds(2, 3, 9, carries_surplus=True), engines)
    engines.loop.begin(rollouts.next_batch())
    engines.go_on(1)
    state = rollouts.snapshot()
    lost = state.ledger.tickets[1][0].problem
    fewer = collector(Rounds(2, 3, 9, carries_surplus=True), Engines(), [each for each in PROBLEMS if each.id != lost])
    with pytest.raises(DataError, match=f"ticket 1 is for the problem {lost}, which the data lacks"):
        fewer.restore(state, new_order=True)
    assert fewer.restore(state, new_order=True, discard=True) == 3
    assert len(fewer.snapshot().order.returned) == 2, "but for the one that is gone"
