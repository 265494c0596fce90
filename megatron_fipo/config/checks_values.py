"""Check every value of a configuration by itself: choices, ranges, and the characters of texts."""

import math
from collections.abc import Iterator
from typing import Any, get_origin

from megatron_fipo.config import Config, every_setting
from megatron_fipo.config.settings import is_in_range, range_in_words
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.keys import shown

_LONGEST_TEXT = 100_000
# These are used in names of files, in tables and in plots.
_ON_ONE_LINE = (
    "run.name",
    "run.directory",
    "algorithm.name",
    "hardware.name",
    "rollout.host",
    "model.path",
    "tracking.project",
)
_NEVER_EMPTY = {
    "run.name": "a name",
    "tracking.project": "a name",
    "run.directory": "a directory, such as runs/mine; without the key a run makes a new one",
    "rollout.host": "an address of this machine, such as 127.0.0.1",
}


def check_values(config: Config) -> None:
    """Raise ConfigError for the first value that is not allowed, whatever the other values are."""
    for key, entry in every_setting():
        value, limits = _value(config, key), entry.metadata
        if value is None:
            continue
        allowed = range_in_words(limits)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(key, f"{value} is not a finite number", f"it must be {allowed}: {limits['doc']}")
        if allowed and not is_in_range(value, limits):
            raise ConfigError(key, f"{shown(value)} is out of range", f"it must be {allowed}: {limits['doc']}")
        # OmegaConf does not check the value of an interpolation against the schema, nor lists inside a list.
        if entry.type == list[str] and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise ConfigError(key, f"{shown(value)} is not a list of texts", "a list of texts: [a,b]")
        if get_origin(entry.type) is dict and not isinstance(value, dict):
            raise ConfigError(key, f"{shown(value)} is not a dictionary", "{a: 1}, or one of its keys: +KEY.a=1")
        for item in value if isinstance(value, list) else [value]:
            if limits["choices"] and item not in limits["choices"]:
                raise ConfigError(key, f"{shown(item)} is not a choice", f"one of {', '.join(limits['choices'])}")
        for text in _texts(value):
            _check_text(key, text)


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        # future_kl is the only section that may be null.
        value = getattr(value, name) if value is not None else None
    return value


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value, including the keys of dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in (*value, *value.values()):
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _check_text(key: str, text: str) -> None:
    if len(text) > _LONGEST_TEXT:
        raise ConfigError(key, f"has {len(text)} characters", f"at most {_LONGEST_TEXT}")
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise ConfigError(key, f"{shown(text)} has characters that are not text", "Unicode without the character 0")
    if key in _ON_ONE_LINE and not text.isprintable():
        raise ConfigError(key, f"{shown(text)} has unprintable characters", "one line of printable characters")
    if key in _NEVER_EMPTY and not text.strip():
        raise ConfigError(key, "is empty", _NEVER_EMPTY[key])
