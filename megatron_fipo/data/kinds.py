"""Describe the kind of a value, for messages."""

from decimal import Decimal
from numbers import Real
from typing import Any

_WORDS: dict[type, str] = {
    type(None): "null",
    bool: "a truth value",
    str: "a text",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    bytes: "bytes",
}


def kind_of(value: Any) -> str:
    """Return a description such as "a number"; for values that JSON does not have, the name of the type."""
    if type(value) in _WORDS:
        return _WORDS[type(value)]
    return "a number" if isinstance(value, Real | Decimal) else f"a value of type {type(value).__name__}"
