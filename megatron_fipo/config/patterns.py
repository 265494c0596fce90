"""Check a regular expression of a configuration."""

import re

from megatron_fipo.errors import ConfigError


def check_pattern(key: str, pattern: str, example: str) -> None:
    """Raise ConfigError unless `pattern` is a regular expression with one group. `example` is one that is right."""
    try:
        groups = re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(key, f"is not a regular expression: {error}", example) from None
    if groups != 1:
        raise ConfigError(key, f"{pattern!r} has {groups} groups", f"{example}; (?:…) does not count as a group")
