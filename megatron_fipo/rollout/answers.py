"""What a rollout server answers, checked once where it arrives: nothing else may be trained on."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy

from megatron_fipo.engines.generate_messages import PartFrame, SampleFrame, VersionSpan
from megatron_fipo.records.sample import Partial, Sample
from megatron_fipo.records.streams import ROLLOUT_LOG_PROBS, TOKEN_IDS, checked
from megatron_fipo.records.wire import Frame

GREATEST_LOG_PROB, LEAST_LOG_PROB = 1e-3, -1e4
"""What an engine's rounding leaves of a log-probability, and far below what its sampling can draw."""


class BadAnswer(Exception):
    """A server's answer that is not what was asked for. Says in words what is wrong with it."""


@dataclass(frozen=True)
class Asked:
    """What a server was asked for."""

    samples: int
    max_tokens: int
    stop_token_ids: Collection[int]
    vocab_size: int | None
    """None: not known, and not checked."""
    weight_version: int | None
    """The version in service; None: any."""


class Answer:
    """What has arrived of one request, each frame checked."""

    def __init__(self, asked: Asked, begun: Mapping[int, Partial] = MappingProxyType({})):
        """`begun`: by index, the responses that the request goes on with."""
        self.asked = asked
        self.arrived: set[int] = set()
        """Indices of the samples that are whole."""
        self._begun = begun
        self._partial: dict[int, Partial] = {}

    def read(self, frame: Frame, about: PartFrame | SampleFrame) -> Sample | Partial:
        """What there is now of a response, from its first token on. BadAnswer if anything is not as asked."""
        asked, index = self.asked, about.index
        if not 0 <= index < asked.samples:
            raise BadAnswer(f"there is a response {index}, and {asked.samples} were asked for")
        where = f"response {index}"
        if index in self.arrived:
            raise BadAnswer(f"{where} came twice")
        before = self._partial.get(index, self._begun.get(index))
        begun = len(self._begun.get(index, ()))
        sent = len(before or ()) - begun
        if about.start != sent:
            raise BadAnswer(f"{where} goes on at token {about.start}; {sent} have come")
        streams = self._streams(frame, before, where)
        if isinstance(about, PartFrame):
            if len(streams[TOKEN_IDS]) >= asked.max_tokens:
                raise BadAnswer(f"{where} goes on after {asked.max_tokens} tokens; no more were asked for")
            self._partial[index] = Partial(streams, _oldest(asked.weight_version, before))
            return self._partial[index]
        token_ids = streams[TOKEN_IDS]
        _check_end(token_ids, about.finish_reason, asked, where)
        version = _version(about.spans, len(token_ids) - begun, where)
        if asked.weight_version is not None and version != asked.weight_version:
            raise BadAnswer(f"{where} was sampled by weights {version}; {asked.weight_version} are in service")
        self.arrived.add(index)
        oldest = _oldest(version, self._begun.get(index))
        assert oldest is not None
        return Sample(streams, about.finish_reason, oldest)

    def _streams(self, frame: Frame, before: Partial | None, where: str) -> Mapping[str, numpy.ndarray]:
        """The response's streams with those of the frame."""
        try:
            streams = checked(frame.arrays, where)
        except ValueError as error:
            raise BadAnswer(str(error)) from None
        count, most = len(streams[TOKEN_IDS]), self.asked.max_tokens - len(before or ())
        if not 0 < count <= most:
            raise BadAnswer(f"{where} has {count} tokens; 1 to {most} were asked for")
        _check_values(streams, self.asked, where)
        return before.followed_by(streams) if before else streams


def _oldest(version: int | None, before: Partial | None) -> int | None:
    """The older of a version and a partial sample's, of those that are known."""
    known = [each for each in (version, before.weight_version if before else None) if each is not None]
    return min(known, default=None)


def _check_values(streams: Mapping[str, numpy.ndarray], asked: Asked, where: str) -> None:
    token_ids, log_probs = streams[TOKEN_IDS], streams[ROLLOUT_LOG_PROBS]
    least, greatest = int(token_ids.min()), int(token_ids.max())
    if least < 0 or (asked.vocab_size is not None and greatest >= asked.vocab_size):
        wrong = least if least < 0 else greatest
        size = "" if asked.vocab_size is None else f" of the model's {asked.vocab_size}"
        raise BadAnswer(f"{where} has the token id {wrong}, which is none{size}")
    for name, values in streams.items():
        if not numpy.isfinite(values).all():
            raise BadAnswer(f"{where} has {name} that are not finite: the engine's weights or logits are broken")
    if log_probs.max() > GREATEST_LOG_PROB or log_probs.min() < LEAST_LOG_PROB:
        raise BadAnswer(f"{where} has log-probs from {log_probs.min():g} to {log_probs.max():g}")


def _check_end(token_ids: numpy.ndarray, finish_reason: str, asked: Asked, where: str) -> None:
    if finish_reason not in ("stop", "length"):
        raise BadAnswer(f"{where} ended with {finish_reason!r} instead of stop or length")
    if finish_reason == "length" and len(token_ids) < asked.max_tokens:
        raise BadAnswer(f"{where} was cut off at {len(token_ids)} tokens; {asked.max_tokens} were asked for")
    if finish_reason == "stop" and int(token_ids[-1]) not in asked.stop_token_ids:
        raise BadAnswer(f"{where} stopped with the token {int(token_ids[-1])}, which is no stop token")


def _version(spans: list[VersionSpan], length: int, where: str) -> int:
    """The oldest of the versions that sampled a response; more than one only if an update came in its middle."""
    shown = [(span.version, span.start, span.end) for span in spans]
    if not spans or not all(span.version.isascii() and span.version.isdigit() for span in spans):
        raise BadAnswer(f"{where} has weight versions {shown}; each should be an integer")
    ends = [0, *(span.end for span in spans)]
    if ends[:-1] != [span.start for span in spans] or ends[-1] != length or ends != sorted(set(ends)):
        raise BadAnswer(f"{where} has weight versions {shown}, which are not of its tokens 0 to {length}")
    return min(int(span.version) for span in spans)
