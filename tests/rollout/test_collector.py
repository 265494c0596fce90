"""Why: what is trained on is decided here, and a prompt that is skipped or trained twice shows in no curve.

The real collector, ledger, admission and checkpoint files; a coroutine in this process stands for servers and
verifiers, since what is asked for is what matters, and is killed hundreds of times. That runs on real servers resume
with the same prompts is tests/end_to_end/test_train.py.
"""

import asyncio
import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from megatron_fipo.data.fingerprint import Fingerprint
from megatron_fipo.data.order import PromptSampler
from megatron_fipo.errors import DataError
from megatron_fipo.records.problem import Problem, prompt_ids
from megatron_fipo.records.sample import Group, Partial, Sample
from megatron_fipo.records.streams import checked
from megatron_fipo.rollout import snapshot
from megatron_fipo.rollout.admission import Admission, Refill, Rounds, Window
from megatron_fipo.rollout.collector import Batch, CollectorState, RolloutCollector, Sampler
from megatron_fipo.rollout.filters import differing_accuracies
from megatron_fipo.rollout.ledger import State
from megatron_fipo.rollout.main_loop import MainLoop
from megatron_fipo.rollout.seeds import request_seed
from megatron_fipo.rollout.work import Sampling, Work
from tests.rollout.groups import make_group, make_problem

PROBLEMS = [make_problem(f"p{number}") for number in range(7)]
DATA = Fingerprint(len(PROBLEMS), "0" * 32, "0" * 32)


class Killed(Exception):
    """The process is gone."""


@dataclass
class Engines:
    """Samples by the seed alone, as engines of one version do, token after token, and dies when it is told to."""

    rejects: float = 0.0
    groups_to_live: int = 10**9
    asked: list[tuple[str, int]] = field(default_factory=list)
    tokens: int = 0
    """Sampled in all lives."""
    loop: MainLoop = field(default_factory=MainLoop)

    def work(self, problem: Problem, seed: int) -> Work:
        return Work(problem, 2, Sampling(1.0, 1.0, -1, 2, [1]), seed)

    async def judged(self, work: Work) -> Group:
        """Samples what the work lacks in random order: two tokens for each sample, and a wait before each."""
        self.asked.append((work.problem.id, work.seed))
        self.groups_to_live -= 1
        if self.groups_to_live < 0:
            raise Killed
        whole = self.group(work.problem.id, work.seed)
        drawn = random.Random(work.seed)
        for index in drawn.sample(work.missing(), len(work.missing())):
            for length in range(len(work.begun.get(index, ())) + 1, 3):
                for _ in range(drawn.randint(1, 9)):
                    await asyncio.sleep(0)
                self.tokens += 1
                streams = whole.samples[index].streams
                so_far = {name: values[:length] for name, values in streams.items()}
                work.add(index, Partial(checked(so_far, "a part"), 0) if length < 2 else whole.samples[index])
        return work.group.with_results(whole.results)

    def group(self, name: str, seed: int) -> Group:
        teaches = random.Random(seed).random() >= self.rejects
        return make_group(name, 1.0, float(not teaches))

    def die(self) -> None:
        """All that is under way is gone."""
        self.loop.close()
        self.loop = MainLoop()

    def go_on(self, turns: int) -> None:
        """What is under way goes on for so long."""

        async def some() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.loop.run(some())


def collector(
    admission: Admission, engines: Engines, problems: Sequence[Problem] = PROBLEMS, *, overlaps: bool = False
) -> RolloutCollector:
    prompts = PromptSampler(len(problems), seed=1, shuffle=True)
    sampler = Sampler(engines.work, engines.judged, engines.loop.begin)
    return RolloutCollector(
        problems,
        prompts,
        admission,
        differing_accuracies,
        sampler,
        lambda n: request_seed(1, "train", n),
        overlaps=overlaps,
    )


def begun(admission: Admission, engines: Engines, *, overlaps: bool = False) -> RolloutCollector:
    made = collector(admission, engines, overlaps=overlaps)
    made.settle(0)
    return made


def batch_of(rollouts: RolloutCollector, engines: Engines) -> Batch:
    return engines.loop.run(rollouts.next_batch())


def numbers(batch: Batch) -> list[int]:
    return [ticket.number for ticket in batch.tickets]


def rejecting(*wanted: bool) -> Engines:
    """Engines whose first groups are rejected or not, as `wanted` says; the later ones are not."""
    engines = Engines()
    rejected = {request_seed(1, "train", number) for number, rejects in enumerate(wanted) if rejects}
    engines.group = lambda name, seed: make_group(name, 1.0, float(seed in rejected))  # type: ignore[method-assign]
    return engines


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


def through_files(state: CollectorState, directory: Path, step: int) -> CollectorState:
    """The state as a resumed run reads it."""
    directory.mkdir()
    snapshot.encode(snapshot.RolloutState(state, DATA)).write(directory)
    return snapshot.read(directory, step=step, vocab_size=8).collected


@dataclass
class Run:
    """A run over many lives: every step trains, and saves now and then; what was not saved is undone by a kill."""

    admission: Admission
    engines: Engines
    drawn: random.Random
    directory: Path
    overlaps: bool = False
    lags: list[int] = field(default_factory=list)
    step: int = 0
    kills: int = 0
    trained: list[tuple[int, str]] = field(default_factory=list)
    saves: int = 0

    def __post_init__(self) -> None:
        self.rollouts = begun(self.admission, self.engines, overlaps=self.overlaps)
        self.saved = (self.rollouts.snapshot(), 0, 0)

    def live(self) -> None:
        """Train until something kills it, and resume."""
        self.engines.groups_to_live = self.drawn.randint(0, 12)
        steps = self.drawn.randint(0, 4)
        try:
            for _ in range(steps):
                batch = batch_of(self.rollouts, self.engines)
                self.lags += [self.step - ticket.start_version for ticket in batch.tickets]
                self.engines.go_on(self.drawn.randint(0, 40))
                if self.drawn.random() < 0.2:
                    self.save()  # in the middle of a step: the batch is out
                if self.drawn.random() < 0.2:
                    raise Killed
                self.step += 1
                trained = self.rollouts.settle(self.step)
                assert list(batch.tickets) == trained
                self.trained += [(ticket.number, ticket.problem) for ticket in trained]
                if self.drawn.random() < 0.5:
                    self.save()
        except Killed:
            if self.drawn.random() < 0.3:
                self.save()  # in the middle of sampling
        self.resume()

    def save(self) -> None:
        self.saves += 1
        state = self.rollouts.snapshot()
        place = self.directory / f"step-{self.saves:06d}"
        read = through_files(state, place, self.step)
        assert read == state
        self.saved = (read, self.step, len(self.trained))

    def resume(self) -> None:
        self.kills += 1
        state, self.step, trained = self.saved
        del self.trained[trained:]
        self.engines.die()
        self.rollouts = collector(self.admission, self.engines, overlaps=self.overlaps)
        self.rollouts.restore(state)
        self.rollouts.settle(self.step)

    def ended(self) -> list[int]:
        """All that has ended, or waits: by number."""
        state = self.rollouts.snapshot()
        waiting = [ticket.number for ticket, _ in state.ledger.tickets]
        return sorted([number for number, _ in self.trained] + waiting)


@pytest.mark.parametrize("kind", ["rounds", "refill", "window"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_killed_every_prompt_is_trained_once_in_order(kind: str, seed: int, tmp_path: Path) -> None:
    """100 kills a run: between steps, in the middle of sampling, and after a batch was taken; saves at all of these.

    No group is rejected: what is trained is then 0 … n, each once, with the problem that the order has there. In a
    window, never more than k versions after its opening.
    """
    drawn = random.Random(seed)
    size, batch, k = drawn.randint(1, 4), drawn.randint(1, 6), drawn.randint(1, 3)
    admission = {
        "rounds": Rounds(size, batch, 50, carries_surplus=True),
        "refill": Refill(size, 1.0, 10**6, carries_surplus=True),
        "window": Window(size, k),
    }[kind]
    run = Run(admission, Engines(), drawn, tmp_path, overlaps=kind == "window")
    while run.kills < 100:
        run.live()
    run.engines.groups_to_live = 10**9
    for _ in range(3):
        run.step += 1
        run.trained += [(ticket.number, ticket.problem) for ticket in batch_of(run.rollouts, run.engines).tickets]
        run.rollouts.settle(run.step)
    order = PromptSampler(len(PROBLEMS), seed=1, shuffle=True).take(len(run.trained))
    assert run.trained == [(number, PROBLEMS[index].id) for number, index in enumerate(order)]
    assert run.saves > 20 and len(run.trained) > 3 * size, "the control: it got somewhere"
    assert kind != "window" or 0 < max(run.lags) <= k


def test_a_resume_samples_no_token_of_the_checkpoint_again(tmp_path: Path) -> None:
    """Every token that was there is part of what is trained on, whether its sample had ended or not."""
    engines = Engines()
    rollouts = begun(Window(2, 2), engines, overlaps=True)
    batch_of(rollouts, engines)
    rollouts.settle(1)
    engines.go_on(9)
    state = through_files(rollouts.snapshot(), tmp_path / "step", step=1)
    parts = [part for found in state.begun.values() for part in found.parts.values()]
    there = sum(map(len, parts)) + 4 * len(state.groups)
    assert {type(part) for part in parts} == {Partial, Sample}, "the control"
    engines.die()
    engines.tokens = 0
    resumed = collector(Window(2, 2), engines, overlaps=True)
    resumed.restore(state)
    resumed.settle(1)
    trained = []
    for step in range(2, 5):
        trained += numbers(batch_of(resumed, engines))
        resumed.settle(step)
    engines.go_on(1000)
    sampled = int(resumed.metrics()["tickets_opened"]) - 2
    assert engines.tokens == 4 * sampled - there
    assert trained == list(range(2, 8))


def test_what_was_begun_with_another_prompt_is_refused(tmp_path: Path) -> None:
    engines = Engines()
    rollouts = begun(Window(2, 2), engines, overlaps=True)
    batch_of(rollouts, engines)
    rollouts.settle(1)
    engines.go_on(9)
    state = rollouts.snapshot()
    others = [dataclasses.replace(problem, token_ids=prompt_ids([3])) for problem in PROBLEMS]
    changed = collector(Window(2, 2), Engines(), others, overlaps=True)
    with pytest.raises(DataError, match=r"was begun with another prompt of the problem p\d than the data has now"):
        changed.restore(state)
    assert changed.restore(state, discard=True) > 0


@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 4),
    batch=st.integers(1, 6),
    rejects=st.sampled_from([0.0, 0.3, 0.7]),
    carries=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_resumed_run_does_what_it_would_have_done(
    seed: int, size: int, batch: int, rejects: float, carries: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Killed at random points or never: the same batches of the same tickets, seeds and problems, with rejections."""
    admission = Rounds(size, batch, 5, carries)
    broken = Run(admission, Engines(rejects), random.Random(seed), tmp_path_factory.mktemp("run"))
    while broken.kills < 10:
        broken.live()
    unbroken = Engines(rejects)
    whole = begun(admission, unbroken)
    trained = []
    for step in range(1, broken.step + 1):
        batch_of(whole, unbroken)
        trained += [(ticket.number, ticket.problem) for ticket in whole.settle(step)]
    assert broken.trained == trained
    broken.engines.groups_to_live = 10**9
    next_one, expected = batch_of(broken.rollouts, broken.engines), batch_of(whole, unbroken)
    assert [replace(ticket, attempt=0) for ticket in next_one.tickets] == list(expected.tickets)
    assert next_one.groups == expected.groups


def test_what_runs_at_a_snapshot_is_another_attempt(tmp_path: Path) -> None:
    engines = Engines()
    rollouts = begun(Rounds(2, 3, 9, carries_surplus=True), engines)
    engines.loop.begin(rollouts.next_batch())
    engines.go_on(1)
    state = through_files(rollouts.snapshot(), tmp_path / "step-000000", step=0)
    assert [(ticket.attempt, at) for ticket, at in state.ledger.tickets] == [(1, State.OPEN)] * 3
    resumed = collector(Rounds(2, 3, 9, carries_surplus=True), engines)
    resumed.restore(state)
    assert [(ticket.number, ticket.attempt) for ticket in batch_of(resumed, engines).tickets] == [(0, 1), (1, 1)]
