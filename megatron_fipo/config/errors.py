"""Turn exceptions of Hydra and OmegaConf into one line that names the key and what would be right."""

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException, ValidationError

from megatron_fipo.config import every_setting
from megatron_fipo.errors import ConfigError

_DOCS = "docs/configuration.md lists every key"
_OPEN_SECTIONS = ("data.task_options", "data.chat_template_variables", "algorithm.loss_options", "environment.options")
_LONGEST = 300
_OPTIONAL_SECTION = "algorithm.future_kl"
_TYPE_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def check_overrides(overrides: Iterable[str], groups: Collection[str]) -> None:
    """Raise ConfigError for overrides on which Hydra would fail without naming them."""
    parser = OverridesParser.create()
    switches = {key for key, entry in every_setting() if entry.type in (bool, bool | None)}
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:  # Hydra will raise it again, and name the override
            continue
        except (ValueError, RecursionError) as error:
            key = text.partition("=")[0].lstrip("+~")
            raise ConfigError(_short(key), f"has a value that cannot be read: {_one_line(error)}", _DOCS) from None
        name, value = override.get_key_element().lstrip("+~").partition("@")[0], override.value()
        is_choice = isinstance(value, str) and "${" not in value
        if name in groups and not override.is_delete() and not is_choice:
            remedy = "the name of a file in it, without .yaml"
            raise ConfigError(name, f"{_short(str(value))} is not a choice of this group", remedy)
        if name in switches and type(value) is int and value not in (0, 1):  # OmegaConf would read it as true
            raise ConfigError(name, f"{value} is neither true nor false", _expected(name))


def readable(error: Exception, groups: Iterable[str]) -> ConfigError:
    """Return the failure as a ConfigError. `groups` are the names of the configuration groups, for suggestions."""
    if isinstance(error, MissingConfigException):
        return _missing_choice(error)
    if match := re.search(r"Ambiguous value for argument '(.+)'", str(error)):
        return ConfigError(match.group(1), "takes only one value", "write a list in brackets: key=[a,b]")
    if isinstance(error, OverrideParseException):
        if (home := _from_home(error.override or "")) is not None:
            return home
        remedy = "give SECTION.KEY=VALUE; quote a value with special characters twice: 'run.name=\"a=b\"'"
        return ConfigError(_short(error.override or ""), f"cannot be read: {_one_line(error)}", remedy)
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if not isinstance(cause, OmegaConfBaseException):
        named = re.search(r"full_key: (\S+)", str(error))
        key = named[1] if named else "configuration"
        return ConfigError(key, _one_line(error), _expected(key) if named else "--help shows the groups and examples")
    if match := re.search(r"Could not override '([^']+)'", str(error)):
        return unknown_key(match.group(1), groups)
    key = cause.full_key or "configuration"
    if isinstance(cause, ValidationError) and "is not a ListConfig" in str(cause):
        return ConfigError(key, "takes a list, not a single value", f"write it in brackets: {key}=[A,B], or {key}=[A]")
    if isinstance(cause, ValidationError) and (item := re.fullmatch(r"(.+)\[\d+\]", key)) and "NoneType" in str(cause):
        return ConfigError(key, "is null, but the list has no empty items", f"{item[1]}=[A,B]")
    if isinstance(cause, ValidationError):
        return ConfigError(key, _one_line(cause), _expected(key))
    if key and "not in" in str(cause):
        return unknown_key(key, groups)
    return ConfigError(key, _one_line(cause), _DOCS)


def _from_home(override: str) -> ConfigError | None:
    """Return the error for a path that begins with ~, which neither the shell nor Hydra expands inside KEY=VALUE."""
    key, _, value = override.partition("=")
    paths = [item.strip() for item in value.strip("[]").split(",")]
    if not any(path.startswith("~") for path in paths):
        return None
    given = ",".join(f'"{path}"' if path.startswith("~") else path for path in paths)
    is_list = value.startswith("[") or "list" in str(getattr(dict(every_setting()).get(key), "type", ""))
    quoted = f"'{key}=[{given}]'" if is_list else f"'{key}={given}'"
    return ConfigError(key, f"{_short(value)} has a ~ that is not quoted", f"quote it twice: {quoted}")


def below_null_section() -> ConfigError:
    """Return the error for a key in a section that is null in the chosen algorithm. OmegaConf only asserts there."""
    return ConfigError(
        _OPTIONAL_SECTION, "is null in this algorithm, so its keys cannot be set", "algorithm=fipo has it"
    )


def unknown_key(key: str, groups: Iterable[str]) -> ConfigError:
    """Return the error for a key that the schema does not have, with the nearest key that it has."""
    known = [name for name, _ in every_setting()]
    if key.startswith(_OPEN_SECTIONS):
        return ConfigError(key, "is not set yet", f"add it with a plus: +{key}=VALUE")
    if key in known:
        return ConfigError(key, "cannot be added or removed, only set", f"{key}=VALUE")
    near = _nearest(key, [*groups, *known])
    suggestion = f"did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(key, "there is no such key", suggestion + _DOCS)


def _nearest(key: str, known: list[str]) -> list[str]:
    """Return up to two names that are similar to `key`. A name without its section is searched in every section."""
    last_names = {name.rpartition(".")[2]: name for name in reversed(known)}
    last = key.rpartition(".")[2]
    same_name = [name for name in known if name.endswith(f".{last}")]
    near_names = [last_names[name] for name in get_close_matches(last, last_names, n=2, cutoff=0.7)]
    return (
        get_close_matches(key, known, n=2, cutoff=0.75)
        or same_name[:2]
        or near_names
        or get_close_matches(key, known, n=1)
    )


def _missing_choice(error: MissingConfigException) -> ConfigError:
    name = error.missing_cfg_file or ""
    # A choice may contain slashes. In Hydra's own groups, the name of the group does.
    group, _, choice = name.rpartition("/") if name.startswith("hydra/") else name.partition("/")
    options = list(error.options or [])
    if not group or not options:
        return ConfigError(
            error.missing_cfg_file or "configuration", "there is no such file", "--help shows the groups"
        )
    near = get_close_matches(choice, options, n=1)
    suggestion = f"did you mean {near[0]}? " if near else ""
    return ConfigError(f"{group}={choice}", "there is no such choice", f"{suggestion}it is one of {', '.join(options)}")


def _expected(key: str) -> str:
    entry = dict(every_setting()).get(key)
    if entry is None:
        return _DOCS
    kind = _TYPE_NAMES.get(entry.type, "a list in brackets: [a,b]" if "list" in str(entry.type) else "")
    doc = entry.metadata["doc"]
    return f"give {kind}: {doc}" if kind else doc


def _one_line(error: Exception) -> str:
    """Return the message without Hydra's links to its documentation and the types that OmegaConf appends."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [
        line
        for line in lines
        if line and not line.startswith(("See http", "full_key:", "reference_type=", "object_type="))
    ]
    return _short("; ".join(line for line in kept if line != "^").rstrip("."))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
