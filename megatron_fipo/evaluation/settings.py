"""The settings on which an evaluation's results depend. With another value it is another evaluation and directory."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config
from megatron_fipo.errors import ConfigError, DataError
from megatron_fipo.evaluation.files import SETTINGS_FILE
from megatron_fipo.evaluation.weights import Weights
from megatron_fipo.files import write_json_atomically
from megatron_fipo.records.problem import Problem


def settings_of(config: Config, weights: Weights, problems: Sequence[Problem]) -> dict[str, Any]:
    """Return the settings in a flat dictionary, by the configuration's keys where there are keys."""
    rollout, reward = config.rollout, dataclasses.asdict(config.reward)
    # The number of verifiers, the allowed share of failures and the time limit do not change verdicts.
    for name in ("workers", "failed_share_warn", "failed_share_stop", "timeout_s", "overlong_buffer"):
        reward.pop(name)
    prompts = [(problem.id, problem.token_ids.tolist(), problem.ground_truth) for problem in problems]
    return {
        "model.path": str(weights.directory.resolve()),
        "weights": weights.fingerprint(),
        "problems": hashlib.sha256(repr(prompts).encode()).hexdigest()[:16],
        "run.seed": config.run.seed,
        "model.max_position_embeddings": config.model.max_position_embeddings,
        "validation.samples": config.validation.samples,
        "validation.temperature": config.validation.temperature,
        "validation.top_p": config.validation.top_p,
        "rollout.max_prompt_length": rollout.max_prompt_length,
        "rollout.max_response_length": rollout.max_response_length,
        "rollout.dtype": rollout.dtype,
        "rollout.quantization": rollout.quantization,
        **{f"reward.{name}": value for name, value in reward.items()},
        **_environment(config),
    }


def _environment(config: Config) -> dict[str, Any]:
    """What of it changes samples; nothing for those of one turn, as in evaluations from before there were others."""
    found = config.environment
    if not found.is_own:
        return {}
    return {
        "environment.name": found.name,
        "environment.options": found.options,
        "environment.max_turns": found.max_turns,
    }


def directory_of(config: Config, weights: Weights, settings: dict[str, Any]) -> Path:
    """Return the directory of this evaluation's files. The same settings give the same directory, so that it resumes.

    Raises:
        ConfigError: evaluation.directory is empty.
    """
    if (given := config.evaluation.directory) is not None:
        if not given.strip():
            raise ConfigError("evaluation.directory", "is empty", "a directory, or null for one by the settings")
        return Path(given)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    place = weights.run / "evaluations" if weights.run else Path("runs") / "evaluations"
    return place / f"{weights.name}-{digest}"


def keep_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Write the settings into an evaluation's directory, or compare them with those that are already there.

    Raises:
        ConfigError: the directory has an evaluation with other settings. Names the first one that differs.
        DataError: the saved settings cannot be read.
    """
    path = directory / SETTINGS_FILE
    if not path.exists():
        write_json_atomically(path, settings)
        return
    try:
        earlier = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; remove the directory to start anew") from error
    for key, value in settings.items():
        if earlier.get(key) != value:
            raise ConfigError(
                "evaluation.directory",
                f"{directory} holds an evaluation with {key}={earlier.get(key)}, not {value}",
                "another directory, or null for one by these settings",
            )
