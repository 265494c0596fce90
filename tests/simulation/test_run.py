"""Why: the simulator decides on splits of a thousand GPUs, so what it plays has to be what the admission and the ledger
do, and its seconds have to be right wherever they can be worked out by hand.

Not covered: whether the planner's costs are those of a GPU, which only one can say.
"""

from dataclasses import replace

import pytest

from megatron_fipo.rollout.admission import Refill, Rounds, Window
from megatron_fipo.rollout.ledger import Ledger, Ticket
from megatron_fipo.simulation.costs import EngineSize, MeasuredDecoding
from megatron_fipo.simulation.engine import Engine, Sequence
from megatron_fipo.simulation.lengths import Lengths
from megatron_fipo.simulation.run import Simulation
from megatron_fipo.simulation.settings import Troubles
from tests.simulation.scenes import PROMPTS, SAMPLES, SETTINGS, WITH_TROUBLES, Costly, played, rounds, scene

REFILLS = [Refill(PROMPTS, over, 10**9, carries) for over in (1.0, 1.5) for carries in (True, False)]
WINDOWS = [*(Window(PROMPTS, k) for k in (0, 1, 2, 4)), *(Window(PROMPTS, k, over_sampling=2.0) for k in (1, 2))]
ADMISSIONS = [rounds(), rounds("drop"), *REFILLS, *WINDOWS]


@pytest.mark.parametrize("troubles", [Troubles(), WITH_TROUBLES], ids=["sound", "failing"])
@pytest.mark.parametrize("cache_tokens", [float("inf"), 2500], ids=["ample", "tight"])
@pytest.mark.parametrize("admission", ADMISSIONS, ids=str)
def test_each_ticket_is_trained_once_and_no_older_than_k(
    admission: Rounds | Refill | Window, cache_tokens: float, troubles: Troubles
) -> None:
    """Also where engines fail and caches overflow. The ledger itself refuses what does not add up, at each step."""
    run = played(scene(admission, cache_tokens=cache_tokens), troubles=troubles, seed=3)
    numbers = [number for step in run.steps for number in step.numbers]
    assert len(numbers) == len(set(numbers)) == PROMPTS * len(run.steps)
    lags = {lag for step in run.steps for lag in step.lags}
    if isinstance(admission, Window):
        assert lags <= set(range(admission.max_off_policy_steps + 1))
        assert numbers == sorted(numbers), "a window trains in the order of opening"
        assert max(lags) > 0 or admission.max_off_policy_steps == 0, "the control: windows do overlap"
    elif not admission.carries_surplus:
        assert lags == {0}


def test_what_is_stopped_takes_no_more_of_an_engine() -> None:
    """Over-sampling without any rejection: the step is full when its own samples end, and the others are taken off."""
    constant = Lengths(mean=100, spread=0, longest=1000)
    few = {"lengths": constant, "rejected": 0.0}
    parts = [
        scene(Refill(PROMPTS, over, 10**9, False), engines=1, places=48, costs=MeasuredDecoding(0.0, 0.01))
        for over in (1.0, 1.5)
    ]
    alone, more = (played(each, **few) for each in parts)
    assert [len(step.numbers) for step in more.steps] == [PROMPTS] * len(more.steps)
    # 32 samples take 32 s; 48 at a time end together, 16 of them for nothing.
    assert alone.steps[0].end == pytest.approx(32 + 3.5) and more.steps[0].end == pytest.approx(48 + 3.5)
    assert more.steps[1].end - more.steps[0].end == pytest.approx(48 + 3.5), "nothing is left of the step before"


def test_one_engine_with_constant_lengths_is_exact() -> None:
    """32 samples in 8 places, 4 waves of 100 tokens each; caches grow from 8 × 50 to 8 × 150 tokens in a wave."""
    constant = Lengths(mean=100, spread=0, longest=1000)
    run = played(scene(Window(PROMPTS, 0), engines=1), lengths=constant, rejected=0.0)
    prefill = 1e-4 * 50 / SAMPLES * 8
    wave = prefill + 100 * (0.01 + 1e-3 * 8 + 1e-6 * 8 * (50 + 100 / 2))
    step = 4 * wave + 3.0 + 0.5
    ends = [step.end for step in run.steps]
    assert ends == pytest.approx([step * count for count in range(1, len(ends) + 1)], rel=1e-9)
    assert run.steps[0].tokens == PROMPTS * SAMPLES * 150
    assert run.steps[0].engines.tokens == pytest.approx(32 * 100)
    assert run.steps[0].engines.busy_s == pytest.approx(4 * wave)
    assert run.steps[0].engines.again == 0


def test_a_window_of_one_hides_the_shorter_of_sampling_and_training() -> None:
    """Constant lengths, nothing rejected: after its start a step takes the longer of both, and the weight update."""
    constant = Lengths(mean=100, spread=0, longest=1000)
    costs = MeasuredDecoding(0.01, 0.0)
    sampling = 4 * 100 * 0.01
    for trainer_s in (1.0, 9.0):
        parts = scene(Window(PROMPTS, 1), engines=1, costs=costs, trainer_s=trainer_s)
        ends = [step.end for step in played(parts, lengths=constant, rejected=0.0).steps]
        assert ends[-1] - ends[-2] == pytest.approx(max(sampling, trainer_s) + 0.5)


def test_a_sequence_that_is_alone_and_one_that_joins_it_are_exact() -> None:
    engine = Engine(MeasuredDecoding(0.0, 1.0), EngineSize(2, 1e9), 0, 1, 1, 1.0)
    first, second = (Sequence(ticket, length) for ticket, length in zip(_tickets(2), (10, 20), strict=True))
    engine.start(0.0, first)
    assert engine.next_event_s() == pytest.approx(10)
    engine.start(4.0, second)  # 6 tokens are left of the first, 2 s each from here on
    assert engine.next_event_s() == pytest.approx(12)
    assert engine.reach(16.0) == ([first], [])
    assert engine.next_event_s() == pytest.approx(14), "the other one is alone again"


def test_a_full_cache_puts_the_youngest_back_and_prefills_it_again() -> None:
    engine = Engine(Costly(), EngineSize(8, 300), 50, 1, 1, 1.0)
    old, young = (Sequence(ticket, 200) for ticket in _tickets(2))
    for sequence in (old, young):
        engine.start(0.0, sequence)
    seconds = engine.next_event_s()
    assert seconds is not None
    assert engine.reach(seconds) == ([], [young])
    assert young.done == pytest.approx(100) and engine.work.again == 0, "2 × (50 + 100) fill it"
    assert not engine.has_room(young)
    other = Engine(Costly(), EngineSize(8, 300), 50, 1, 1, 1.0)
    other.start(seconds, young)
    assert other.work.again == pytest.approx(150)


@pytest.mark.parametrize("admission", ADMISSIONS, ids=str)
def test_more_engines_are_never_slower_where_sampling_is_what_takes_long(admission: Rounds | Window) -> None:
    """At k = 0 the longest answers decide in the end."""
    for seed in range(4):
        ends = [played(scene(admission, engines, trainer_s=0.1), seed=seed).steps[-1].end for engines in (1, 2, 4, 8)]
        assert ends == sorted(ends, reverse=True) and ends[-1] < 0.7 * ends[0]


def test_a_seed_repeats_and_another_does_not() -> None:
    def ends(seed: int) -> list[float]:
        return [step.end for step in played(scene(Window(PROMPTS, 1)), seed=seed, troubles=WITH_TROUBLES).steps]

    assert ends(5) == ends(5) != ends(6)


def test_troubles_cost_time() -> None:
    sound = played(scene(Window(PROMPTS, 1))).steps[-1].end
    assert played(scene(Window(PROMPTS, 1)), troubles=WITH_TROUBLES).steps[-1].end > sound
    slow = scene(Window(PROMPTS, 1))
    engines = [Engine(Costly(), EngineSize(8, 1e9), 50, 1 / SAMPLES, 1, factor) for factor in (1.0, 3.0)]
    assert Simulation(replace(slow, engines=engines), SETTINGS).play().steps[-1].end > sound


def test_what_runs_through_a_weight_update_is_prefilled_again_unless_caches_are_kept() -> None:
    again = [
        played(scene(Window(PROMPTS, 2), recompute=recompute)).steps[-1].engines.again for recompute in (True, False)
    ]
    assert again[0] > 0 == again[1]


def _tickets(count: int) -> list[Ticket]:
    return Ledger().open([""] * count, lambda number: number)
