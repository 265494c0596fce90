"""Check the section `data` of a configuration: sources, columns, templates."""

from collections.abc import Iterator
from datetime import date

from megatron_fipo.config import Config, DataConfig
from megatron_fipo.config.data import QUESTION
from megatron_fipo.config.loop import needs_answer
from megatron_fipo.config.patterns import check_pattern
from megatron_fipo.errors import ConfigError


def data(config: Config, *, trains: bool = True) -> Iterator[str]:
    """Check where problems come from and how they become prompts. Without `trains`, check only validation problems."""
    settings = config.data
    _check_prompts(settings)
    if settings.source == "reasoning_gym":
        if not settings.task:
            raise ConfigError("data.task", "is empty", "the name of a reasoning-gym task, such as data.task=chain_sum")
        if settings.train or settings.validation:
            yield "data.train, data.validation: these files are not read, since reasoning-gym generates the problems"
        return
    for key, names in (("data.train", settings.train), ("data.validation", settings.validation)):
        if not all(name.strip() for name in names):
            raise ConfigError(key, f"{names} has an empty name", "a file, or a dataset with data.source=hub")
    if settings.columns.answer is None and needs_answer(config.reward):
        raise ConfigError(
            "data.columns.answer",
            f"is null, but reward.rule={config.reward.rule} needs a right answer to compare with",
            "a column, or reward.rule=FILE.py:FUNCTION, a reward of your own (docs/rewards.md)",
        )
    kind = "files" if settings.source == "files" else "datasets"
    if trains and not settings.train:
        raise ConfigError("data.train", f"lists no {kind}", f"at least one with data.source={settings.source}")
    if not settings.validation and (config.validation.every or not trains):
        remedy = "at least one" + (", or validation.every=0" if trains else "")
        raise ConfigError("data.validation", f"lists no {kind}", remedy)
    if settings.task or settings.task_options:
        source = settings.source
        yield f"data.task: {settings.task} is not read with data.source={source}; data.source=reasoning_gym does"


def _check_prompts(data: DataConfig) -> None:
    """Check the settings that say how rows become prompts."""
    for key, column in (
        ("data.columns.prompt", data.columns.prompt),
        ("data.columns.answer", data.columns.answer),
        ("data.columns.source", data.columns.source),
        ("data.validation_columns.prompt", data.validation_columns.prompt),
        ("data.validation_columns.answer", data.validation_columns.answer),
        ("data.validation_columns.source", data.validation_columns.source),
    ):
        if column is not None and not all(column.split(".")):
            raise ConfigError(key, f"{column!r} does not name a column", "a column, or outer.inner for a nested one")
    general, own = data, data.validation_columns
    _check_pattern("data.answer", general.answer_format, general.answer_pattern)
    if general.answer_pattern is not None and "pattern" not in (general.answer_format, own.answer_format):
        problem = f"is not read with data.answer_format={general.answer_format}"
        raise ConfigError("data.answer_pattern", problem, "data.answer_format=pattern reads it")
    kind, pattern = own.answer_format or general.answer_format, own.answer_pattern or general.answer_pattern
    _check_pattern("data.validation_columns.answer", kind, pattern)
    if data.prompt_template.count(QUESTION) != 1:
        raise ConfigError(
            "data.prompt_template",
            f"has {data.prompt_template.count(QUESTION)} places for the question",
            f"a text with one {QUESTION}, or {QUESTION} alone",
        )
    if data.chat_template_date is not None and not _is_date(data.chat_template_date):
        raise ConfigError("data.chat_template_date", f"{data.chat_template_date!r} is not a date", "such as 2026-01-31")


def _check_pattern(key: str, answer_format: str, pattern: str | None) -> None:
    """Check an answer pattern. `key` is the common beginning of the two settings' names."""
    if answer_format != "pattern":
        return
    example = "a regular expression with one group, such as 'data.answer_pattern=\"Answer: (.+)\"'"
    if pattern is None:
        raise ConfigError(f"{key}_pattern", f"is not set, with {key}_format=pattern", example)
    check_pattern(f"{key}_pattern", pattern, example)


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
