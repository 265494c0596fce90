"""The output of `--help SECTION` and `--help KEY`: documentation, ranges and defaults from the schema."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field
from difflib import get_close_matches
from types import NoneType
from typing import Any, get_args

from megatron_fipo.config import every_setting, sections
from megatron_fipo.config.settings import range_in_words
from megatron_fipo.errors import ConfigError

_WIDTH = 110


def explain(names: Sequence[str]) -> str:
    """Return the keys of sections, or single keys, with their meaning. ConfigError for a name that is neither."""
    return "\n\n".join("\n".join(_explained(name)) for name in names)


def _explained(name: str) -> Iterator[str]:
    settings, kinds = dict(every_setting()), dict(sections())
    if name in settings:
        yield from _lines(name, settings[name])
        return
    if name not in kinds:
        near = get_close_matches(name, [*kinds, *settings], n=2, cutoff=0.5)
        suggestion = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(f"--help {name}", "there is no such section or key", f"{suggestion}--help lists the sections")
    yield f"{name}: {' '.join((kinds[name].__doc__ or '').split())}"
    for key, entry in settings.items():
        if key.startswith(f"{name}."):
            yield from _lines(key, entry)


def _lines(key: str, entry: Field) -> Iterator[str]:
    limits = entry.metadata
    allowed = " | ".join(limits["choices"]) if limits["choices"] else _kind(entry)
    if words := range_in_words(limits):
        allowed += f", {words}"
    yield f"  {key}={_default(entry)}    ({allowed})"
    yield textwrap.fill(limits["doc"], _WIDTH, initial_indent="      ", subsequent_indent="      ")


def _kind(entry: Field) -> str:
    names: dict[Any, str] = {int: "whole number", float: "number", bool: "true | false", str: "text"}
    kinds = [kind for kind in get_args(entry.type) if kind is not NoneType]
    if NoneType in get_args(entry.type):
        return f"{names.get(kinds[0], str(kinds[0]))} | null"
    return names.get(entry.type, "list: [a,b]" if "list" in str(entry.type) else "keys and values")


def _default(entry: Field) -> str:
    value: Any = entry.default_factory() if entry.default_factory is not MISSING else entry.default
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:60]} …"
