"""Metrics of how responses become long: by reasoning that checks itself, or by repetition and padding.

Lengths are of all responses of a step. Texts and tokens are read in at most `READ_RESPONSES` responses, spread evenly
over the step, so that the cost is bounded: at 512, a share of a half is known within 0.04 (two standard errors).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy

from megatron_fipo.config.loop import TrackingConfig
from megatron_fipo.records.sample import Group, Sample

READ_RESPONSES = 512
_NGRAM = 8
"""Tokens in a row that count as repeated if the response has had them before."""
_MULTIPLIER = numpy.uint64(0x9E3779B97F4A7C15)
_PADDING = re.compile(r"\\(?:q?quad|[hv]space|h?phantom|displaystyle|[,;:! ])")
"""LaTeX that moves and shows nothing."""

_PLAIN = re.compile(r"(\\b)?([\w ',;:!-]+)(\\b)?")
"""A pattern that is a text, perhaps a whole word."""


@dataclass(frozen=True)
class Marker:
    """A pattern, which matches letters of either case."""

    pattern: re.Pattern[str]
    plain: str | None
    """The text in every match, in small letters. Finding it is ten times as fast as searching the pattern."""
    is_whole: bool
    """Finding `plain` is enough."""

    def is_in(self, text: str, lowered: str) -> bool:
        """Return whether the pattern matches somewhere in `text`, of which `lowered` is `text.lower()`."""
        if self.plain is None:
            return self.pattern.search(text) is not None
        at = lowered.find(self.plain)
        while at >= 0 and not self.is_whole and self.pattern.match(lowered, at) is None:
            at = lowered.find(self.plain, at + 1)
        return at >= 0


Markers = Mapping[str, Sequence[Marker]]
"""Kinds of markers, with those of each."""


def compiled_markers(config: TrackingConfig) -> Markers:
    """Return the patterns of the configuration, which config/checks_tracking.py keeps to those of linear time."""
    kinds = {name: getattr(config, f"{name}_markers") for name in ("reflection", "verification", "backtracking")}
    return {name: [_marker(text) for text in texts] for name, texts in kinds.items()}


def _marker(text: str) -> Marker:
    found, pattern = _PLAIN.fullmatch(text), re.compile(text, re.IGNORECASE)
    if found is None:
        return Marker(pattern, None, is_whole=False)
    return Marker(pattern, found[2].lower(), is_whole=found[1] is None and found[3] is None)


def phase_metrics(sampled: Sequence[Group], markers: Markers) -> dict[str, float]:
    """Return one step's metrics: lengths of right and wrong responses, markers, repetition and padding.

    Right is an accuracy of a half or more. Lengths leave out responses without a verdict.
    """
    return _lengths(sampled) | _texts([sample for group in sampled for sample in group.samples], markers)


def _lengths(sampled: Sequence[Group]) -> dict[str, float]:
    pairs = [
        (sample.actions, result.accuracy >= 0.5)
        for group in sampled
        for sample, result in zip(group.samples, group.results, strict=True)
        if result.was_judged
    ]
    metrics: dict[str, float] = {}
    for name, wanted in (("right", True), ("wrong", False)):
        lengths = [length for length, is_right in pairs if is_right == wanted]
        if lengths:
            metrics[f"response_length_{name}_mean"] = float(numpy.mean(lengths))
            for q, value in zip((10, 50, 90), numpy.percentile(lengths, (10, 50, 90)), strict=True):
                metrics[f"response_length_{name}_q{q}"] = float(value)
    return metrics


def _texts(samples: Sequence[Sample], markers: Markers) -> dict[str, float]:
    count = min(len(samples), READ_RESPONSES)
    read = [samples[index * len(samples) // count] for index in range(count)]
    if not read:
        return {}
    pairs = [(sample.text, sample.text.lower()) for sample in read]
    metrics = {
        f"marker_share_{name}": sum(any(marker.is_in(*pair) for marker in kind) for pair in pairs) / count
        for name, kind in markers.items()
    }
    characters = sum(len(sample.text) for sample in read)
    padding = sum(len(match[0]) for sample in read for match in _PADDING.finditer(sample.text))
    repeated = [repeated_share(_actions(sample)) for sample in read]
    return metrics | {
        "repeated_ngrams": float(numpy.mean(repeated)),
        "latex_padding": padding / characters if characters else 0.0,
    }


def repeated_share(token_ids: numpy.ndarray) -> float:
    """Return the share of runs of 8 tokens that the response, [n] int32, has had before; 0 if it is shorter."""
    windows = len(token_ids) - _NGRAM + 1
    if windows < 1:
        return 0.0
    # A polynomial of the tokens, modulo 2^64: two runs that differ have the same one by a chance of 1e-12 or less.
    hashed = numpy.zeros(windows, numpy.uint64)
    tokens = (token_ids.astype(numpy.uint64) + numpy.uint64(1)) * _MULTIPLIER
    tokens ^= tokens >> numpy.uint64(32)
    for offset in range(_NGRAM):
        hashed = hashed * _MULTIPLIER + tokens[offset : offset + windows]
    return 1 - len(numpy.unique(hashed)) / windows


def _actions(sample: Sample) -> numpy.ndarray:
    """[actions] int32: the tokens that the policy produced."""
    return numpy.concatenate([*_parts(sample)]) if sample.segments else sample.token_ids


def _parts(sample: Sample) -> Iterator[numpy.ndarray]:
    for segment in sample.segments:
        yield sample.token_ids[segment.start : segment.end if segment.action else segment.start]
