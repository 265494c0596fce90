"""Declare fields of the configuration's schema, with default, documentation and range in one place."""

import operator
from collections.abc import Mapping
from dataclasses import field
from typing import Any

LONGEST_WAIT_S = 7 * 24 * 3600
"""Upper bound of every timeout, in seconds. Clocks and sockets accept it, and nobody needs a longer one."""


def setting(
    default: Any,
    doc: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Return a dataclass field with its documentation and its range.

    `minimum` and `maximum` are inclusive, `above` is exclusive. A default of None means the key may be left out.
    """
    metadata = {"doc": doc, "minimum": minimum, "maximum": maximum, "above": above, "choices": choices}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type) -> Any:
    """Return a field for a nested section with the section's own defaults."""
    return field(default_factory=kind)


def is_in_range(value: Any, limits: Mapping[str, Any]) -> bool:
    """Return whether a number is inside a setting's limits. If there are limits, NaN is outside of them."""
    tests = (("minimum", operator.ge), ("above", operator.gt), ("maximum", operator.le))
    return all(limits[name] is None or holds(value, limits[name]) for name, holds in tests)


def range_in_words(limits: Mapping[str, Any]) -> str:
    """Return the range in words, such as "above 0 and at most 1"; empty without limits."""
    words = (("minimum", "at least"), ("above", "above"), ("maximum", "at most"))
    return " and ".join(f"{word} {limits[name]:,}" for name, word in words if limits[name] is not None)
