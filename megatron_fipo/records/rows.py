"""A step's batch as every rank knows it: a row for each sequence, and where their tokens are.

Ranks plan from rows, and ask for the tokens of what they read. Rows travel as one frame of records/wire.py. Numpy and
plain Python only.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy

from megatron_fipo.records.streams import read_only
from megatron_fipo.records.wire import WireError, decode_frame, encode_frame

ROW = numpy.dtype(
    [
        ("sample", "<i8"),  # its number in the store
        ("tokens", "<i4"),  # prompt and response
        ("prompt", "<i4"),
        ("advantage", "<f4"),
        # Versions between the weights that sampled it and those that the step starts from; 0 but for sequences carried
        # over from an earlier step.
        ("weight_lag", "<i4"),
        ("mini_batch", "<i2"),  # the update that it is for, from 0
        ("recorded", "|u1"),  # 1: its values per token are written to a file (records/credit.py)
    ]
)
"""What every rank knows of a sequence."""

PIECE = numpy.dtype([("sample", "<i8"), ("start", "<i4"), ("end", "<i4")])
"""Tokens [start, end) of a sample, counted from the beginning of its prompt."""


class StoreAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a batch's tokens are, and what opens the door."""

    url: str
    token: str

    def __repr__(self) -> str:
        return f"StoreAddress({self.url})"  # without the token, which logs are not to have


class _About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    step: int
    store: StoreAddress | None


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """One step's sequences, the same on every rank."""

    step: int
    """The step that trains on them."""
    rows: numpy.ndarray
    """[n] of ROW, read-only, in the order of their updates."""
    told: numpy.ndarray
    """[m, 3] int32, read-only: row, start and end, counted from the sequence's begin, of each stretch within a response
    that the policy did not produce, in the order of the rows. No loss and no credit is theirs."""
    store: StoreAddress | None = None
    """Where their tokens are. None: every rank has made them itself."""

    def __len__(self) -> int:
        """Sequences."""
        return len(self.rows)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, prompt and response."""
        return self.rows["tokens"].tolist()

    @cached_property
    def mini_batch_sizes(self) -> list[int]:
        """Sequences of each update, in order; they add up to n."""
        return numpy.bincount(self.rows["mini_batch"]).tolist() if len(self.rows) else []

    def told_of(self, row: int) -> list[list[int]]:
        """Start and end of the stretches of one row that the policy did not produce."""
        first, last = numpy.searchsorted(self.told[:, 0], [row, row + 1])
        return self.told[first:last, 1:].tolist()

    def to_bytes(self) -> bytes:
        """The batch as one frame."""
        rows = numpy.ascontiguousarray(self.rows).view(numpy.uint8).reshape(len(self.rows), ROW.itemsize)
        return encode_frame(_About(self.step, self.store), {"rows": rows, "told": self.told})

    @staticmethod
    def from_bytes(frame: bytes) -> "TrainBatch":
        """The batch of a frame. WireError if it is none, or if its rows do not fit together."""
        found = decode_frame(frame)
        try:
            about = msgspec.convert(found.about, type=_About)
        except msgspec.ValidationError as error:
            raise WireError(f"is about no batch: {error}") from None
        raw = found.arrays.get("rows")
        if raw is None or raw.dtype != numpy.uint8 or raw.ndim != 2 or raw.shape[1] != ROW.itemsize:
            raise WireError(f"has no rows of {ROW.itemsize} bytes each")
        told = found.arrays.get("told")
        if told is None or told.dtype != numpy.int32 or told.ndim != 2 or told.shape[1] != 3:
            raise WireError("has no stretches that the policy was told, which may be none")
        rows = raw.reshape(-1).view(ROW)
        _check(rows)
        _check_told(told, rows)
        return TrainBatch(about.step, read_only(rows), read_only(told), about.store)


def rows_of(
    samples: Sequence[int],
    tokens: Sequence[int],
    prompts: Sequence[int],
    advantages: Sequence[float],
    weight_lag: Sequence[int],
    mini_batch_sizes: Sequence[int],
    recorded: Collection[int] = (),
) -> numpy.ndarray:
    """Rows of columns, [n] of ROW. ValueError if they are no batch: see `TrainBatch`.

    Args:
        recorded: the samples whose values per token are written to a file.
    """
    rows = numpy.empty(len(samples), ROW)
    rows["sample"], rows["tokens"], rows["prompt"] = samples, tokens, prompts
    rows["advantage"], rows["weight_lag"] = advantages, weight_lag
    rows["mini_batch"] = numpy.repeat(numpy.arange(len(mini_batch_sizes)), mini_batch_sizes)
    rows["recorded"] = numpy.isin(rows["sample"], list(recorded))
    _check(rows)
    return read_only(rows)


def told_stretches(told: Iterable[Sequence[int]], rows: numpy.ndarray) -> numpy.ndarray:
    """Row, start and end of each stretch that the policy was told, [m, 3] int32. ValueError: see `TrainBatch`."""
    found = numpy.array(list(told), numpy.int32).reshape(-1, 3)
    _check_told(found, rows)
    return read_only(found)


def _check_told(told: numpy.ndarray, rows: numpy.ndarray) -> None:
    """WireError for stretches that are not of the responses in `rows`."""
    row, start, end = told.T
    if len(told) and (row[0] < 0 or row[-1] >= len(rows) or (numpy.diff(row) < 0).any()):
        raise WireError("has stretches that the policy was told of no row, or not in the order of the rows")
    if not ((rows["prompt"][row] <= start) & (start < end) & (end <= rows["tokens"][row])).all():
        raise WireError("has a stretch that the policy was told outside of a response")


def _check(rows: numpy.ndarray) -> None:
    """WireError, which is a ValueError, for rows that are no batch."""
    steps = numpy.diff(rows["mini_batch"], prepend=0)
    if len(rows) and (rows["mini_batch"][0] != 0 or not numpy.isin(steps, (0, 1)).all()):
        raise WireError("has rows whose updates are not in order")
    if not ((rows["prompt"] > 0) & (rows["prompt"] < rows["tokens"])).all():
        raise WireError("has a row without a prompt or without a response")
    if len(numpy.unique(rows["sample"])) != len(rows):
        raise WireError("has a sample twice")
