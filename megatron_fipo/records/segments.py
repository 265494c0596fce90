"""Which tokens of a sample the policy produced, and which it was told. Plain Python."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of a sample, counted from the end of its prompt."""

    start: int
    end: int
    action: bool
    """The policy produced them, and is trained on them. Otherwise they are context: a tool's answer, a later turn of a
    user's."""


def checked_segments(segments: Iterable[Segment], length: int, what: str) -> tuple[Segment, ...]:
    """The segments of a sample of `length` tokens.

    Raises:
        ValueError: they do not cover the sample one after the other, do not alternate, or end with context, which
            nothing follows. `what` begins it.
    """
    found = tuple(segments)
    starts, ends = [segment.start for segment in found], [segment.end for segment in found]
    if [*starts, length] != [0, *ends] or any(start >= end for start, end in zip(starts, ends, strict=True)):
        places = ", ".join(f"{segment.start} to {segment.end}" for segment in found)
        raise ValueError(f"{what} has the segments {places or 'none'}, and should have some that cover 0 to {length}")
    kinds = [segment.action for segment in found]
    if not kinds[-1] or any(kind == after for kind, after in pairwise(kinds)):
        shown = ", ".join("action" if kind else "context" for kind in kinds)
        raise ValueError(f"{what} has the segments {shown}; action and context should alternate, an action the last")
    return found


def segments_around(told: Iterable[Sequence[int]], length: int, what: str) -> tuple[Segment, ...]:
    """The segments of a sample of `length` tokens with the stretches [start, end) of context `told`; () without any.

    Raises:
        ValueError: they leave no alternating segments. `what` begins it.
    """
    found: list[Segment] = []
    for start, end in told:
        before = found[-1].end if found else 0
        if start != before:
            found.append(Segment(before, start, action=True))
        found.append(Segment(start, end, action=False))
    if not found:
        return ()
    if found[-1].end != length:
        found.append(Segment(found[-1].end, length, action=True))
    return checked_segments(found, length, what)
