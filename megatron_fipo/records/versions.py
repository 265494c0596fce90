"""Which weights sampled which tokens of a sample."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class VersionSpan:
    """Tokens [start, end) after the prompt were sampled by the weights of `version`."""

    version: int
    start: int
    end: int

    def __len__(self) -> int:
        """Tokens."""
        return self.end - self.start

    def moved(self, by: int) -> "VersionSpan":
        """The span, so many tokens later."""
        return VersionSpan(self.version, self.start + by, self.end + by)


def joined(spans: Iterable[VersionSpan]) -> tuple[VersionSpan, ...]:
    """Spans in order, those of one version that follow each other as one; empty ones are left out."""
    found: list[VersionSpan] = []
    for span in spans:
        if found and (found[-1].version, found[-1].end) == (span.version, span.start):
            found[-1] = VersionSpan(span.version, found[-1].start, span.end)
        elif len(span):
            found.append(span)
    return tuple(found)


def oldest(spans: Iterable[VersionSpan]) -> int:
    """The oldest version of some spans."""
    return min(span.version for span in spans)


def mixed(spans: tuple[VersionSpan, ...]) -> tuple[VersionSpan, ...]:
    """The spans if they are of several versions. Else none: one number says it all."""
    return spans if len({span.version for span in spans}) > 1 else ()
