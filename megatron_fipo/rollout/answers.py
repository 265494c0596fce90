"""What a rollout server answers, checked once where it arrives: nothing else may be trained on."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy

from megatron_fipo.engines.generate_messages import PartFrame, SampleFrame
from megatron_fipo.engines.generate_messages import VersionSpan as SpanOfServer
from megatron_fipo.records.routes import UNKNOWN_BYTE, RouteFormat
from megatron_fipo.records.sample import Partial, Sample
from megatron_fipo.records.streams import ROLLOUT_LOG_PROBS, ROUTED_EXPERTS, TOKEN_IDS, checked
from megatron_fipo.records.versions import VersionSpan, joined, mixed, oldest
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
    """The version in service then; None: any."""
    prompt_tokens: int = 0
    """Counted where routed experts are asked for."""
    routes: RouteFormat | None = None
    """What the experts of its tokens look like; None: they were not asked for."""


class Answer:
    """What has arrived of one request, each frame checked."""

    def __init__(
        self,
        asked: Asked,
        begun: Mapping[int, Partial] = MappingProxyType({}),
        present_version: Callable[[], int | None] | None = None,
    ):
        """See the arguments.

        Args:
            begun: by index, the responses that the request goes on with.
            present_version: the version that is in service by now, where that may be another one.
        """
        self.asked = asked
        self._present_version = present_version or (lambda: asked.weight_version)
        self._versions: dict[int, int | None] = {}
        """By index, what was in service when a part of it came last."""
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
        self._check_routes(streams, isinstance(about, SampleFrame), where)
        if isinstance(about, PartFrame):
            if len(streams[TOKEN_IDS]) >= asked.max_tokens:
                raise BadAnswer(f"{where} goes on after {asked.max_tokens} tokens; no more were asked for")
            return self._part(index, before, streams)
        token_ids = streams[TOKEN_IDS]
        _check_end(token_ids, about.finish_reason, asked, where)
        spans = _spans(about.spans, len(token_ids) - begun, where)
        self._check_versions(spans, where)
        self.arrived.add(index)
        first = self._begun.get(index)
        known = joined([*(first.versions if first else ()), *(span.moved(begun) for span in spans)])
        return Sample(streams, about.finish_reason, oldest(known), spans=mixed(known))

    def _part(self, index: int, before: Partial | None, streams: Mapping[str, numpy.ndarray]) -> Partial:
        """What has come of a response. Its new tokens may all be of the weights that were there before."""
        version = self._versions.get(index, self.asked.weight_version)
        self._versions[index] = self._present_version()
        known = before.versions if before else ()
        if version is not None:
            new = VersionSpan(version, len(before or ()), len(streams[TOKEN_IDS]))
            known = joined([*known, new])
        self._partial[index] = Partial(streams, oldest(known) if known else None, mixed(known))
        return self._partial[index]

    def _check_versions(self, spans: Sequence[VersionSpan], where: str) -> None:
        """BadAnswer for weights that were not in service, or in another order than they were."""
        first, newest = self.asked.weight_version, self._present_version()
        if first is None or newest is None:
            return
        versions = [span.version for span in spans]
        if versions != sorted(versions) or not first <= versions[0] <= versions[-1] <= newest:
            found = " and ".join(map(str, dict.fromkeys(versions)))
            right = f"{first} are" if first == newest else f"{first} to {newest} were"
            raise BadAnswer(f"{where} was sampled by weights {found}; {right} in service")

    def _check_routes(self, streams: Mapping[str, numpy.ndarray], has_ended: bool, where: str) -> None:
        """BadAnswer unless there are routed experts of all tokens exactly where a response ends that asked for them."""
        routes, wanted = streams.get(ROUTED_EXPERTS), self.asked.routes if has_ended else None
        if routes is None or wanted is None:
            if routes is not wanted:
                raise BadAnswer(f"{where} has {'' if wanted is None else 'no '}{ROUTED_EXPERTS} where it should not")
            return
        right = (self.asked.prompt_tokens + len(streams[TOKEN_IDS]), wanted.width)
        if routes.shape != right:
            raise BadAnswer(f"{where} has {ROUTED_EXPERTS} as {list(routes.shape)}, and should have {list(right)}")
        if problem := wanted.problem(routes):
            raise BadAnswer(f"{where} {problem}")
        if (routes[:-1] == UNKNOWN_BYTE).all(-1).any():
            raise BadAnswer(f"{where} has a token before its last of which no expert is known")

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


def _spans(spans: list[SpanOfServer], length: int, where: str) -> list[VersionSpan]:
    """The versions that sampled a response; more than one only if an update came in its middle."""
    shown = [(span.version, span.start, span.end) for span in spans]
    if not spans or not all(span.version.isascii() and span.version.isdigit() for span in spans):
        raise BadAnswer(f"{where} has weight versions {shown}; each should be an integer")
    ends = [0, *(span.end for span in spans)]
    if ends[:-1] != [span.start for span in spans] or ends[-1] != length or ends != sorted(set(ends)):
        raise BadAnswer(f"{where} has weight versions {shown}, which are not of its tokens 0 to {length}")
    return [VersionSpan(int(span.version), span.start, span.end) for span in spans]
