"""Use a run's own problems, rewards and lengths to evaluate its checkpoints. The command line overrides them."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_fipo.config import Config, EnvironmentConfig
from megatron_fipo.errors import DataError, one_line

INHERITED = (
    *("data", "reward", "environment", "validation", "run.seed", "model.max_position_embeddings"),
    *("rollout.max_prompt_length", "rollout.max_response_length"),
)
"""The settings that an evaluation takes from a run. Servers and machines are the evaluation's own."""


def with_settings_of(run: Path, config: Config, said: Sequence[str]) -> Config:
    """Return `config` with the INHERITED settings of a run's config.yaml, except for those that the command line sets.

    `said` is the command line. A chosen group (`data=math`) sets all of its section, and an experiment sets everything.

    Raises:
        DataError: config.yaml cannot be read, or has settings that this version does not know.
    """
    words = [word for word in said if "=" in word and not word.startswith("-")]
    names = [word.lstrip("+~").partition("=")[0] for word in words]
    if "experiment" in names:
        return config
    composed, path = dataclasses.asdict(config), run / "config.yaml"
    merged = copy.deepcopy(composed)
    try:
        # Runs from before there were environments had samples of one turn.
        without = {"environment": dataclasses.asdict(EnvironmentConfig())}
        trained = without | yaml.safe_load(path.read_text(encoding="utf-8"))
        for key in INHERITED:
            if key.partition(".")[0] not in names:
                _put(merged, key, _get(trained, key))
        for name in names:
            if any(name.startswith(f"{key}.") or name == key for key in INHERITED):
                _put(merged, name, _get(composed, name))
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), merged))
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError, OmegaConfBaseException) as error:
        remedy = "give an experiment; its settings are used then"
        raise DataError(f"{path} cannot be taken over: {one_line(error)} ({remedy})") from error
    assert isinstance(found, Config)
    return found


def _get(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for name in key.split("."):
        value = value[name]
    return value


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree[section]
    tree[name] = copy.deepcopy(value)
