"""Group-relative advantages and the overlong penalty. They are a few numbers per prompt, so this is plain Python."""

from collections.abc import Sequence
from statistics import fmean, stdev

_STD_EPSILON = 1e-6


def group_advantages(rewards: Sequence[float], *, norm_by_std: bool) -> list[float]:
    """Return A = (R − mean R) / (std R + 1e-6) over the samples of one prompt, with the unbiased standard deviation.

    `rewards` are the rewards of the group's responses, overlong penalty included. The result has the same length and is
    dimensionless. `norm_by_std=False` (Dr. GRPO) leaves out the division. If a group has only one response, there is
    nothing to compare it with, and its advantage is 0.
    """
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    centred = [reward - mean for reward in rewards]
    if not norm_by_std:
        return centred
    scale = stdev(rewards) + _STD_EPSILON
    return [value / scale for value in centred]


def overlong_penalty(length: int, *, max_response_length: int, buffer_length: int, penalty_factor: float) -> float:
    """Return min(−(length − (max_response_length − buffer_length)) / buffer_length × penalty_factor, 0).

    This is zero up to the buffer, then falls linearly to −penalty_factor at `max_response_length`. Lengths are in
    tokens.
    """
    excess = length - (max_response_length - buffer_length)
    return min(-excess / buffer_length * penalty_factor, 0.0)
