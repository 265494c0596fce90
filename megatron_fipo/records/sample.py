"""A sample, what its reward function said of it, and the group of samples of one problem. None of them ever changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy

from megatron_fipo.records.problem import Problem
from megatron_fipo.records.segments import Segment
from megatron_fipo.records.streams import ROLLOUT_LOG_PROBS, TOKEN_IDS, checked, sampled_streams
from megatron_fipo.records.versions import VersionSpan, joined

FAILED_CHECKS = ("timeout", "crash")
"""Outcomes of a check that came to no verdict."""


@dataclass(frozen=True)
class RewardResult:
    """The verdict on one sample."""

    accuracy: float
    """1 right, 0 wrong; fractions where a scorer gives them. Says nothing unless `was_judged`."""
    reward: float
    """What the advantage is computed from: correct/incorrect plus the overlong penalty. Likewise."""
    answer: str
    """What was extracted, for consensus voting and for readers."""
    outcome: str
    """judged; too_long, an answer above the rule's limit, which is wrong; or one of FAILED_CHECKS."""
    extra: dict[str, float | str] = field(default_factory=dict)
    """What else a reward of the user's own said, by its names: numbers become metrics."""

    @property
    def was_judged(self) -> bool:
        """Whether this is a verdict: a check that failed is not a wrong answer, in training and in metrics."""
        return self.outcome not in FAILED_CHECKS


@dataclass(frozen=True, eq=False)
class Sample:
    """One sampled continuation of a prompt: what the policy wrote, and what it was told on the way."""

    streams: Mapping[str, numpy.ndarray]
    """What `streams.checked` returns: a value for each token after the prompt, an end-of-sequence token included. The
    prompt is the group's. Whole streams, where a run asks for them, begin with the prompt's tokens."""
    finish_reason: str
    """stop; length when max_response_length cut it off; turns when environment.max_turns did; environment where that
    failed."""
    weight_version: int
    """The oldest version of the weights that sampled a token of it."""
    text: str = ""
    """The sampled tokens decoded, for rewards and for readers; empty before that."""
    result: RewardResult | None = None
    """None before it is judged."""
    segments: tuple[Segment, ...] = ()
    """What `segments.checked_segments` returns. Empty: all of it is one action, as in every sample of one turn."""
    spans: tuple[VersionSpan, ...] = ()
    """What `versions.joined` returns, of all actions. Empty: all of it is of `weight_version`."""

    def __len__(self) -> int:
        """Tokens after the prompt: actions, and the context between them."""
        return len(self.token_ids)

    @property
    def token_ids(self) -> numpy.ndarray:
        """[n] int32: the tokens after the prompt."""
        return self.streams[TOKEN_IDS]

    @property
    def told(self) -> tuple[Segment, ...]:
        """The segments that the policy did not produce."""
        return tuple(segment for segment in self.segments if not segment.action)

    @property
    def versions(self) -> tuple[VersionSpan, ...]:
        """Which weights sampled which of its actions."""
        if self.spans:
            return self.spans
        segments = self.segments or (Segment(0, len(self), action=True),)
        return joined(VersionSpan(self.weight_version, each.start, each.end) for each in segments if each.action)

    @property
    def actions(self) -> int:
        """Tokens that the policy produced."""
        return len(self) - sum(segment.end - segment.start for segment in self.told)

    @property
    def turns(self) -> int:
        """How often the policy spoke."""
        return sum(segment.action for segment in self.segments) if self.segments else min(len(self), 1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sample):
            return NotImplemented
        ours, theirs = (
            (each.finish_reason, each.versions, each.text, each.result, each.segments) for each in (self, other)
        )
        return ours == theirs and _are_equal(self.streams, other.streams)


@dataclass(frozen=True, eq=False)
class Partial:
    """The beginning of a sample: what another server can go on from."""

    streams: Mapping[str, numpy.ndarray]
    """As a sample's."""
    weight_version: int | None
    """The oldest version of the weights that may have sampled a token of it; None while servers have their own."""
    spans: tuple[VersionSpan, ...] = ()
    """As a sample's; a token's may be older than it is, never younger."""

    @property
    def versions(self) -> tuple[VersionSpan, ...]:
        """Which weights may have sampled which tokens; none while servers have their own."""
        if self.spans or self.weight_version is None:
            return self.spans
        return (VersionSpan(self.weight_version, 0, len(self)),)

    def __len__(self) -> int:
        """Sampled tokens."""
        return len(self.streams[TOKEN_IDS])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Partial):
            return NotImplemented
        return self.versions == other.versions and _are_equal(self.streams, other.streams)

    def followed_by(self, streams: Mapping[str, numpy.ndarray]) -> Mapping[str, numpy.ndarray]:
        """Its streams with those of the tokens that came next, and whole ones as they came: they have all tokens."""
        table = sampled_streams()
        joined = {
            name: numpy.concatenate([self.streams[name], values]) if name in table else values
            for name, values in streams.items()
        }
        return checked(joined, "a sample")


def _are_equal(ours: Mapping[str, numpy.ndarray], theirs: Mapping[str, numpy.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(numpy.array_equal(ours[name], theirs[name]) for name in ours)


def sample_from_lists(
    token_ids: Sequence[int], log_probs: Sequence[float], finish_reason: str, weight_version: int
) -> Sample:
    """A sample of plain lists; streams beside these two have their fill, and there are no whole ones.

    Raises:
        ValueError: the lists have different lengths.
        OverflowError: a token id is no 32-bit number. A log-prob may become infinite.
    """
    with numpy.errstate(over="ignore"):
        streams = {
            name: numpy.full(len(token_ids), stream.fill, stream.dtype) for name, stream in sampled_streams().items()
        }
        streams[TOKEN_IDS] = numpy.array(token_ids, numpy.int32)
        streams[ROLLOUT_LOG_PROBS] = numpy.array(log_probs, numpy.float32)
    return Sample(checked(streams, "a sample"), finish_reason, weight_version)


@dataclass(frozen=True)
class Group:
    """All samples of one problem: the unit of advantages and of dynamic sampling."""

    problem: Problem
    samples: tuple[Sample, ...]

    @property
    def results(self) -> tuple[RewardResult, ...]:
        """The verdict on each sample. ValueError before all are judged."""
        found = tuple(sample.result for sample in self.samples if sample.result is not None)
        if len(found) != len(self.samples):
            raise ValueError(f"problem {self.problem.id}: {len(found)} of {len(self.samples)} samples are judged")
        return found

    def with_texts(self, texts: Sequence[str]) -> "Group":
        """The same samples, decoded."""
        pairs = zip(self.samples, texts, strict=True)
        return replace(self, samples=tuple(replace(sample, text=text) for sample, text in pairs))

    def with_results(self, results: Sequence[RewardResult]) -> "Group":
        """The same samples, judged."""
        pairs = zip(self.samples, results, strict=True)
        return replace(self, samples=tuple(replace(sample, result=result) for sample, result in pairs))
