"""Check what the section `tracking` of a configuration needs on this machine: packages of trackers, and W&B's key."""

import netrc
import os
from importlib.util import find_spec
from urllib.parse import urlsplit

from megatron_fipo.config import TrackingConfig
from megatron_fipo.errors import ConfigError

_DISTRIBUTIONS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny", "trackio": "trackio"}
"""What to install for each module. mlflow-skinny is the part of mlflow that sends numbers."""
_WANDB = "https://api.wandb.ai"


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
