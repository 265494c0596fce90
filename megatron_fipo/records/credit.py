"""The per-token values that a loss used, on their way from the ranks that computed them to a file.

A piece is one rank's part of one response. Context parallelism cuts a response into pieces, and each position is in
exactly one of them. Pieces travel as frames of records/wire.py. Numpy and plain Python only.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy

from megatron_fipo.records.wire import WireError, decode_frame, encode_frame

VALUES = (
    "log_ratio",
    "future_kl",
    "influence",
    "entropy",
    "old_log_prob",
    "rollout_log_prob",
    "importance_weight",
)
"""The columns, float32. log_ratio: the token's own Δ = log π_θ − log π_old, clamped as in the loss, also with gspo,
whose ratio is of the mean Δ of a response. future_kl: F; influence: f; entropy in nats; importance_weight: what
multiplies the token's loss, 0 outside of algorithm.is_bounds. NaN where the loss has no such value."""

PRODUCED, TAKES_PART, CLIPPED, DUAL_CLIPPED, COUNTS = 1, 2, 4, 8, 16
"""Bits of a token's state. The policy produced it; it is in the sums F; the ratio is clipped; its loss is limited by
the dual clip; it is in the loss's numerator."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Some tokens of one response."""

    sample: int
    """Its number in the store of the rollout process."""
    update: int
    """The update of the step that trained on it, from 0."""
    positions: numpy.ndarray
    """[m] int32, counted from the response's begin."""
    values: numpy.ndarray
    """[columns, m] float32, in the order of VALUES."""
    state: numpy.ndarray
    """[m] uint8: the bits above."""


@dataclass(frozen=True, eq=False)
class TokenCredit:
    """All tokens of one response."""

    update: int
    values: Mapping[str, numpy.ndarray]
    """[tokens] float32 each, by VALUES."""
    state: numpy.ndarray
    """[tokens] uint8."""

    @property
    def is_dropped(self) -> bool:
        """Whether the loss left the whole response out, though the policy produced tokens of it."""
        return bool((self.state & PRODUCED).any() and not (self.state & COUNTS).any())


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sample: int
    update: int
    tokens: int


def encode_pieces(pieces: Sequence[Piece]) -> bytes:
    """Return the pieces as one frame; b"" of none."""
    if not pieces:
        return b""
    arrays = {
        "positions": numpy.concatenate([piece.positions for piece in pieces]),
        "values": numpy.concatenate([piece.values for piece in pieces], axis=1),
        "state": numpy.concatenate([piece.state for piece in pieces]),
    }
    return encode_frame([_Entry(piece.sample, piece.update, len(piece.positions)) for piece in pieces], arrays)


def decode_pieces(frame: bytes) -> list[Piece]:
    """Return the pieces of a frame. WireError if it is none, or if its parts do not fit together."""
    if not frame:
        return []
    found = decode_frame(frame)
    try:
        entries = msgspec.convert(found.about, type=list[_Entry])
    except msgspec.ValidationError as error:
        raise WireError(f"is about no pieces of responses: {error}") from None
    total = sum(entry.tokens for entry in entries)
    wanted = {"positions": ("<i4", (total,)), "values": ("<f4", (len(VALUES), total)), "state": ("|u1", (total,))}
    for name, (dtype, shape) in wanted.items():
        array = found.arrays.get(name)
        if array is None or array.dtype.str != dtype or array.shape != shape:
            raise WireError(f"has no {name} as {dtype} {list(shape)}")
    pieces, start = [], 0
    for entry in entries:
        part = slice(start, start + entry.tokens)
        arrays = found.arrays
        pieces.append(
            Piece(
                entry.sample, entry.update, arrays["positions"][part], arrays["values"][:, part], arrays["state"][part]
            )
        )
        start = part.stop
    return pieces


def join_pieces(pieces: Iterable[Piece], lengths: Mapping[int, int]) -> dict[int, TokenCredit]:
    """Put pieces together, by their samples' numbers.

    Args:
        lengths: tokens of each response, by its sample's number.

    Raises:
        WireError: a sample is unknown, or its pieces do not have each of its positions once.
    """
    of_sample: dict[int, list[Piece]] = {}
    for piece in pieces:
        of_sample.setdefault(piece.sample, []).append(piece)
    found = {}
    for sample, parts in of_sample.items():
        if sample not in lengths:
            raise WireError(f"has values of sample {sample}, which nobody asked for")
        positions = numpy.concatenate([part.positions for part in parts])
        order = numpy.argsort(positions, kind="stable")
        if not numpy.array_equal(positions[order], numpy.arange(lengths[sample])):
            raise WireError(
                f"has values of {len(positions)} tokens of sample {sample}; once each of its {lengths[sample]} is right"
            )
        values = numpy.concatenate([part.values for part in parts], axis=1)[:, order]
        state = numpy.concatenate([part.state for part in parts])[order]
        found[sample] = TokenCredit(parts[0].update, dict(zip(VALUES, values, strict=True)), state)
    return found
