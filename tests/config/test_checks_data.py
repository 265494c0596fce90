"""The section `data` of a configuration: columns, templates, dates, files.

Why: mistakes there would otherwise show only after servers and processes have started. tests/data tests the contents of
files.
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config.configure import load_config
from megatron_fipo.errors import ConfigError
from tests.config.judging import judge


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.columns.prompt=''", "data.columns.prompt"),
        ("data.columns.answer=a..b", "data.columns.answer"),
        ("data.columns.source=.a", "data.columns.source"),
        ("data.validation_columns.prompt=a.", "data.validation_columns.prompt"),
        ("data.validation_columns.answer_format=json", "data.validation_columns.answer_format"),
        ("data.answer_format=json", "data.answer_format"),
        ("data.prompt_template=Solve", "data.prompt_template"),
        ("'data.prompt_template=\"{question} {question}\"'", "data.prompt_template"),
        ("data.chat_template_date=tomorrow", "data.chat_template_date"),
        ("data.chat_template_date=20260131", "data.chat_template_date"),
        ("data.chat_template_date=2026-02-30", "data.chat_template_date"),
    ],
)
def test_a_wrong_value_is_refused_by_key(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        judge(override.strip("'"))
    assert refusal.value.key == key


def test_right_values_are_accepted() -> None:
    config = load_config(
        [
            "data.columns.prompt=question",
            "data.columns.answer=a.b",
            "data.chat_template_date=2026-01-31",
            "data.prompt_template='{question}'",
            "+data.chat_template_variables.enable_thinking=false",
            "data.validation_columns.answer_format=boxed",
        ]
    )
    assert judge() == []
    assert (config.data.chat_template_date, config.data.prompt_template) == ("2026-01-31", "{question}")
    assert config.data.chat_template_variables == {"enable_thinking": False}


def test_a_template_variable_without_its_plus_is_told_about_it() -> None:
    with pytest.raises(ConfigError, match=r"add it with a plus: \+data\.chat_template_variables"):
        load_config(["data.chat_template_variables.enable_thinking=false"])


def test_a_file_of_another_format_is_refused(model_directory: Any, tiny_files: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    with pytest.raises(ConfigError, match=r"^data\.train: .*a\.csv is of another format .*read_csv\(.*makes a \.jsonl"):
        judge(model_directory(), *tiny_files, f"data.train=[{tmp_path / 'a.csv'}]", local=True)


@pytest.mark.parametrize("key", ["data.train", "data.validation"])
def test_an_empty_name_of_a_source_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="has an empty name") as refusal:
        judge(f"{key}=['a.jsonl', ' ']")
    assert refusal.value.key == key


def test_files_below_the_home_directory_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").touch()
    judge("data.train=['~/a.jsonl']", "data.validation=['~/a.jsonl']", local=True)
    for name in ("~no_such_user/a.jsonl", f"{'x' * 300}.jsonl", "a\tb.jsonl"):
        with pytest.raises(ConfigError, match=r"^data\.train: .* is not found") as refusal:
            judge(f"data.train=['{name}']", local=True)
        assert str(refusal.value).isprintable()
