"""What the policy produced of a sample, and what it was told: no token is both, or neither.

Why: a token of a tool's answer that counts as an action is trained on as if the policy had chosen it, and nothing else
shows it. What batches and losses make of segments is in tests/policy.
"""

import pytest

from megatron_fipo.records.sample import sample_from_lists
from megatron_fipo.records.segments import Segment, checked_segments, segments_around


def test_a_sample_of_one_turn_is_one_action():
    sample = sample_from_lists([7, 7, 7], [-0.5] * 3, "stop", 0)
    assert (sample.actions, sample.turns, sample.told) == (3, 1, ())
    assert sample_from_lists([], [], "stop", 0).turns == 0


@pytest.mark.parametrize(
    ("told", "kinds"),
    [([(2, 4)], [True, False, True]), ([(0, 1)], [False, True]), ([(1, 2), (3, 6)], [True, False] * 2 + [True])],
)
def test_segments_cover_every_token_once(told: list[tuple[int, int]], kinds: list[bool]):
    found = segments_around(told, 8, "a sample")
    assert [segment.action for segment in found] == kinds
    assert [(segment.start, segment.end) for segment in found if not segment.action] == told
    assert [place for segment in found for place in range(segment.start, segment.end)] == list(range(8))


@pytest.mark.parametrize("told", [[(2, 2)], [(3, 9)], [(4, 8)], [(3, 5), (4, 6)], [(3, 4), (4, 5)], [(5, 3)]])
def test_stretches_that_cannot_be_are_refused(told: list[tuple[int, int]]):
    with pytest.raises(ValueError, match="response 3 has the segments"):
        segments_around(told, 8, "response 3")


def test_segments_that_leave_tokens_out_are_refused():
    with pytest.raises(ValueError, match="should have some that cover 0 to 4"):
        checked_segments([Segment(0, 3, action=True)], 4, "a sample")
    with pytest.raises(ValueError, match="the segments none"):
        checked_segments([], 4, "a sample")
