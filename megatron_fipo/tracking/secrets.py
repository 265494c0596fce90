"""Keep credentials out of what a run writes: passwords inside URLs, and the values of variables that hold keys."""

import os
import re
from typing import Any

_NAMES = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8
"""A shorter value is no key, and may be a common word."""


def without_passwords(value: Any) -> Any:
    """Return a value, or a tree of dictionaries and lists, with the passwords inside its URLs replaced by ***."""
    if isinstance(value, dict):
        return {key: without_passwords(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_passwords(item) for item in value]
    return re.sub(r"(\w://)[^/@\s]+@", r"\1***@", value) if isinstance(value, str) else value


def without_credentials(text: str) -> str:
    """Return a text without passwords in URLs, and without the values of environment variables such as WANDB_API_KEY.

    For messages of other packages, which may quote what they were given.
    """
    for name, value in os.environ.items():
        if _NAMES.search(name) and len(value) >= _SHORTEST:
            text = text.replace(value, "***")
    return str(without_passwords(text))
