"""Why: frames carry every token that is trained on, from processes that may be broken; wrong bytes must be refused.

Not covered: what the arrays mean (tests/rollout/test_answers.py).
"""

import struct

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.records.wire import MAGIC, FrameReader, WireError, encode_frame

ARRAYS = {
    "token_ids": numpy.array([5, 2**31 - 1, -1], numpy.int32),
    "log_probs": numpy.array([-0.5, 0.0], numpy.float32),
    "experts": numpy.arange(12, dtype=numpy.uint8).reshape(3, 2, 2),
    "none": numpy.empty((0, 4), numpy.int64),
}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_frames_cut_anywhere_come_back(cuts: list[int]) -> None:
    sent = encode_frame({"index": 3}, ARRAYS) + encode_frame("end") + encode_frame(None, {"a": numpy.zeros(1, "int64")})
    reader, frames, start = FrameReader(), [], 0
    for size in [*cuts, len(sent)]:
        frames += reader.feed(sent[start : start + size])
        start += size
    reader.finish()
    assert [frame.about for frame in frames] == [{"index": 3}, "end", None]
    for name, array in ARRAYS.items():
        got = frames[0].arrays[name]
        assert got.dtype == array.dtype and numpy.array_equal(got, array) and not got.flags.writeable


def test_a_token_and_its_log_prob_take_eight_bytes() -> None:
    arrays = {"token_ids": numpy.zeros(1000, numpy.int32), "log_probs": numpy.zeros(1000, numpy.float32)}
    assert len(encode_frame({"index": 0}, arrays)) < 8 * 1000 + 200


def framed(header: bytes, arrays: bytes = b"", lengths: tuple[int, int] | None = None, magic: bytes = MAGIC) -> bytes:
    return struct.pack("<4sIQ", magic, *(lengths or (len(header), len(arrays)))) + header + arrays


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        (framed(b"{}", magic=b"HTTP"), "begins with b'HTTP'"),
        (framed(b"", lengths=(2**31, 0)), "announces a header of"),
        (framed(b"", lengths=(2, 2**60)), "announces a header of"),
        (framed(b"{"), "header that is not as agreed"),
        (framed(b"[" * 100_000), "header that is not as agreed"),
        (framed(b'{"about": 1, "arrays": [], "more": 1}'), "unknown field `more`"),
        (framed(b'{"about": 1, "arrays": [{"name": "a", "dtype": "O", "shape": [1]}]}', b"x" * 8), "has a as 'O'"),
        (framed(b'{"about": 1, "arrays": [{"name": "a", "dtype": "<i4", "shape": [3]}]}', b"x" * 8), "do not hold"),
        (framed(b'{"about": 1, "arrays": [{"name": "a", "dtype": "<i4", "shape": [-1]}]}', b"x" * 8), "the shape"),
        (framed(b'{"about": 1, "arrays": [{"name": "a", "dtype": "<i4", "shape": [1e9, 9]}]}', b""), "not as agreed"),
        (framed(b'{"about": 1, "arrays": []}', b"x"), "has 1 bytes of arrays"),
        (framed(b'{"about": 1, "arrays": []}')[:-1], "ends 41 bytes into a frame"),
    ],
)
def test_what_is_no_frame_is_refused(sent: bytes, complaint: str) -> None:
    reader = FrameReader()
    with pytest.raises(WireError, match=complaint):
        list(reader.feed(sent))
        reader.finish()


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_changes_values_alone(place: int, value: int) -> None:
    sent = bytearray(encode_frame({"index": 3}, ARRAYS))
    sent[place % len(sent)] = value
    reader = FrameReader()
    try:
        frames = list(reader.feed(bytes(sent)))
        reader.finish()
    except WireError:
        return
    assert all(frame.arrays[name].nbytes <= len(sent) for frame in frames for name in frame.arrays)


def test_an_object_array_is_never_sent() -> None:
    with pytest.raises(WireError, match="a is object"):
        encode_frame(None, {"a": numpy.array([None])})
