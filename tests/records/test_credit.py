"""Why: a file of values with a gap, or with a token's values twice, would be drawn like a whole one."""

import numpy
import pytest

from megatron_fipo.records.credit import COUNTS, PRODUCED, VALUES, Piece, decode_pieces, encode_pieces, join_pieces
from megatron_fipo.records.wire import WireError


def piece(sample: int, positions: list[int], state: int = PRODUCED | COUNTS) -> Piece:
    """Each value is its position, plus 100 times its column."""
    values = numpy.add.outer(100 * numpy.arange(len(VALUES)), positions).astype(numpy.float32)
    return Piece(sample, 1, numpy.array(positions, numpy.int32), values, numpy.full(len(positions), state, numpy.uint8))


def test_pieces_of_several_ranks_are_put_in_order() -> None:
    frames = [encode_pieces([piece(7, [0, 1, 6, 7]), piece(9, [0])]), b"", encode_pieces([piece(7, [2, 3, 4, 5])])]
    pieces = [found for frame in frames for found in decode_pieces(frame)]
    joined = join_pieces(pieces, {7: 8, 9: 1, 11: 5})
    assert joined.keys() == {7, 9}
    for column, name in enumerate(VALUES):
        assert joined[7].values[name].tolist() == [100 * column + position for position in range(8)]


@pytest.mark.parametrize(
    "pieces",
    [
        [piece(7, [0, 1])],
        [piece(7, [0, 1]), piece(7, [1, 2])],
        [piece(7, [0, 1, 3])],
        [piece(8, [0, 1, 2])],
    ],
    ids=["a gap", "a token twice", "behind the end", "of no marked sample"],
)
def test_incomplete_values_are_refused(pieces: list[Piece]) -> None:
    with pytest.raises(WireError, match=r"sample [78]"):
        join_pieces(pieces, {7: 3})


def test_a_broken_frame_is_refused() -> None:
    whole = encode_pieces([piece(7, [0, 1])])
    with pytest.raises(WireError):
        decode_pieces(whole[:-1])
    with pytest.raises(WireError, match="no pieces"):
        decode_pieces(whole.replace(b'"sample"', b'"simple"'))


def test_a_response_is_dropped_if_none_of_its_tokens_counts() -> None:
    joined = join_pieces([piece(1, [0, 1], PRODUCED), piece(2, [0, 1])], {1: 2, 2: 2})
    assert (joined[1].is_dropped, joined[2].is_dropped) == (True, False)
