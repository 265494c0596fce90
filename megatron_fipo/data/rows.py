"""Read the rows of the entries of data.train and data.validation, and check the first rows before processes start."""

from collections.abc import Callable, Iterator

from megatron_fipo.config import DataConfig
from megatron_fipo.data.hub import fetch_split
from megatron_fipo.data.layout import Layout
from megatron_fipo.data.sources import RawProblem, read_files, refuse
from megatron_fipo.errors import ConfigError, DataError


class _Seen(Exception):
    """Raised when a row was dropped because of its answer. Its columns exist, which is all that the check needs."""


def names_of(config: DataConfig, split: str) -> list[str]:
    """Return the entries of a split, train or validation. ConfigError if there are none."""
    names = config.train if split == "train" else config.validation
    if not names:
        raise ConfigError(f"data.{split}", "names no file", "give at least one, or embedded:NAME")
    return names


def rows_of(
    name: str,
    config: DataConfig,
    split: str,
    on_bad_answer: Callable[[DataError], None] = refuse,
    *,
    every_column: bool = False,
) -> Iterator[RawProblem]:
    """Yield the rows of one entry whose answers can be used. `on_bad_answer` is called for each of the others.

    Raises:
        DataError: a file or a row cannot be used, or there are no rows. Names file, row (from 1) and column.
    """
    if config.source == "files":
        paths, data_source = [name], None
    else:
        files = fetch_split(name, split)
        paths, data_source = files.paths, files.data_source
    bad_answers: list[DataError] = []

    def note(error: DataError) -> None:
        on_bad_answer(error)
        bad_answers[:] = [error]

    rows = read_files(paths, Layout.of(config, split), data_source, every_column=every_column, on_bad_answer=note)
    first = next(rows, None)
    if first is not None:
        yield first
        yield from rows
    elif not bad_answers:
        raise DataError(f"{name}: has no rows; give one with problems, or leave it out of data.{split}")


def look_at_first_rows(config: DataConfig, splits: tuple[str, ...]) -> None:
    """Read the first row of each entry of these splits, and download the entries that are on the hub.

    Raises:
        DataError: as `rows_of`, or an entry cannot be downloaded.
    """
    if config.source == "reasoning_gym":
        return

    def on_bad_answer(error: DataError) -> None:
        if config.bad_answers != "drop":
            refuse(error)
        raise _Seen

    for split in splits:
        for name in names_of(config, split):
            try:
                next(rows_of(name, config, split, on_bad_answer))
            except _Seen:
                continue
