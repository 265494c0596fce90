"""What the trainer's ranks and a store of samples say to each other: a request, and the arrays that answer it."""

from collections.abc import Mapping, Sequence

import msgspec
import numpy

from megatron_fipo.records.rows import PIECE
from megatron_fipo.records.streams import Stream
from megatron_fipo.records.wire import WireError, decode_frame, encode_frame

FETCH_PATH = "/fipo/samples"


class FetchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Streams that are wanted of the pieces in the request's frame."""

    streams: list[str]
    columns: tuple[int, int] = (0, 0)
    """The bytes [start, end) of a token's value that are wanted of whole streams."""


def encode_request(pieces: numpy.ndarray, names: Sequence[str], columns: tuple[int, int] = (0, 0)) -> bytes:
    """A request's frame; `pieces` is [m] of PIECE."""
    raw = numpy.ascontiguousarray(pieces).view(numpy.uint8).reshape(len(pieces), PIECE.itemsize)
    return encode_frame(FetchRequest(list(names), columns), {"pieces": raw})


def decode_request(frame: bytes) -> tuple[numpy.ndarray, FetchRequest]:
    """Pieces, and what is wanted of them. WireError if the bytes are no request."""
    found = decode_frame(frame)
    try:
        request = msgspec.convert(found.about, type=FetchRequest)
    except msgspec.ValidationError as error:
        raise WireError(f"is about no request: {error}") from None
    raw = found.arrays.get("pieces")
    if raw is None or raw.dtype != numpy.uint8 or raw.ndim != 2 or raw.shape[1] != PIECE.itemsize:
        raise WireError(f"has no pieces of {PIECE.itemsize} bytes each")
    return raw.reshape(-1).view(PIECE), request


def decode_answer(frame: bytes, streams: Mapping[str, Stream], tokens: int) -> dict[str, numpy.ndarray]:
    """The arrays of an answer. WireError unless they are these streams, of their types, with so many tokens each."""
    arrays = decode_frame(frame).arrays
    if arrays.keys() != streams.keys():
        raise WireError(f"has {', '.join(sorted(arrays)) or 'nothing'}; {', '.join(streams)} were asked for")
    for name, stream in streams.items():
        found = arrays[name]
        right = (tokens, *stream.trailing)
        if found.dtype != stream.dtype or found.shape != right:
            shown = f"{found.dtype} {list(found.shape)}"
            raise WireError(f"has {name} as {shown}; {stream.dtype} {list(right)} was asked for")
    return arrays
