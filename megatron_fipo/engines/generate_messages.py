"""What the trainer and a rollout server say to each other about sampling: the request, and the frames of its answer.

Imports neither vLLM nor torch: the client reads these here, the route of the server writes them.
"""

from typing import Literal

import msgspec
import numpy

from megatron_fipo.records.routes import RouteFormat
from megatron_fipo.records.streams import ROLLOUT_LOG_PROBS, ROUTED_EXPERTS, TOKEN_IDS
from megatron_fipo.records.wire import WireError, encode_frame

GENERATE_PATH = "/fipo/generate"


class GenerateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Samples of one prompt, one for each seed. Limits that the engine sets are the engine's to check."""

    token_ids: list[int]
    seeds: list[int]
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_token_ids: list[int]
    cache_salt: str
    """Requests share cached prefixes only with others of the same salt: one for each version of the weights."""
    begun: list[list[int]]
    """For each seed the tokens that its response has already, from another server. `max_tokens` counts them too."""
    stream_tokens: int
    """A response that has so many tokens which were not sent yet sends them before it ends."""
    routes: RouteFormat | None = None
    """How to send, with the end of each response, the experts that its tokens went to, from the prompt's first token
    on; None: not at all."""


class VersionSpan(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Tokens [start, end) of a response were sampled by the weights of `version`."""

    version: str
    """As the server labels them; a trainer's are numbers."""
    start: int
    end: int


class PartFrame(msgspec.Struct, frozen=True, tag="part", forbid_unknown_fields=True):
    """Tokens of a response that goes on; its frame carries their arrays, by the table of records/streams.py."""

    index: int
    """Which of the request's seeds samples it."""
    start: int
    """How many of its tokens were sent before. Begun ones are not counted, here and in spans."""


class SampleFrame(msgspec.Struct, frozen=True, tag="sample", forbid_unknown_fields=True):
    """The end of a response; its frame carries the arrays of the tokens that were not sent before."""

    index: int
    """Which of the request's seeds sampled it."""
    start: int
    """As in PartFrame."""
    finish_reason: str
    spans: list[VersionSpan]
    """Of all tokens that this server sampled."""


class EndFrame(msgspec.Struct, frozen=True, tag="end", forbid_unknown_fields=True):
    """Every response has been sent."""

    samples: int


class ErrorFrame(msgspec.Struct, frozen=True, tag="error", forbid_unknown_fields=True):
    """What the engine says in place of the responses that are not there yet."""

    kind: Literal["refused", "failed"]
    """refused: the request is wrong, on every server alike. failed: another server, or another time, may answer it."""
    message: str


About = PartFrame | SampleFrame | EndFrame | ErrorFrame


def sample_frame(
    about: PartFrame | SampleFrame, token_ids: list[int], log_probs: list[float], routes: numpy.ndarray | None = None
) -> bytes:
    """The bytes of a frame with tokens; `routes` is what RouteFormat.packed returns, of prompt and response."""
    arrays = {TOKEN_IDS: numpy.array(token_ids, numpy.int32), ROLLOUT_LOG_PROBS: numpy.array(log_probs, numpy.float32)}
    return encode_frame(about, arrays if routes is None else {**arrays, ROUTED_EXPERTS: routes})


def read_about(about: object) -> About:
    """The typed part of a frame's header. WireError if it is none of the four."""
    try:
        return msgspec.convert(about, type=About)
    except msgspec.ValidationError as error:
        raise WireError(f"is about nothing that was agreed: {error}") from None
