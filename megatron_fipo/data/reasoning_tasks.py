"""Generate problems by any task of reasoning-gym, with what the task's scorer needs to judge an answer."""

import ast
from collections.abc import Iterator
from typing import Any

from megatron_fipo.config import DataConfig
from megatron_fipo.data.sources import RawProblem
from megatron_fipo.errors import ConfigError, DataError

# reasoning-gym makes problem i from the seed plus i. The seeds are far apart, so that the two sets are independent.
# They are fixed, as a file would be: run.seed changes the order of the problems, not the problems.
_SEEDS = {"train": 0, "validation": 1_000_000_000}


def generate(config: DataConfig, split: str) -> Iterator[RawProblem]:
    """Yield `train_size` or `validation_size` problems of the task: the question followed by `config.instruction`.

    ConfigError for an unknown task or option. A few tasks iterate over a set of strings (isomorphic_strings,
    ransom_note, polynomial_multiplication). They give the same problems in another process only with a fixed
    PYTHONHASHSEED.
    """
    size = config.train_size if split == "train" else config.validation_size
    dataset = _create(config, size, _SEEDS[split])
    for index in range(size):
        entry = dataset[index]
        content = "\n\n".join(filter(None, (entry["question"], config.instruction)))
        where = f"reasoning-gym {config.task}, {split} problem {index}"
        extra = {"task": config.task, "options": dict(config.task_options), "entry": _literal(entry, where)}
        message = {"role": "user", "content": content}
        # Some tasks have many right answers and therefore no reference answer. Their scorers do not need one.
        answer = "" if entry["answer"] is None else str(entry["answer"])
        yield RawProblem([message], entry["question"], answer, config.task, where, extra, row=_plain(entry))


def _create(config: DataConfig, size: int, seed: int) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError("data.source", "reasoning_gym is not installed", "pip install reasoning-gym") from error
    if config.task not in DATASETS:
        raise ConfigError("data.task", f"reasoning-gym has no task {config.task!r}", f"one of {sorted(DATASETS)}")
    for reserved in ("size", "seed"):
        if reserved in config.task_options:
            raise ConfigError(
                f"data.task_options.{reserved}", "is set by the run", "use data.train_size and validation_size"
            )
    try:
        return reasoning_gym.create_dataset(config.task, size=size, seed=seed, **config.task_options)
    except (TypeError, AssertionError, ValueError) as error:
        fields = sorted(set(DATASETS[config.task][1].__dataclass_fields__) - {"size", "seed"})
        raise ConfigError(
            "data.task_options", f"{config.task} refuses them: {error}", f"its options are {fields}"
        ) from error


def _literal(entry: dict[str, Any], where: str) -> str:
    """Return the entry as a Python literal. Unlike JSON, it keeps tuples and integer keys, which some scorers need."""
    literal = repr(_plain(entry))
    try:
        ast.literal_eval(literal)
    except (ValueError, SyntaxError) as error:
        raise DataError(f"{where}: holds values that cannot be handed to the verifier ({error})") from error
    return literal


def _plain(value: Any) -> Any:
    """Return the value with numpy's scalars converted to Python's."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(_plain(item) for item in value)
    return value.item() if hasattr(value, "item") else value
