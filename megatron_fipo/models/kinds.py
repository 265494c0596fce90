"""The values that a key of a model's config.json may have, each kind with words for the user."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """The values that a key may have."""

    expected: str
    """What is right, for the user."""
    accepts: Callable[[Any], bool]


def whole(low: int, high: int) -> Kind:
    """A whole number from `low` to `high`, both included."""
    return Kind(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Kind:
    """A finite number between the two, which are not meant themselves."""

    def accepts(value: Any) -> bool:
        return type(value) in (int, float) and low < value < high  # False of NaN

    return Kind(f"a number above {low:g} and below {high:g}", accepts)


def only(*values: Any) -> Kind:
    """These values and no others; True is not 1 here, but 1 is 1.0."""
    return Kind(" or ".join(map(shown, values)), lambda found: any(same_value(found, value) for value in values))


def or_null(kind: Kind) -> Kind:
    """The kind's values, and null."""
    return Kind(f"{kind.expected}, or null", lambda value: value is None or kind.accepts(value))


def list_of(kind: Kind) -> Kind:
    """A list of the kind's values, of any length."""
    return Kind(f"a list of {kind.expected}", lambda value: isinstance(value, list) and all(map(kind.accepts, value)))


def either(one: Kind, other: Kind) -> Kind:
    """The values of both kinds."""
    return Kind(f"{one.expected}, or {other.expected}", lambda value: one.accepts(value) or other.accepts(value))


BOOLEAN = Kind("true or false", lambda value: type(value) is bool)
DICTIONARY = Kind("an object or null", lambda value: value is None or isinstance(value, dict))
UNUSED_NUMBER = Kind("a number", lambda value: type(value) in (int, float) and abs(value) < 1e15)
"""Of a setting that changes nothing here, dropout for one, but without which transformers refuses the file."""


def same_value(one: Any, other: Any) -> bool:
    """Equality as JSON has it: true is not 1, but 1 is 1.0."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def shown(value: Any) -> str:
    """A value as JSON has it, on one line and short."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply"
    except ValueError:  # Python writes no number of thousands of digits
        text = f"a {type(value).__name__} of too many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
