"""How a field of the configuration's schema is declared: default, documentation and range in one place."""

from dataclasses import field
from typing import Any


def setting(
    default: Any,
    doc: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A configuration field with its documentation and its range.

    `minimum` and `maximum` are inclusive, `above` is exclusive. A default of None means the key may be left out.
    """
    metadata = {"doc": doc, "minimum": minimum, "maximum": maximum, "above": above, "choices": choices}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type) -> Any:
    """A nested group of fields with that group's own defaults."""
    return field(default_factory=kind)
