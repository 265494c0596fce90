"""Why: ways to deal groups are chosen by simulation, so each has to do what it says, and lose nothing.

Not covered: which way is best, which is the benchmark's to say.
"""

from dataclasses import replace

import pytest

from megatron_fipo.rollout.admission import Refill, Rounds, Window
from megatron_fipo.simulation.costs import MeasuredDecoding
from megatron_fipo.simulation.fleet import Dispatch, Place
from megatron_fipo.simulation.lengths import Lengths
from megatron_fipo.simulation.settings import Troubles
from tests.simulation.scenes import PROMPTS, SAMPLES, WITH_TROUBLES, played, rounds, scene

DISPATCHES = [
    Dispatch(Place.TURNS, 10**9),
    Dispatch(Place.SAMPLES, 16),
    Dispatch(Place.TOKENS, 16, longest_first=True),
    Dispatch(Place.SAMPLES, SAMPLES, longest_first=True, foresight=True),
]
ALIKE = Lengths(mean=200, spread=0.8, longest=1000, alike=0.7)


@pytest.mark.parametrize("troubles", [Troubles(), WITH_TROUBLES], ids=["sound", "failing"])
@pytest.mark.parametrize("admission", [rounds(), Refill(PROMPTS, 1.5, 10**9, False), Window(PROMPTS, 1)], ids=str)
@pytest.mark.parametrize("dispatch", DISPATCHES, ids=str)
def test_each_ticket_is_trained_once(
    dispatch: Dispatch, admission: Rounds | Refill | Window, troubles: Troubles
) -> None:
    """Also where engines fail, groups are stopped and caches overflow."""
    parts = replace(scene(admission, cache_tokens=2500), dispatch=dispatch)
    numbers = [number for step in played(parts, lengths=ALIKE, troubles=troubles).steps for number in step.numbers]
    assert len(numbers) == len(set(numbers)) == PROMPTS * 14


def test_the_longest_first_end_a_step_sooner() -> None:
    """One place for a group on each of two engines, and all samples of a group alike: the textbook's two machines."""

    def seconds(dispatch: Dispatch) -> float:
        parts = scene(rounds("drop"), places=SAMPLES, costs=MeasuredDecoding(0.01, 0.0))
        lengths = replace(ALIKE, alike=1.0)
        return played(replace(parts, dispatch=dispatch), lengths=lengths, rejected=0.0).steps[-1].end

    longest = seconds(Dispatch(Place.SAMPLES, SAMPLES, longest_first=True))
    oldest = seconds(Dispatch(Place.SAMPLES, SAMPLES))
    in_turns = seconds(Dispatch(Place.TURNS, 10**9))
    assert longest < oldest < in_turns
    # Without anything known beforehand the order is that of age.
    unknown = Lengths(mean=200, spread=0.8, longest=1000)
    ends = [
        played(replace(scene(rounds()), dispatch=Dispatch(Place.SAMPLES, 16, longest_first=first)), lengths=unknown)
        for first in (True, False)
    ]
    assert ends[0].steps[-1].end == ends[1].steps[-1].end


def test_an_engine_has_no_more_samples_than_it_is_asked_for() -> None:
    """Eight places, of which four are asked for: twice the time of eight where each step takes as long."""

    def seconds(most: int) -> float:
        parts = scene(rounds("drop"), engines=1, costs=MeasuredDecoding(0.01, 0.0))
        constant = Lengths(mean=100, spread=0, longest=1000)
        dispatch = Dispatch(Place.SAMPLES, most)
        return played(replace(parts, dispatch=dispatch), lengths=constant, rejected=0.0).steps[0].end

    trains = 3.5
    assert seconds(4) - trains == pytest.approx(2 * (seconds(8) - trains), rel=0.01)
