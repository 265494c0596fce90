"""Kinds of values that a key of a model's config.json may have, each with a description for the user."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """The values that a key may have."""

    expected: str
    """A description of the allowed values, for the user."""
    accepts: Callable[[Any], bool]


def whole(low: int, high: int) -> Kind:
    """A whole number from `low` to `high`, both included."""
    return Kind(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Kind:
    """A finite number above `low` and below `high`."""

    def accepts(value: Any) -> bool:
        return type(value) in (int, float) and low < value < high  # False for NaN

    return Kind(f"a number above {low:g} and below {high:g}", accepts)


def only(*values: Any) -> Kind:
    """Only these values. True is not equal to 1 here, but 1 is equal to 1.0."""
    return Kind(" or ".join(map(shown, values)), lambda found: any(same_value(found, value) for value in values))


def or_null(kind: Kind) -> Kind:
    """The values of `kind`, or null."""
    return Kind(f"{kind.expected}, or null", lambda value: value is None or kind.accepts(value))


def list_of(kind: Kind) -> Kind:
    """A list of any length with values of `kind`."""
    return Kind(f"a list of {kind.expected}", lambda value: isinstance(value, list) and all(map(kind.accepts, value)))


def either(one: Kind, other: Kind) -> Kind:
    """The values of either kind."""
    return Kind(f"{one.expected}, or {other.expected}", lambda value: one.accepts(value) or other.accepts(value))


BOOLEAN = Kind("true or false", lambda value: type(value) is bool)
DICTIONARY = Kind("an object or null", lambda value: value is None or isinstance(value, dict))
UNUSED_NUMBER = Kind("a number", lambda value: type(value) in (int, float) and abs(value) < 1e15)
"""For a setting that has no effect here, such as dropout, but that transformers requires to be a number."""


def same_value(one: Any, other: Any) -> bool:
    """Return whether two values are equal in JSON: true is not equal to 1, but 1 is equal to 1.0."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def shown(value: Any) -> str:
    """Return a value as JSON, on one line, shortened to 80 characters."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply"
    except ValueError:  # Python does not print numbers with thousands of digits
        text = f"a {type(value).__name__} of too many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
