"""Find and take a run's directory, and the checkpoint to resume from. Rank 0 tells the other ranks."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config
from megatron_fipo.config.resolved import read_tree
from megatron_fipo.config.resume import changes, refused
from megatron_fipo.errors import CheckpointError, ConfigError
from megatron_fipo.policy.checkpoint_places import files_of, newest, step_of
from megatron_fipo.processes.leftovers import remove_outside, remove_partial_files, say_removed
from megatron_fipo.tracking.metrics import METRICS_FILE
from megatron_fipo.tracking.run_files import CREDIT_DIRECTORY, kept_config, set_aside, write_config
from megatron_fipo.tracking.run_lock import RunLock

_DIRECTORIES = ("samples", CREDIT_DIRECTORY, "tensorboard", "validation", "wandb", "mlflow")
"""Directories that a run writes to later. They are checked at the start, so that the run does not fail then."""
_MOST_SHOWN = 8


@dataclass(frozen=True)
class Start:
    """How a run in a directory starts."""

    resume_from: Path | None
    """The checkpoint from which the run resumes."""
    changed: Mapping[str, tuple[Any, Any]]
    """Settings that differ from the checkpoint's, with old and new values."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory, on storage that all ranks share, as rank 0 has found it."""

    lock: RunLock
    """The lock that keeps other runs out."""
    start: Start


def look(config: Config) -> None:
    """Check what can be checked before any process is started. This creates nothing, takes no lock and does not wait.

    Raises:
        FipoError: as `take_directory`, which checks again, since another run may start there meanwhile.
    """
    path = Path(config.run.directory)
    if path.is_dir():
        RunLock(path, print).refuse_if_taken()
        _judge(config, path)


def take_directory(config: Config, stack: ExitStack) -> RunDirectory:
    """Make the run's directory if needed, and keep other runs out of it until `stack` is closed.

    Raises:
        FipoError: another run has it; it holds a run and `run.resume` is never; something in the checkpoint is not a
            file; or the checkpoint was trained with other settings.
    """
    path = Path(config.run.directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise directory_refused(path, error) from error
    lock = stack.enter_context(RunLock(path, lambda text: print(text, flush=True)))
    say_removed(path, remove_partial_files(path) + remove_outside(path))
    return RunDirectory(lock, _judge(config, path))


def directory_refused(path: Path, error: OSError) -> ConfigError:
    """Return the error for a run's directory that the operating system cannot create."""
    return ConfigError("run.directory", f"{path} cannot be made: {error}", "a directory that can be written")


def keep_settings(config: Config, directory: Path, step: int, start: Start) -> list[str]:
    """Write the configuration of a run that starts at `step`. Return the warnings.

    If a run starts again from the beginning in a used directory, the files of the earlier start are renamed.
    """
    warnings = list(start.warnings)
    if not step and (renamed := set_aside(directory)):
        names = ", ".join(path.name for path in renamed)
        warnings.append(f"an earlier start in {directory} saved no checkpoint; what it wrote is now {names}")
    write_config(directory, config, step, changed=bool(start.changed))
    return warnings


def _judge(config: Config, path: Path) -> Start:
    for place in (path / name for name in _DIRECTORIES):
        if place.exists() and not place.is_dir():
            raise ConfigError(
                "run.directory", f"{place} is not a directory", "move it away, or give another run.directory"
            )
    found = newest(path / "checkpoints")
    if config.run.resume == "never" and (found or (path / METRICS_FILE).exists()):
        raise ConfigError("run.resume", f"never, but {path} holds a run", "another run.directory, or run.resume=auto")
    if found is None:
        return Start(None, {}, ())
    try:
        files_of(found)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"{found}: cannot be resumed from: {error}") from None
    return _compare(config, path, found)


def _compare(config: Config, path: Path, found: Path) -> Start:
    """Compare the settings with those that the run saved for this checkpoint."""
    try:
        old = read_tree(kept_config(path, step_of(found)))
    except ConfigError as error:
        problem = f"{error.key} {error.problem}"
        return Start(found, {}, (f"{problem}: settings that differ from the checkpoint's would not be noticed",))
    changed = changes(old, config)
    differences = refused(changed, config)
    shown = "; ".join(differences[:_MOST_SHOWN])
    if len(differences) > _MOST_SHOWN:
        shown += f"; and {len(differences) - _MOST_SHOWN} more"
    if differences and not config.run.resume_changed:
        raise ConfigError(
            "run.directory",
            f"{found} was trained with other settings: {shown}",
            "give the same settings, or another run.directory, or run.resume_changed=true to resume with the new ones",
        )
    warnings = (f"resumes with other settings from step {step_of(found)}: {shown}",) if differences else ()
    return Start(found, changed, warnings)
