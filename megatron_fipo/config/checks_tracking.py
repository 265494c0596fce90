"""Check the section `tracking` of a configuration: patterns of markers, packages of trackers, and W&B's key."""

import netrc
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from urllib.parse import urlsplit

from megatron_fipo.config import Config, TrackingConfig
from megatron_fipo.errors import ConfigError

_DISTRIBUTIONS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny", "trackio": "trackio"}
"""What to install for each module. mlflow-skinny is the part of mlflow that sends numbers."""
_WANDB = "https://api.wandb.ai"


_LONGEST_PATTERN = 200
_MOST_OPTIONAL = 8
"""A pattern with n optional parts may try 2^n ways at each character."""
_BACKTRACKS = re.compile(r"\\[0-9]|[*+{(]")


def tracking(config: Config) -> Iterator[str]:
    """Raise ConfigError if a marker is no regular expression, or one that a text could make take for ever."""
    for kind in ("reflection", "verification", "backtracking"):
        for pattern in getattr(config.tracking, f"{kind}_markers"):
            _check_pattern(f"tracking.{kind}_markers", pattern)
    yield from ()


def _check_pattern(key: str, pattern: str) -> None:
    shown = repr(pattern[:60])
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(key, f"{shown} is not a regular expression: {error}", "one of Python's re") from None
    if not pattern or len(pattern) > _LONGEST_PATTERN:
        raise ConfigError(key, f"{shown} has {len(pattern)} characters", f"1 to {_LONGEST_PATTERN}")
    bare = re.sub(r"\\[^0-9]", "", pattern)
    if _BACKTRACKS.search(bare) or bare.count("?") > _MOST_OPTIONAL:
        raise ConfigError(
            key,
            f"{shown} could take for ever on some text",
            f"no groups, no repeats with * + or {{}}, at most {_MOST_OPTIONAL} ?; give several patterns instead",
        )


def check_trackers_here(settings: TrackingConfig) -> None:
    """Raise ConfigError if a tracker's package is not installed, or if W&B would ask for a key. Nothing is imported."""
    for name in settings.to:
        found = find_spec(name)
        # A directory of that name, such as the one that W&B makes, would count as a package without an origin.
        if found is None or found.origin is None:
            package = _DISTRIBUTIONS[name]
            raise ConfigError("tracking.to", f"{name} is not installed", f"pip install {package}, or leave {name} out")
    is_offline = settings.offline or os.environ.get("WANDB_MODE", "online") != "online"
    if "wandb" in settings.to and not is_offline and not _has_wandb_key():
        raise ConfigError(
            "tracking.to",
            "wandb has no key on this machine",
            "`wandb login`, or export WANDB_API_KEY, or tracking.offline=true",
        )


def _has_wandb_key() -> bool:
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", _WANDB)).hostname or ""
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):  # wandb reads it, and says what is wrong
            continue
    return False
