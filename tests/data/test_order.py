"""Why: if prompts are skipped or repeated at a resume, the run trains on other data, and nothing else shows it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from megatron_fipo.data.order import OrderState, PromptSampler
from megatron_fipo.errors import DataError


def test_every_epoch_has_every_problem_once_in_an_order_of_its_own():
    order = PromptSampler(size=50, seed=1, shuffle=True)
    first, second = order.take(50), order.take(50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert PromptSampler(size=50, seed=1, shuffle=True).take(50) == first
    assert PromptSampler(size=50, seed=2, shuffle=True).take(50) != first


def test_without_shuffle_the_order_is_that_of_the_source():
    assert PromptSampler(size=3, seed=1, shuffle=False).take(7) == [0, 1, 2, 0, 1, 2, 0]


@given(size=st.integers(1, 9), takes=st.lists(st.integers(0, 12), max_size=6), later=st.integers(0, 30))
def test_a_resumed_order_goes_on_where_it_stood(size, takes, later):
    order = PromptSampler(size, seed=5, shuffle=True)
    for count in takes:
        order.take(count)
    resumed = PromptSampler(size, seed=5, shuffle=True)
    resumed.load(order.state())
    assert resumed.take(later) == order.take(later)


@pytest.mark.parametrize("other", [(9, 0, True), (10, 1, True), (10, 0, False)])
def test_state_of_other_data_is_refused(other):
    state = PromptSampler(10, 0, True).state()
    with pytest.raises(DataError, match="skipped or repeated"):
        PromptSampler(*other).load(state)


def test_a_position_beyond_the_data_is_refused_and_does_not_draw_for_ever():
    """tests/loop_state tests other damage of the file."""
    order = PromptSampler(10, 0, True)
    with pytest.raises(DataError, match=r"order\.position is 11, and should be at most order\.size, 10"):
        order.load(replace(order.state(), position=11))
    assert len(order.take(25)) == 25


def test_other_data_begins_with_an_epoch_that_has_not_been_drawn():
    before = PromptSampler(10, 0, True)
    before.take(27)
    after = PromptSampler(5, 0, True)
    after.start_over(before.state())
    assert after.state() == OrderState(epoch=3, position=0, size=5, seed=0, shuffle=True)
    assert sorted(after.take(5)) == list(range(5))


def test_nothing_to_draw_from_is_refused():
    with pytest.raises(DataError, match="no training problem"):
        PromptSampler(0, 0, True)
