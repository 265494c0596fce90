"""Which files an entry means, and the error if it means none.

Why: a run that reads a directory together with its test split, or a description file as problems, trains on the wrong
data. tests/data tests the contents of files.
"""

import os
from pathlib import Path

import pytest

from megatron_fipo.config.data_files import NotFound, files_of, format_of, source_name

FILES = {
    "shards": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "README.md"],
    "splits": ["data-train.jsonl", "data-test.jsonl"],
    "mixed": ["a.jsonl", "b.parquet"],
    "saved": ["data-00000-of-00001.arrow", "dataset_info.json", "state.json"],
    "outer/train": ["data-00000-of-00001.arrow"],
    "empty": [],
}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, names in FILES.items():
        (tmp_path / place).mkdir(parents=True)
        for name in names:
            (tmp_path / place / name).touch()
    for name in ("problems.jsonl", "table.csv", "a[1].jsonl"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("problems.jsonl", ["problems.jsonl"]),
        ("shards", FILES["shards"][:2]),
        ("shards/*.parquet", FILES["shards"][:2]),
        ("**/b.parquet", ["b.parquet"]),
        ("splits/*train*", ["data-train.jsonl"]),
        ("saved", ["data-00000-of-00001.arrow"]),
        ("a[1].jsonl", ["a[1].jsonl"]),  # the name of a file, before it is a pattern
        ("embedded:tiny_train.jsonl", ["tiny_train.jsonl"]),
    ],
)
def test_what_an_entry_means(entry: str, names: list[str]) -> None:
    assert [path.name for path in files_of(entry)] == names


@pytest.mark.parametrize(
    ("entry", "problem", "remedy"),
    [
        ("splits", "files of the splits test and train", "'splits/*test*' or 'splits/*train*'"),
        ("mixed", "files that end in .jsonl and in .parquet", "'mixed/*.jsonl' or 'mixed/*.parquet'"),
        ("outer", "without a problem file", "one of outer/train"),
        ("empty", "without a problem file", "files that end in .parquet"),
        ("none*.jsonl", "matches no file", f"seen from {os.sep}"),
        ("a\0*/b.jsonl", "matches no file", "a pattern that matches some"),
        ("table.csv", "is of another format", "pandas.read_csv('table.csv', dtype=str).to_json('table.jsonl'"),
        ("*.csv", "matches table.csv, which is of another format", "read_csv"),
        ("problem.jsonl", "problem.jsonl is not found", ". has problems.jsonl"),
        ("openai/gsm8k", "openai/gsm8k is not found", "data.source=hub and openai/gsm8k"),
    ],
)
def test_what_means_no_file_is_answered_with_what_would(entry: str, problem: str, remedy: str) -> None:
    with pytest.raises(NotFound) as refusal:
        files_of(entry)
    assert problem in str(refusal.value) and remedy in refusal.value.remedy


def test_names_say_format_and_source() -> None:
    names = ("a.jsonl", "a.json.gz", "a.jsonl.gz", "a.parquet.gz", "a.gz", "a.csv", "a")
    assert [format_of(Path(name)) for name in names] == [".jsonl", ".json", ".jsonl", None, None, None, None]
    assert [source_name(Path(name)) for name in ("aime24.jsonl.gz", "train-00001-of-00012.parquet")] == [
        "aime24",
        "train",
    ]
