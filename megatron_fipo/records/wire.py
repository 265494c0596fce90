"""Named arrays as bytes: the one format in which tokens and log-probs leave a rollout server.

A frame is MAGIC, the lengths of its two parts (uint32 and uint64, little-endian), a JSON header, and the arrays' bytes
one after the other. The header says what the frame is about (`about`, any JSON) and lists the arrays. A token with its
log-prob takes 8 bytes, and decoding a frame makes as many Python objects as it has arrays. Nothing is unpickled.
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy

MAGIC = b"FPO1"
_LENGTHS = struct.Struct("<4sIQ")
_DTYPES = {"<i4", "<i8", "<f4", "|u1"}
LONGEST_HEADER, LONGEST_ARRAYS = 1 << 20, 1 << 30
"""Most bytes of a header, and of a frame's arrays: what asks for more is no frame."""


class WireError(ValueError):
    """Bytes that are no frame, or a frame whose header and arrays do not fit together."""


class ArrayHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a frame's header says of one array."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Frame(msgspec.Struct, frozen=True):
    """One decoded frame."""

    about: Any
    """Plain JSON values, for the reader to convert to its own type."""
    arrays: dict[str, numpy.ndarray]
    """Read-only, over the received bytes."""


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    about: Any
    arrays: list[ArrayHeader]


def encode_frame(about: Any, arrays: Mapping[str, numpy.ndarray] | None = None) -> bytes:
    """The frame's bytes. `about` is JSON or a msgspec.Struct; arrays are int32, int64, float32 or uint8, any shape."""
    little = {name: numpy.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    for name, array in little.items():
        if array.dtype.str not in _DTYPES:
            raise WireError(f"{name} is {array.dtype}; a frame carries {', '.join(sorted(_DTYPES))}")
    listed = [ArrayHeader(name, array.dtype.str, array.shape) for name, array in little.items()]
    header = msgspec.json.encode(_Header(about, listed))
    payload = b"".join(array.tobytes() for array in little.values())
    return _LENGTHS.pack(MAGIC, len(header), len(payload)) + header + payload


def decode_frame(whole: bytes) -> Frame:
    """The one frame that these bytes are; its arrays lie over them, without a copy. WireError if they are no frame."""
    header, arrays = _parts(whole)
    if len(whole) != (length := _LENGTHS.size + header + arrays):
        raise WireError(f"has {len(whole)} bytes, and its beginning speaks of {length}")
    return _decode(whole[_LENGTHS.size : _LENGTHS.size + header], memoryview(whole)[_LENGTHS.size + header :])


class FrameReader:
    """Turns chunks of bytes, cut anywhere, into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        """The frames that `chunk` completes. WireError as soon as the bytes can be no frame."""
        self._buffer += chunk
        while len(self._buffer) >= _LENGTHS.size:
            header, arrays = _parts(self._buffer)
            end = _LENGTHS.size + header + arrays
            if len(self._buffer) < end:
                return
            whole = bytes(memoryview(self._buffer)[_LENGTHS.size : end])
            del self._buffer[:end]
            yield _decode(whole[:header], memoryview(whole)[header:])

    def finish(self) -> None:
        """WireError if the bytes ended in the middle of a frame."""
        if self._buffer:
            raise WireError(f"ends {len(self._buffer)} bytes into a frame")


def _parts(beginning: bytes | bytearray) -> tuple[int, int]:
    """Bytes of the header and of the arrays of the frame that begins so."""
    if len(beginning) < _LENGTHS.size:
        raise WireError(f"ends {len(beginning)} bytes into a frame")
    magic, header, arrays = _LENGTHS.unpack_from(beginning)
    if magic != MAGIC:
        raise WireError(f"begins with {bytes(magic)!r} instead of {MAGIC!r}")
    if header > LONGEST_HEADER or arrays > LONGEST_ARRAYS:
        raise WireError(f"announces a header of {header} bytes and arrays of {arrays}")
    return header, arrays


def _decode(header_bytes: bytes, payload: memoryview) -> Frame:
    try:
        header = msgspec.json.decode(header_bytes, type=_Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"has a header that is not as agreed: {error}") from None
    arrays: dict[str, numpy.ndarray] = {}
    offset = 0
    for entry in header.arrays:
        if entry.dtype not in _DTYPES:
            raise WireError(f"has {entry.name} as {entry.dtype!r}; a frame carries {', '.join(sorted(_DTYPES))}")
        if entry.name in arrays or any(not 0 <= size <= LONGEST_ARRAYS for size in entry.shape):
            raise WireError(f"has {entry.name} twice, or with the shape {entry.shape}")
        dtype, count = numpy.dtype(entry.dtype), 1
        for size in entry.shape:
            count *= size
        if offset + count * dtype.itemsize > len(payload):
            raise WireError(
                f"has {entry.name} with the shape {entry.shape}, which its {len(payload)} bytes do not hold"
            )
        arrays[entry.name] = numpy.frombuffer(payload, dtype, count, offset).reshape(entry.shape)
        offset += count * dtype.itemsize
    if offset != len(payload):
        raise WireError(f"has {len(payload)} bytes of arrays, and its header speaks of {offset}")
    return Frame(header.about, arrays)
