"""Why: a glob over all files of a data set mixes its splits, and a run would then train on its test problems.

The hub cannot be reached here. Data sets are in directories and in the hub's cache, as after a download.
"""

import json
from pathlib import Path

import pytest

from megatron_fipo.config import ColumnsConfig, DataConfig
from megatron_fipo.data.column_sums import write_tokenizer
from megatron_fipo.data.hub import HubFiles, fetch_split
from megatron_fipo.data.problems import load_problems
from megatron_fipo.data.tokenizers import load_tokenizer
from megatron_fipo.errors import DataError

CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/*}
---
# A data set
"""


def lay_out(directory: Path, files: dict[str, str]) -> Path:
    """Write question files, each with the given question, and a card if one is given."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = json.dumps({"question": content, "answer": "7"}) + "\n"
        path.write_text(content if name.endswith((".md", ".csv")) else row)
    return directory


@pytest.fixture
def with_card(tmp_path: Path) -> Path:
    files = {
        "README.md": CARD,
        "main/train-0.jsonl": "1+6=?",
        "main/test-0.jsonl": "2+5=?",
        "socratic/a.jsonl": "3+4=?",
    }
    return lay_out(tmp_path / "gsm", files)


def names(found: HubFiles) -> list[str]:
    return [Path(path).name for path in found.paths]


@pytest.mark.parametrize(
    ("entry", "split", "expected"),
    [
        ("/main", "train", ["train-0.jsonl"]),
        ("/main", "validation", ["test-0.jsonl"]),
        ("/main:train", "validation", ["train-0.jsonl"]),
        ("/main:test", "train", ["test-0.jsonl"]),
        ("/socratic", "train", ["a.jsonl"]),
        ("/socratic:train", "validation", ["a.jsonl"]),
        (":main/*.jsonl", "train", ["test-0.jsonl", "train-0.jsonl"]),
    ],
)
def test_a_card_says_which_files_are_a_split(with_card: Path, entry: str, split: str, expected: list[str]) -> None:
    assert names(fetch_split(f"{with_card}{entry}", split)) == expected


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
        (["train.jsonl", "test.jsonl"], "validation", ["test.jsonl"]),
        (["train.jsonl", "test.jsonl", "validation.jsonl"], "validation", ["validation.jsonl"]),
        (
            ["data/train-0-of-2.jsonl", "data/train-1-of-2.jsonl", "data/test-0-of-1.jsonl"],
            "train",
            ["train-0-of-2.jsonl", "train-1-of-2.jsonl"],
        ),
        (["train/a.jsonl", "test/b.jsonl"], "train", ["a.jsonl"]),
        (["data/dapo-math-17k.jsonl"], "train", ["dapo-math-17k.jsonl"]),
        (["aime.jsonl"], "validation", ["aime.jsonl"]),
    ],
)
def test_without_a_card_the_names_of_files_say_it(tmp_path: Path, files, split, expected) -> None:
    folder = lay_out(tmp_path / "set", dict.fromkeys(files, "1+6=?"))
    assert names(fetch_split(str(folder), split)) == expected


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("", "main.*socratic"),
        ("/main:dev", "has no split dev; its splits are train, test"),
        ("/nope", "'nope' not found.*main.*socratic"),
        (":*.parquet", "no file of that name"),
    ],
)
def test_what_a_data_set_does_not_have_is_refused_with_what_it_has(with_card: Path, entry: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as refusal:
        fetch_split(f"{with_card}{entry}", "train")
    assert "\n" not in str(refusal.value)


def test_a_data_set_without_a_usual_split_or_format_is_refused(tmp_path: Path) -> None:
    odd = lay_out(tmp_path / "odd", {"data/easy-00000-of-00001.jsonl": "1", "data/hard-00000-of-00001.jsonl": "2"})
    with pytest.raises(DataError, match="has no split validation or test; its splits are easy, hard"):
        fetch_split(str(odd), "validation")
    table = lay_out(tmp_path / "table", {"train.csv": "question,answer\n1,2\n"})
    with pytest.raises(DataError, match=r"train\.csv is of another format"):
        load(tmp_path, str(table))


def load(tmp_path: Path, train: str, validation: str = ""):
    write_tokenizer(tmp_path / "model")
    config = DataConfig(
        source="hub",
        train=[train],
        validation=[validation] if validation else [],
        columns=ColumnsConfig("question", "answer"),
        prompt_template="{question}",
    )
    return load_problems(config, "train", load_tokenizer(tmp_path / "model"), 20)


def test_a_run_trains_on_the_train_split_alone(tmp_path: Path, with_card: Path) -> None:
    loaded = load(tmp_path, f"{with_card}/main", f"{with_card}/main")
    assert [(problem.text, problem.data_source) for problem in loaded.problems] == [("1+6=?", "main")]
    assert loaded.counts.dropped_held_out == 0
    with pytest.raises(DataError, match="dropped_held_out 1"):
        load(tmp_path, f"{with_card}/main:test", f"{with_card}/main")


def test_a_data_set_in_the_hubs_cache_needs_no_hub(tmp_path: Path, with_card: Path, monkeypatch) -> None:
    cached = tmp_path / "cache" / "datasets--owner--gsm"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    with_card.rename(cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert names(fetch_split("owner/gsm/main", "train")) == ["train-0.jsonl"]
    assert fetch_split("owner/gsm/main:test", "train").data_source == "gsm"
    with pytest.raises(
        DataError,
        match=r"owner/other: is neither .* and HF_HUB_OFFLINE is set; "
        r"`hf download owner/other --repo-type dataset --local-dir other` fetches",
    ):
        fetch_split("owner/other", "train")
    with pytest.raises(DataError, match="is not a dataset"):
        fetch_split("a/b/c/d", "train")


@pytest.mark.parametrize("pattern", ["/etc/*.jsonl", "../*.jsonl", "a/../../*.jsonl", "**x/*.jsonl"])
def test_a_pattern_that_leads_out_or_is_none_is_refused(with_card, pattern):
    with pytest.raises(DataError, match="pattern"):
        fetch_split(f"{with_card}:{pattern}", "train")


@pytest.mark.parametrize("name", ["", "~no_such_user/a", "x" * 300 + "/a"])
def test_a_name_that_no_data_set_has_is_named(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="^" + name):
        fetch_split(name, "train")
