"""Find the weights that `model.path` means in an evaluation, and make them readable for vLLM.

A Hugging Face directory is read as it is. vLLM cannot read a distributed checkpoint. So it is converted to a temporary
Hugging Face directory, in a separate process, since the conversion needs torch. A run's directory means its newest
checkpoint.
"""

import hashlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.config.model_places import fetch_model, how_to_get, hub_id
from megatron_fipo.errors import ConfigError, WeightError
from megatron_fipo.policy.checkpoint_places import newest, step_of
from megatron_fipo.weights.formats import is_checkpoint

_REMEDY = "a Hugging Face model directory, a checkpoint, a run's directory, or embedded:tiny"


@dataclass(frozen=True)
class Weights:
    """A model to evaluate."""

    directory: Path
    """The directory with the weights, config.json and tokenizer."""
    name: str
    """Used in the names of directories and results, such as tiny or my-run-step-000024."""
    run: Path | None
    """The run that made the weights, if it is known."""

    def fingerprint(self) -> str:
        """Return a hash of the files' names, sizes and times. The contents are not read."""
        files = sorted(path for path in self.directory.iterdir() if path.is_file())
        states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(repr((str(self.directory.resolve()), states)).encode()).hexdigest()[:16]


def find_weights(path: str, fetch_command: str | None = None) -> Weights:
    """Find the weights that `model.path` names. A model of the hub is downloaded if it is not in the cache.

    `fetch_command` is the command that gets the configured model. ConfigError if there is nothing to evaluate.
    """
    if not path:
        raise ConfigError("model.path", "is empty", _REMEDY)
    directory, from_hub = fetch_model(path), hub_id(path)
    if from_hub is not None:
        return Weights(directory, from_hub[0].rpartition("/")[2], None)
    if (directory / "config.json").is_file():
        return _weights(directory)
    if not directory.is_dir():
        raise ConfigError("model.path", f"there is no directory {path}", how_to_get(path, fetch_command))
    checkpoint = newest(directory / "checkpoints")
    if checkpoint is None:
        a_run = (directory / "config.yaml").is_file()
        problem = f"the run {path} has no checkpoint yet" if a_run else f"{path} holds no config.json"
        raise ConfigError("model.path", problem, _REMEDY)
    exported = directory / "huggingface" / checkpoint.name
    return _weights(exported if (exported / "config.json").is_file() else checkpoint)


def _weights(directory: Path) -> Weights:
    parent = directory.absolute().parent
    if parent.name in ("checkpoints", "huggingface") and (parent.parent / "config.yaml").is_file():
        return Weights(directory, f"{parent.parent.name}-step-{step_of(directory):06d}", parent.parent)
    return Weights(directory, directory.absolute().name, None)


def huggingface_directory(weights: Weights, work: Path) -> Path:
    """Return a directory that vLLM can read: the weights' own, or `work` with the complete conversion.

    A conversion that was stopped continues. WeightError names every tensor that does not fit.
    """
    if not is_checkpoint(weights.directory):
        return weights.directory
    if work.is_dir():
        return work
    # Spawned, so that the evaluating process does not import torch, and its threads do not disturb.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            pool.submit(_convert, weights.directory, work).result()
        except BrokenProcessPool as error:
            raise WeightError(f"the conversion of {weights.directory} was killed; is there memory left?") from error
    return work


def _convert(source: Path, target: Path) -> None:
    from megatron_fipo.weights.conversion import to_huggingface

    to_huggingface(source, target, source)
