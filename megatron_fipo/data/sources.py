"""Rows of problem files in the DAPO-Math-17k / AIME column layout: parquet or JSONL, local or from the hub.

    prompt                      list of chat messages, {role, content}
    reward_model.ground_truth   the answer
    data_source                 name of the dataset; the file's stem where the column is missing

Other columns (ability, extra_info) are not read.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.data.tokenizers import Message
from megatron_fipo.errors import DataError

_REQUIRED_COLUMNS = ("prompt", "reward_model")
_LAYOUT = "the columns of DAPO-Math-17k: prompt, reward_model.ground_truth, data_source"
_SUFFIXES = (".parquet", ".jsonl")


@dataclass
class RawProblem:
    """A problem before its chat template and tokens."""

    messages: list[Message]
    ground_truth: str
    data_source: str
    where: str
    """File and row, for messages."""
    extra: dict[str, Any] = field(default_factory=dict)


def read_files(paths: list[str]) -> Iterator[RawProblem]:
    """The rows of parquet and JSONL files, in order. DataError names file, row (from 1) and column."""
    for name in paths:
        path = resolve_embedded(name).expanduser()
        if not path.is_file():
            raise DataError(f"{name}: no such file")
        if path.suffix not in _SUFFIXES:
            raise DataError(f"{name}: neither .parquet nor .jsonl")
        rows = _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)
        for number, row in enumerate(rows, start=1):
            yield _raw_problem(row, path, number)


def fetch_hub_files(datasets: list[str]) -> list[str]:
    """Downloads the parquet and JSONL files of hub datasets into the hub's cache; local paths, sorted within a dataset.

    A dataset is `owner/name`, or `owner/name:PATTERN` for the files that match a glob pattern. DataError if the hub
    cannot be reached and the cache does not hold the dataset.
    """
    from huggingface_hub import snapshot_download

    paths: list[str] = []
    for dataset in datasets:
        name, _, pattern = dataset.partition(":")
        try:
            folder = snapshot_download(
                name, repo_type="dataset", allow_patterns=pattern or [f"*{suffix}" for suffix in _SUFFIXES]
            )
        except Exception as error:  # the client raises many kinds, of several libraries
            raise DataError(
                f"{dataset}: cannot be fetched from the hub ({type(error).__name__}: {error}); download its files "
                "elsewhere and name them with data.source=files"
            ) from error
        found = sorted(str(path) for path in Path(folder).rglob(pattern or "*") if path.suffix in _SUFFIXES)
        if not found:
            raise DataError(f"{dataset}: the hub dataset has no .parquet or .jsonl file of that name")
        paths += found
    return paths


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file ({error})") from error
    present = set(file.schema_arrow.names)
    for column in _REQUIRED_COLUMNS:
        if column not in present:
            raise DataError(f"{path}: no column {column}; it has {sorted(present)}, and should have {_LAYOUT}")
    columns = [name for name in (*_REQUIRED_COLUMNS, "data_source") if name in present]
    for batch in file.iter_batches(columns=columns):
        yield from batch.to_pylist()


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, row {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, row {number}: not a JSON object with {_LAYOUT}")
            yield row


def _raw_problem(row: dict[str, Any], path: Path, number: int) -> RawProblem:
    where = f"{path}, row {number}"
    messages = row.get("prompt")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise DataError(f"{where}, column prompt: should be a list of chat messages with role and content")
    reward_model = row.get("reward_model")
    answer = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    if answer is None or not str(answer).strip():
        raise DataError(f"{where}, column reward_model.ground_truth: the answer is missing")
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    return RawProblem(messages, str(answer), row.get("data_source") or path.stem, where)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
