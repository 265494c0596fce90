"""Pack a response's tokens and values for the page: 16-bit codes, compressed by zlib. credit_data.js unpacks them.

A response's bytes before compression: the text's length in bytes (uint32, little-endian), the text as UTF-8, and then
planes of one byte per token. A column of 16 bits is two planes, low bytes first, since that compresses better.
"""

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy

from megatron_fipo.tracking.credit_file import CreditResponse

_MISSING = -(2**15)
"""The code of a value that the loss does not have."""
_MOST = 2**15 - 1
_LEVELS = 2047
_FINEST = 1e-4
_LARGEST = 100.0
_LINEAR_STEP = 1 / 2000


@dataclass(frozen=True)
class Column:
    """How a column's numbers become codes."""

    name: str
    step: float | None = None
    """A code is the value divided by this. None: codes are equally wide in asinh(x / finest), which is 0.4 % of a large
    value and 1e-6 around 0, and 0 stays 0."""


COLUMNS = (
    Column("log_ratio"),
    Column("future_kl"),
    # Linear, so that the bounds of f are exact.
    Column("influence", step=_LINEAR_STEP),
    Column("entropy"),
    Column("old_log_prob"),
    Column("mismatch"),
    Column("importance_weight", step=_LINEAR_STEP),
)


def scale() -> dict[str, float]:
    """Return what the page needs to turn codes into numbers."""
    return {"finest": _FINEST, "perCode": math.asinh(_LARGEST / _FINEST) / _LEVELS, "missing": _MISSING}


def columns_of(responses: Sequence[CreditResponse]) -> list[Column]:
    """Return the columns that some response has values in. One with values beyond its linear codes gets the others."""
    found = []
    for column in COLUMNS:
        values = [_values(each)[column.name] for each in responses]
        if any(_is_there(each) for each in values):
            largest = max(float(numpy.nanmax(numpy.abs(each), initial=0.0)) for each in values)
            is_beyond = column.step is not None and largest > column.step * _MOST
            found.append(replace(column, step=None) if is_beyond else column)
    return found


def packed(response: CreditResponse, columns: Sequence[Column]) -> str:
    """Return the response's text, lengths of tokens, states and columns, compressed, in base64."""
    text = "".join(response.tokens).encode(errors="replace")
    # JavaScript counts in UTF-16.
    lengths = numpy.array([len(token.encode("utf-16-le", errors="replace")) // 2 for token in response.tokens])
    values = _values(response)
    planes = [*_planes(lengths.clip(0, 2**15 - 1)), response.credit.state.tobytes()]
    for column in columns:
        planes += _planes(codes(values[column.name], column))
    whole = struct.pack("<I", len(text)) + text + b"".join(planes)
    return base64.b64encode(zlib.compress(whole, 9)).decode()


def codes(values: numpy.ndarray, column: Column) -> numpy.ndarray:
    """Return [tokens] integers of 16 bits; infinities become the largest code."""
    wide = values.astype(numpy.float64)
    scaled = wide / column.step if column.step is not None else numpy.arcsinh(wide / _FINEST) / scale()["perCode"]
    return numpy.where(numpy.isnan(scaled), _MISSING, numpy.nan_to_num(scaled).clip(-_MOST, _MOST).round()).astype(int)


def _values(response: CreditResponse) -> Mapping[str, numpy.ndarray]:
    found = dict(response.credit.values)
    found["mismatch"] = found["old_log_prob"] - found["rollout_log_prob"]
    return found


def _is_there(values: numpy.ndarray) -> bool:
    return not numpy.isnan(values).all()


def _planes(column: numpy.ndarray) -> list[bytes]:
    pairs = column.astype("<i2").view(numpy.uint8).reshape(-1, 2)
    return [pairs[:, 0].tobytes(), pairs[:, 1].tobytes()]
