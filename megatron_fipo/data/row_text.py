"""Store a row with all columns as the text of one JSON object, for rewards. Python objects take more memory."""

import base64
import datetime
import json
from collections.abc import Mapping
from decimal import Decimal
from numbers import Integral, Real
from typing import Any


def row_text(row: Mapping[str, Any]) -> str:
    """Return the JSON of a row. Dates become ISO texts, durations seconds, and bytes text or base64."""
    return json.dumps(_plain(row), separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real | Decimal):
        return float(value)
    if isinstance(value, bytes):
        return _text_of(value)
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _text_of(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()
