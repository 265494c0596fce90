"""Find a configured model: embedded, a directory on this machine, or a model of the hub in the hub's cache.

owner/name and owner/name@revision name a model of the hub. If a directory has this name, the directory is used. Names
that begin with models/ always mean directories, since this project's tools write there. Imports neither torch nor
megatron.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config.hub import reason
from megatron_fipo.errors import ConfigError

KEY = "model.path"
_HUB_ID = re.compile(r"(?!models/)(?P<name>[A-Za-z0-9]([\w.-]*\w)?/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*")
"""The files that a run or an exported model needs. Weights that would have to be unpickled are not among them."""
_LONGEST = 96
"""Maximum number of characters in owner/name."""
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def hub_id(path: str) -> tuple[str, str | None] | None:
    """Return (owner/name, revision) if `path` names a model of the hub and not a directory here, else None."""
    found = _HUB_ID.fullmatch(path)
    if found is None or os.path.isdir(resolve_embedded(path)):
        return None
    name = found["name"]
    # Names that the hub's own client refuses, and revisions that would lead to a path outside its cache.
    if len(name) > _LONGEST or "--" in name or ".." in path or name.endswith((".git", "-", ".")):
        return None
    return name, found["revision"]


def model_directory(path: str) -> Path:
    """Return the directory that `model.path` means. For a model of the hub it is the one in the cache, complete or not.

    Nothing is downloaded: if the model is not on this machine, the returned path does not exist.
    """
    found = hub_id(path)
    if found is not None:
        from huggingface_hub import try_to_load_from_cache

        name, revision = found
        config = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(config, str):
            return Path(config).parent
    return resolve_embedded(path)


def fetch_config(path: str) -> Path:
    """Return `model_directory`, after downloading config.json if the model is on the hub. ConfigError if that fails."""
    directory, found = model_directory(path), hub_id(path)
    if found is None or (directory / "config.json").is_file():
        return directory
    from huggingface_hub import snapshot_download

    name, revision = found
    try:
        # Not hf_hub_download: without a network it retries for 25 seconds, and prints messages.
        return Path(snapshot_download(name, revision=revision, allow_patterns=["config.json"]))
    except Exception as error:  # the client raises exceptions of several libraries
        raise _refused(path, name, error) from error


def fetch_model(path: str) -> Path:
    """Return `model_directory`, after downloading a model of the hub into the cache, with a progress bar.

    Nothing is downloaded if the cache has the whole model. If several processes share a cache, one downloads each file
    and the others wait. ConfigError if the hub cannot be reached, refuses, or has no safetensors of the model.
    """
    directory, found = model_directory(path), hub_id(path)
    if found is None or _is_complete(directory):
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if os.environ.get("RANK", "0") != "0":
        disable_progress_bars()
    name, revision = found
    try:
        # Files in subdirectories are other formats of the same weights.
        folder = snapshot_download(name, revision=revision, allow_patterns=[*_FILES], ignore_patterns=["*/*"])
    except Exception as error:  # the client raises exceptions of several libraries
        raise _refused(path, name, error) from error
    if not _is_complete(Path(folder)):
        problem = f"{path} has no complete safetensors, from the hub or in its cache {_cache()}"
        raise ConfigError(KEY, problem, f"a model with {_SINGLE} or {_INDEX}, or `hf download {name}` once more")
    return Path(folder)


def how_to_get(path: str, command: str | None) -> str:
    """Return the remedy of an error that says that there is no model at `path`."""
    made = f"`{command}` gets it; or " if command else ""
    return f"{made}a Hugging Face model directory, owner/name of a model of the hub, or embedded:tiny"


def _is_complete(directory: Path) -> bool:
    """Return whether the configuration and all weights are there. An interrupted download is not complete."""
    if not (directory / "config.json").is_file():
        return False
    if (directory / _SINGLE).is_file():
        return True
    try:
        weights: Any = json.loads((directory / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return bool(weights) and all((directory / name).is_file() for name in set(weights.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _refused(path: str, name: str, error: Exception) -> ConfigError:
    problem = f"{path} is not a directory here and not in the hub's cache {_cache()}, and {reason(error, 'model')}"
    remedy = f"`hf download {name}` where there is a network, with HF_HOME on storage that this machine sees too"
    return ConfigError(KEY, problem, f"{remedy}; or a model directory")


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)
