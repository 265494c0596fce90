"""Write and read a whole configuration as a file. The ranks of a run read it, and a run keeps it as config.yaml."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import msgspec
import yaml

from megatron_fipo.config import Config
from megatron_fipo.errors import ConfigError, one_line


def as_yaml(tree: dict[str, Any]) -> str:
    """Return a configuration, given as nested dictionaries, as YAML in the schema's order."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def write(path: Path, config: Config) -> None:
    """Write every key with its value to `path`. Only this user can read it, since addresses may contain passwords."""
    text = as_yaml(dataclasses.asdict(config))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def read(path: Path) -> Config:
    """Read a file that `write` wrote. Missing keys have the schema's defaults.

    Raises:
        ConfigError: the file cannot be read, or a value is of another type than the schema's.
    """
    return typed(read_tree(path))


def typed(tree: dict[str, Any]) -> Config:
    """Return the typed configuration for nested dictionaries. ConfigError with the key if a value has another type."""
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).replace("`", "").partition(" - at $.")
        raise ConfigError(place or "configuration", problem, "docs/configuration.md has each key's type") from None


def read_tree(path: Path) -> dict[str, Any]:
    """Read a file as nested dictionaries, without checking keys and values. Raises ConfigError."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(str(path), f"cannot be read: {one_line(error)}", "a configuration in YAML") from None
    if not isinstance(tree, dict):
        raise ConfigError(str(path), "is not a configuration", "sections with keys, in YAML")
    return tree
