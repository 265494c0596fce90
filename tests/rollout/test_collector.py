"""Why: what is trained on is decided here, and a prompt that is skipped or trained twice shows in no curve.

The real collector, ledger, admission and checkpoint files; a generator in this process stands for servers and
verifiers, since what is asked for is what matters, and is killed hundreds of times. That runs on real servers resume
with the same prompts is tests/end_to_end/test_train.py.
"""

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
from megatron_fipo.errors import DataError, RolloutError
from megatron_fipo.records.problem import Problem
from megatron_fipo.records.sample import Group
from megatron_fipo.rollout import snapshot
from megatron_fipo.rollout.admission import Admission, Rounds, Window
from megatron_fipo.rollout.collector import Batch, CollectorState, RolloutCollector
from megatron_fipo.rollout.events import Ongoing, Steps, WeightsWanted
from megatron_fipo.rollout.filters import differing_accuracies
from megatron_fipo.rollout.ledger import State
from megatron_fipo.rollout.seeds import request_seed
from tests.rollout.groups import make_group, make_problem

PROBLEMS = [make_problem(f"p{number}") for number in range(7)]
DATA = Fingerprint(len(PROBLEMS), "0" * 32, "0" * 32)


class Killed(Exception):
    """The process is gone."""


@dataclass
class Engines:
    """Samples by the seed alone, as engines of one version do, and dies when it is told to."""

    rejects: float = 0.0
    calls_to_live: int = 10**9
    asked: list[tuple[str, int]] = field(default_factory=list)

    def sample(self, problems: Sequence[Problem], seeds: Sequence[int]) -> Steps[list[Group]]:
        self.asked += [(problem.id, seed) for problem, seed in zip(problems, seeds, strict=True)]
        self.calls_to_live -= 1
        if self.calls_to_live < 0:
            raise Killed
        yield WeightsWanted(("http://lost",))
        return [self.group(problem.id, seed) for problem, seed in zip(problems, seeds, strict=True)]

    def group(self, name: str, seed: int) -> Group:
        teaches = random.Random(seed).random() >= self.rejects
        return make_group(name, 1.0, float(not teaches))


def collector(admission: Admission, engines: Engines, problems: Sequence[Problem] = PROBLEMS) -> RolloutCollector:
    prompts = PromptSampler(len(problems), seed=1, shuffle=True)
    return RolloutCollector(
        problems, prompts, admission, differing_accuracies, engines.sample, lambda n: request_seed(1, "train", n)
    )


def begun(admission: Admission, engines: Engines | None = None) -> RolloutCollector:
    made = collector(admission, engines or Engines())
    made.settle(0)
    return made


def batch_of(rollouts: RolloutCollector) -> Batch:
    return Ongoing(rollouts.next_batch()).to_the_end(lambda: None)


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
    batch = batch_of(rollouts)
    drawn = [PROBLEMS[index].id for index in PromptSampler(7, seed=1, shuffle=True).take(3)]
    assert engines.asked == [(name, request_seed(1, "train", n)) for n, name in enumerate(drawn)]
    assert [group.problem.id for group in batch.groups] == [ticket.problem for ticket in batch.tickets] == drawn[:2]
    assert [group.problem.id for group in batch.sampled] == drawn
    assert (numbers(batch), batch.left, batch.gave_up, batch.counts.rounds) == ([0, 1], 1, False, 1)


def test_generation_batches_follow_until_the_step_is_full() -> None:
    rollouts = begun(Rounds(2, 2, 9, carries_surplus=True), rejecting(True, False, True, True))
    batch = batch_of(rollouts)
    assert (numbers(batch), batch.left, batch.counts.rounds) == ([1, 4], 1, 3)
    assert batch.counts.rejected == {"all_right": 3} and len(batch.sampled) == 6
    rollouts.settle(1)
    batch = batch_of(rollouts)
    assert (numbers(batch), batch.counts.carried_in, batch.counts.rounds) == ([5, 6], 1, 1)
    assert len(batch.sampled) == 2, "what was carried in was sampled in the step before"


def test_surplus_is_carried_in_order_or_dropped() -> None:
    for carries, second, left in ((True, [2, 3], 0), (False, [4, 5], 0)):
        rollouts = begun(Rounds(2, 4, 9, carries))
        first = batch_of(rollouts)
        assert (first.left, first.counts.rejected) == ((2, {}) if carries else (0, {"surplus": 2}))
        assert rollouts.settle(1) == first.tickets
        batch = batch_of(rollouts)
        assert (numbers(batch), batch.left) == (second, left), carries
        assert batch.counts.rounds == (0 if carries else 1)


def test_gives_up_after_the_last_round_with_what_there_is() -> None:
    rollouts = begun(Rounds(3, 1, 3, carries_surplus=True), rejecting(True, False, True, True, True, True))
    batch = batch_of(rollouts)
    assert (numbers(batch), batch.gave_up, batch.counts.rounds) == ([1], True, 3)
    rollouts.settle(1)
    batch = batch_of(rollouts)
    assert (numbers(batch), batch.gave_up, batch.counts.rounds) == ([], True, 3), "the next step has all its rounds"
    rollouts.settle(2)
    assert numbers(batch_of(rollouts)) == [6, 7, 8]


def test_a_batch_that_is_given_back_is_the_next_one() -> None:
    rollouts = begun(Rounds(2, 3, 9, carries_surplus=True))
    batch = batch_of(rollouts)
    rollouts.give_back()
    again = batch_of(rollouts)
    assert again.tickets == batch.tickets and again.groups == batch.groups and not again.sampled
    assert rollouts.settle(1) == batch.tickets


def test_a_step_that_is_undone_is_done_again_with_the_same_tickets() -> None:
    engines = Engines()
    rollouts = begun(Rounds(2, 3, 9, carries_surplus=True), engines)
    batch_of(rollouts)
    rollouts.settle(1)
    before, asked = rollouts.snapshot(), len(engines.asked)
    sampling = rollouts.next_batch()
    assert isinstance(next(sampling), WeightsWanted), "in its middle"
    sampling.close()
    with pytest.raises(RolloutError, match="none of 4 tickets waits to be sampled"):
        batch_of(rollouts)
    rollouts.undo()
    assert rollouts.snapshot() == before
    assert numbers(batch_of(rollouts)) == [2, 3]
    assert engines.asked[asked : asked + 3] == engines.asked[asked + 3 :], "the control: it was asked for twice"


def test_what_is_discarded_at_a_resume_comes_next_and_is_counted(tmp_path: Path) -> None:
    admission = Rounds(2, 4, 9, carries_surplus=True)
    rollouts = begun(admission)
    batch_of(rollouts)
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
    batch = batch_of(resumed)
    order = [PROBLEMS[index].id for index in PromptSampler(7, seed=1, shuffle=True).take(6)]
    assert [group.problem.id for group in batch.sampled] == order[2:], "the two that were discarded, and the next two"
    assert engines.asked == [(name, request_seed(1, "train", n)) for n, name in enumerate(order[2:], start=4)]
    found = resumed.metrics()
    assert (found["tickets_opened"], found["tickets_trained"], found["tickets_discarded"]) == (8, 2, 2)
    assert collector(admission, engines).restore(state) == 0, "the control"


def test_a_ticket_of_a_problem_that_is_gone_is_refused() -> None:
    rollouts = begun(Rounds(2, 3, 9, carries_surplus=True))
    sampling = rollouts.next_batch()
    next(sampling)
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
    step: int = 0
    kills: int = 0
    trained: list[tuple[int, str]] = field(default_factory=list)
    saves: int = 0

    def __post_init__(self) -> None:
        self.rollouts = begun(self.admission, self.engines)
        self.saved = (self.rollouts.snapshot(), 0, 0)

    def live(self) -> None:
        """Train until something kills it, and resume."""
        self.engines.calls_to_live = self.drawn.randint(0, 4)
        steps = self.drawn.randint(0, 4)
        try:
            for _ in range(steps):
                batch = batch_of(self.rollouts)
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
                self.save()  # in the middle of sampling: what runs begins again
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
        self.rollouts = collector(self.admission, self.engines)
        self.rollouts.restore(state)
        self.rollouts.settle(self.step)

    def ended(self) -> list[int]:
        """All that has ended, or waits: by number."""
        state = self.rollouts.snapshot()
        waiting = [ticket.number for ticket, _ in state.ledger.tickets]
        return sorted([number for number, _ in self.trained] + waiting)


@pytest.mark.parametrize("kind", ["rounds", "window"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_killed_every_prompt_is_trained_once_in_order(kind: str, seed: int, tmp_path: Path) -> None:
    """100 kills a run: between steps, in the middle of sampling, and after a batch was taken; saves at all of these.

    No group is rejected: what is trained is then 0 … n, each once, with the problem that the order has there.
    """
    drawn = random.Random(seed)
    size, batch = drawn.randint(1, 4), drawn.randint(1, 6)
    admission = Rounds(size, batch, 50, carries_surplus=True) if kind == "rounds" else Window(size, drawn.randint(0, 2))
    run = Run(admission, Engines(), drawn, tmp_path)
    while run.kills < 100:
        run.live()
    run.engines.calls_to_live = 10**9
    for _ in range(3):
        run.step += 1
        run.trained += [(ticket.number, ticket.problem) for ticket in batch_of(run.rollouts).tickets]
        run.rollouts.settle(run.step)
    order = PromptSampler(len(PROBLEMS), seed=1, shuffle=True).take(len(run.trained))
    assert run.trained == [(number, PROBLEMS[index].id) for number, index in enumerate(order)]
    assert run.saves > 20 and len(run.trained) > 3 * size, "the control: it got somewhere"


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
    whole = begun(admission, Engines(rejects))
    trained = []
    for step in range(1, broken.step + 1):
        batch_of(whole)
        trained += [(ticket.number, ticket.problem) for ticket in whole.settle(step)]
    assert broken.trained == trained
    broken.engines.calls_to_live = 10**9
    next_one, expected = batch_of(broken.rollouts), batch_of(whole)
    assert [replace(ticket, attempt=0) for ticket in next_one.tickets] == list(expected.tickets)
    assert next_one.groups == expected.groups


def test_what_runs_at_a_snapshot_begins_again_as_another_attempt(tmp_path: Path) -> None:
    rollouts = begun(Rounds(2, 3, 9, carries_surplus=True))
    sampling = rollouts.next_batch()
    next(sampling)
    state = through_files(rollouts.snapshot(), tmp_path / "step-000000", step=0)
    assert [(ticket.attempt, at) for ticket, at in state.ledger.tickets] == [(1, State.OPEN)] * 3
    resumed = collector(Rounds(2, 3, 9, carries_surplus=True), Engines())
    resumed.restore(state)
    assert [(ticket.number, ticket.attempt) for ticket in batch_of(resumed).tickets] == [(0, 1), (1, 1)]
