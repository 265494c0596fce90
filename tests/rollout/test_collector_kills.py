"""Why: a run that is killed and resumed must train every prompt once, and sample no token twice that a checkpoint has.

The real collector, ledger, admission and checkpoint files are killed hundreds of times, at random points; engines are
a coroutine (seeded_engines.py). Whole runs that are killed are tests/end_to_end.
"""

import dataclasses
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from megatron_fipo.data.order import PromptSampler
from megatron_fipo.errors import DataError
from megatron_fipo.records.problem import prompt_ids
from megatron_fipo.records.sample import Partial, Sample
from megatron_fipo.rollout.admission import Admission, Refill, Rounds, Window
from megatron_fipo.rollout.collector import CollectorState
from megatron_fipo.rollout.ledger import State
from tests.rollout.seeded_engines import (
    PROBLEMS,
    Engines,
    Killed,
    batch_of,
    begun,
    collector,
    numbers,
    through_files,
)


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


def in_its_middle() -> tuple[CollectorState, Engines]:
    """A window of k = 2 after its first step: samples have ended, have begun, and wait."""
    engines = Engines()
    rollouts = begun(Window(2, 2), engines, overlaps=True)
    batch_of(rollouts, engines)
    rollouts.settle(1)
    engines.go_on(9)
    return rollouts.snapshot(), engines


def test_a_resume_samples_no_token_of_the_checkpoint_again(tmp_path: Path) -> None:
    """Every token that was there is part of what is trained on, whether its sample had ended or not."""
    found, engines = in_its_middle()
    state = through_files(found, tmp_path / "step", step=1)
    parts = [part for group in state.begun.values() for part in group.parts.values()]
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


def test_what_was_begun_with_another_prompt_is_refused() -> None:
    state, _ = in_its_middle()
    others = [dataclasses.replace(problem, token_ids=prompt_ids([3])) for problem in PROBLEMS]
    changed = collector(Window(2, 2), Engines(), others, overlaps=True)
    with pytest.raises(DataError, match=r"was begun with another prompt of the problem p\d than the data has now"):
        changed.restore(state)
    assert changed.restore(state, discard=True) > 0


@pytest.mark.slow
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
