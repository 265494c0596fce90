"""Why: a loss that is not finite left every update out, and the run went to its end as if it had trained.

Not covered: how an update finds its gradient's norm (test_layouts.py), and the run's end by the error.
"""

import pytest

from megatron_fipo.errors import FipoError
from megatron_fipo.policy.finite_updates import FiniteUpdates


def step(updates: int, left_out: int) -> dict[str, float]:
    return {"updates": float(updates), "updates_skipped": float(left_out)}


def test_two_steps_in_vain_end_the_run() -> None:
    check = FiniteUpdates()
    assert check.judge(step(4, 4)) == "4 updates left out, their gradients are not finite"
    with pytest.raises(FipoError, match="no update of 2 steps in a row had a finite gradient"):
        check.judge(step(1, 1))


def test_a_spike_does_not() -> None:
    check = FiniteUpdates()
    for updates, left_out in ((1, 1), (1, 0), (4, 4), (4, 3), (1, 1), (0, 0), (1, 1)):
        assert (check.judge(step(updates, left_out)) is None) == (left_out == 0)
