"""Where a run's first weights come from, a Hugging Face directory or a distributed checkpoint, and whether they fit."""

from pathlib import Path

from megatron_fipo.errors import WeightError
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.models.parameters import parameters
from megatron_fipo.weights.distributed_checkpoint import CheckpointReader
from megatron_fipo.weights.formats import is_checkpoint
from megatron_fipo.weights.huggingface import HuggingFaceReader


def open_source(model_dir: str | Path) -> HuggingFaceReader | CheckpointReader:
    """The reader of whichever of the two `model_dir` is. WeightError, naming the file, if it cannot be read."""
    directory = Path(model_dir)
    return CheckpointReader(directory) if is_checkpoint(directory) else HuggingFaceReader(directory)


def check_source(model_dir: str | Path, model_config: ModelConfig) -> None:
    """Hold the names, shapes and types of all stored tensors against config.json; only headers are read.

    Worth doing before a model is built: sizes that config.json has wrong would fill the memory first. Raises
    WeightError with one line for each tensor that is missing, left over, of a wrong shape or of a type that is no
    plain number.
    """
    with open_source(model_dir) as reader:
        problems = reader.problems(
            [entry for entry in parameters(model_config).values() if entry.exported], model_config
        )
    if problems:
        raise WeightError(joined(problems))


def joined(problems: list[str]) -> str:
    """One problem as it is, several as a list."""
    return (
        problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} problems with the weights:", *problems])
    )
